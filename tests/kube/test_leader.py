"""The election with a clock that the test moves, against an API that is a dict with compare-and-swap.

The same against a real API server: e2e/kind/test_leader.py.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from datetime import UTC, datetime

import pytest

from bkpool.core.errors import Conflict, NotFound, Unavailable
from bkpool.kube.leader import LeaderElection, LeaderTimes

DEFAULT = LeaderTimes()


class Time:
    """A clock that the test moves, and a sleep that follows it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, woken))
        await woken

    async def passes(self, seconds: float) -> None:
        until = self.now + seconds
        await settled()
        while due := sorted((at for at, woken in self._sleepers if at <= until and not woken.done())):
            self.now = due[0]
            for _, woken in [sleeper for sleeper in self._sleepers if sleeper[0] <= self.now]:
                if not woken.done():
                    woken.set_result(None)
            self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[0] > self.now]
            await settled()
        self.now = until


async def settled() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


class Api:
    """One Lease."""

    def __init__(self) -> None:
        self.lease = None
        self.version = 0
        self.cut: set[str] = set()
        self.stuck: set[str] = set()
        self.reads: Counter[str] = Counter()

    def of(self, identity: str) -> _View:
        return _View(self, identity)

    @property
    def holder(self) -> str:
        return self.lease["spec"]["holderIdentity"]


class _View:
    def __init__(self, api: Api, identity: str) -> None:
        self._api = api
        self._identity = identity

    async def _reach(self) -> None:
        if self._identity in self._api.stuck:
            await asyncio.Event().wait()
        if self._identity in self._api.cut:
            raise Unavailable("the API server does not answer")

    async def get(self, path):
        self._api.reads[self._identity] += 1
        await self._reach()
        if self._api.lease is None:
            raise NotFound(path)
        return copy.deepcopy(self._api.lease)

    async def create(self, path, body):
        await self._reach()
        if self._api.lease is not None:
            raise Conflict(path)
        return self._store(body)

    async def replace(self, path, body):
        await self._reach()
        if self._api.lease is None:
            raise NotFound(path)
        if body["metadata"]["resourceVersion"] != self._api.lease["metadata"]["resourceVersion"]:
            raise Conflict(path)
        return self._store(body)

    def _store(self, body):
        self._api.version += 1
        self._api.lease = copy.deepcopy(body)
        self._api.lease["metadata"]["resourceVersion"] = str(self._api.version)
        return copy.deepcopy(self._api.lease)


class Replica:
    def __init__(self, api: Api, time: Time, identity: str, times: LeaderTimes) -> None:
        wall = {"now": lambda: datetime(1999 if identity == "a" else 2077, 1, 1, tzinfo=UTC)}  # clocks may be wrong
        self.leadership = LeaderElection(
            api.of(identity), "ns", "lease", identity, clock=time, sleep=time.sleep, times=times, **wall
        )
        self.works = 0
        self.ended: list[float] = []
        self._time = time
        self.task = asyncio.create_task(self.leadership.lead(self._work))

    async def _work(self) -> None:
        self.works += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.works -= 1
            self.ended.append(self._time.now)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
async def replica(api, time):
    started: list[Replica] = []

    async def start(identity: str, times: LeaderTimes = DEFAULT) -> Replica:
        started.append(Replica(api, time, identity, times))
        await settled()
        return started[-1]

    yield start
    for one in started:
        await one.stop()


async def test_the_leader_works_and_the_other_waits_while_the_lease_is_renewed(api, time, replica):
    a, b = await replica("a"), await replica("b")
    await time.passes(3600)

    assert (a.works, b.works) == (1, 0)
    assert a.leadership.leading
    assert not b.leadership.leading
    assert api.lease["spec"]["leaseTransitions"] == 0


async def test_the_work_ends_before_another_begins_when_the_leader_cannot_reach_the_server(api, time, replica):
    for how in (api.cut, api.stuck):
        api.lease = None
        a, b = await replica("a"), await replica("b")
        await time.passes(7)
        how.add("a")
        lost = time.now

        await time.passes(10)
        assert (a.works, b.works) == (0, 0), "the leader stops without a request that succeeds"
        assert a.ended[-1] - lost <= 10
        await time.passes(10)
        assert (a.works, b.works, api.holder) == (0, 1, "b")
        how.clear()
        await a.stop()
        await b.stop()


async def test_a_longer_lease_outlives_a_longer_outage(api, time, replica):
    times = LeaderTimes.of(60)
    a, b = await replica("a", times), await replica("b", times)
    assert api.lease["spec"]["leaseDurationSeconds"] == 60
    await time.passes(20)
    api.cut.add("a")
    await time.passes(39)
    assert (a.works, b.works) == (1, 0)
    await time.passes(1)
    assert (a.works, b.works) == (0, 0), "40 s after the last renewal"
    await time.passes(22)
    assert (a.works, b.works) == (0, 1), "60 s after it, and one attempt later"


def test_the_times_follow_from_the_duration():
    assert LeaderTimes.of(15) == DEFAULT
    assert LeaderTimes.of(60) == LeaderTimes(60, 20, 2)
    assert LeaderTimes.of(7.5) == LeaderTimes(7.5, 2.5, 1)


async def test_a_short_outage_does_not_end_the_leadership(api, time, replica):
    a, b = await replica("a"), await replica("b")
    await time.passes(5)
    api.cut.update("ab")
    await time.passes(8)
    api.cut.clear()
    await time.passes(60)

    assert (a.works, a.ended, b.works) == (1, [], 0)


async def test_a_killed_leader_is_replaced_after_the_duration_and_not_before(api, time, replica):
    a, b = await replica("a"), await replica("b")
    await time.passes(6)
    await a.stop()

    await time.passes(13)
    assert b.works == 0, "the last renewal was seen a second after it was made"
    await time.passes(4)
    assert (b.works, api.lease["spec"]["leaseTransitions"]) == (1, 1)


async def test_a_released_lease_is_taken_at_the_next_attempt(api, time, replica):
    a, b = await replica("a"), await replica("b")
    await time.passes(6)
    with pytest.raises(RuntimeError):
        await a.leadership.release()
    await a.stop()
    await a.leadership.release()

    await time.passes(2)
    assert (b.works, api.holder) == (1, "b")
    await a.leadership.release()
    assert api.holder == "b", "the Lease of another replica is not given up"


async def test_a_lease_that_another_replica_took_ends_the_work_at_the_next_renewal(api, time, replica):
    a = await replica("a")
    api.lease["spec"]["holderIdentity"] = "somebody"
    api.lease["metadata"]["resourceVersion"] = "77"

    await time.passes(5)
    assert (a.works, a.leadership.leading) == (0, False)
    await time.passes(17)
    assert a.works == 1, "it was never renewed"


async def test_of_many_replicas_that_start_at_once_one_leads(api, time, replica):
    many = [await replica(name) for name in "abcdefgh"]
    await time.passes(60)
    assert sum(one.works for one in many) == 1


async def test_a_renewal_reads_nothing(api, time, replica):
    leader = await replica("a")
    await time.passes(1)
    assert leader.works == 1
    before, version = api.reads["a"], api.version
    await time.passes(60)
    assert api.reads["a"] == before
    assert api.version == version + 12, "renewed every five seconds"


@pytest.mark.parametrize("deleted", [False, True])
async def test_a_lease_that_somebody_has_edited_or_deleted_is_still_renewed(api, time, replica, deleted):
    leader = await replica("a")
    await time.passes(1)
    api.version += 1
    if deleted:
        api.lease = None
    else:
        api.lease["metadata"] |= {"resourceVersion": str(api.version), "labels": {"a": "b"}}
    await time.passes(20)
    assert leader.works == 1
    assert leader.ended == []
    assert api.holder == "a"
    assert deleted or api.lease["metadata"]["labels"] == {"a": "b"}


async def test_an_error_of_the_work_is_raised(api, time):
    async def work() -> None:
        raise ValueError("broken")

    leadership = LeaderElection(api.of("a"), "ns", "lease", "a", clock=time, sleep=time.sleep)
    with pytest.raises(ValueError, match="broken"):
        await leadership.lead(work)
    assert not leadership.leading
