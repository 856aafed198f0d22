"""Two replicas ask a real API server for the same job, with late watches, lost histories and kills in between."""

from __future__ import annotations

from bkpool.core.names import Key
from support.job_race import JobRace

ROUNDS = 60


async def test_never_two_leases_of_a_job_and_each_round_ends_with_one(store):
    race = JobRace(store, 16, Key("default", "race"))
    await race.run(ROUNDS)
    assert race.kills
    assert race.joined > ROUNDS
