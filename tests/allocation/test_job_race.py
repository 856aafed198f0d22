"""Two replicas and one job: never two leases that callers have (rule 2, docs/rules.md#r2).

e2e/test_job_race.py does the same a thousand times, and e2e/kind/test_job_race.py with a real API server.
"""

from contextlib import AsyncExitStack

import pytest

from bkpool.core.names import Key
from bkpool.kube import ClusterAccess, KubeApi
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.sqlite import SqliteStore
from support.fake_api_server import fake_api_server
from support.job_race import JobRace

pytestmark = [pytest.mark.slow, pytest.mark.any_python]

POOL = Key("default", "p")


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_late_or_killed_a_job_has_one_lease(tmp_path, seed):
    store = await SqliteStore.open(tmp_path / "state.db")
    try:
        race = JobRace(store, seed, POOL)
        await race.run(12)
        assert race.joined
    finally:
        await store.close()


@pytest.mark.parametrize("seed", range(3))
async def test_the_same_with_an_api_server(tmp_path, seed):
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(fake_api_server())
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
        stack.push_async_callback(api.close)
        race = JobRace(KubernetesStore(api), seed, POOL)
        await race.run(12)
        assert race.joined
