"""The election on a real API server: one replica leads, a killed one is replaced, and a release takes effect at
once."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.kube.leader import LeaderElection, LeaderTimes

LEASE = "e2e-leader"


class Replica:
    def __init__(self, api, namespace: str, identity: str) -> None:
        # A Lease counts whole seconds.
        self.leadership = LeaderElection(api, namespace, LEASE, identity, times=LeaderTimes(3, 0.5, 0.2))
        self.working = asyncio.Event()
        self.task = asyncio.create_task(self.leadership.lead(self._work))

    async def _work(self) -> None:
        self.working.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.working.clear()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def took(replica: Replica, limit: float) -> float:
    """Returns the seconds until this replica leads."""
    clock = asyncio.get_running_loop().time
    begun = clock()
    async with asyncio.timeout(limit):
        await replica.working.wait()
    return clock() - begun


@pytest.fixture
async def replicas(api, namespace):
    started = [Replica(api, namespace, name) for name in ("a", "b")]
    yield started
    for one in started:
        await one.stop()


async def test_a_killed_leader_is_replaced_and_a_released_lease_is_taken_at_once(api, namespace, replicas):
    waiting = {asyncio.ensure_future(one.working.wait()): one for one in replicas}
    done, pending = await asyncio.wait(waiting, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1, "exactly one of two that begin at once"
    for one in pending:
        one.cancel()
    first = waiting[done.pop()]
    (second,) = (one for one in replicas if one is not first)

    await first.stop()
    after = await took(second, 60)
    assert after > 1.5, "the Lease of a holder that was killed is honoured to its end"

    third = Replica(api, namespace, "c")
    replicas.append(third)
    await second.stop()
    await second.leadership.release()
    assert await took(third, 60) < 1.5
