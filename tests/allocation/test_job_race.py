"""Two replicas and one job: never two leases that callers have (rule 2, docs/rules.md#r2)."""

import pytest

from bkpool.core.names import Key
from bkpool.store.sqlite import SqliteStore
from support.job_race import JobRace


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_is_late_or_killed_a_job_has_one_lease(tmp_path, seed):
    store = await SqliteStore.open(tmp_path / "state.db")
    try:
        race = JobRace(store, seed, Key("default", "p"))
        await race.run(12)
        assert race.joined
    finally:
        await store.close()
