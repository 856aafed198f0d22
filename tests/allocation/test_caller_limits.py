"""Limits of a pool: what is counted, what is refused, and that nothing is kept for ever."""

import asyncio

import pytest

from bkpool.allocation import CallerLimits
from bkpool.core.errors import NoCapacity
from bkpool.core.live_leases import LiveLeases
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from support.objects import NOW, indexed, lease, worker
from support.world import ANN, BOB, POOL


class Time:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def limits(time):
    return CallerLimits(time)


def pool(**limits):
    return Pool(metadata=Metadata(name="p"), spec=PoolSpec.model_validate({"auth": {"limits": limits}}))


def ask(limits, pool, caller=ANN, request=None):
    with limits.one_more(pool, caller, request or object(), LiveLeases(), at=NOW):
        pass


def refused(limits, pool, caller=ANN):
    with pytest.raises(NoCapacity) as caught:
        ask(limits, pool, caller)
    assert (caught.value.code, caught.value.status) == ("LimitReached", 429)
    return caught.value


def test_exactly_the_allowed_requests_of_a_minute_are_admitted(limits, time):
    three = pool(identity={"perMinute": 3})
    for _ in range(3):
        ask(limits, three)
        time.now += 10
    error = refused(limits, three)
    assert error.retry_after == 30, "the first of the three leaves the window then"
    assert error.field == "spec.auth.limits.identity.perMinute"
    assert "ann may ask 3 times a minute" in error.message
    ask(limits, three, BOB)
    time.now += 29.9
    assert refused(limits, three).retry_after == 1
    time.now += 0.1
    ask(limits, three)
    refused(limits, three)


def test_a_refused_request_does_not_count(limits, time):
    one = pool(identity={"perMinute": 1})
    ask(limits, one)
    for _ in range(100):
        refused(limits, one)
        time.now += 0.5
    time.now += 10
    ask(limits, one)


def test_a_pools_limit_is_for_all_callers_together(limits):
    two = pool(pool={"perMinute": 2})
    ask(limits, two, ANN)
    ask(limits, two, BOB)
    assert "all callers of p together may ask 2 times" in refused(limits, two).message


def test_a_lowered_limit_has_an_effect_at_once(limits, time):
    for _ in range(3):
        ask(limits, pool(identity={"perMinute": 3}))
        time.now += 10
    assert refused(limits, pool(identity={"perMinute": 1})).retry_after == 50, "when the last of them has left"


def test_a_request_and_its_repetitions_count_once_until_the_last_ends(limits):
    one = pool(identity={"leases": 1, "perMinute": 1})
    first, again = (limits.one_more(one, ANN, "job", LiveLeases(), at=NOW) for _ in range(2))
    first.__enter__()
    again.__enter__()
    first.__exit__(None, None, None)
    assert "has or waits for 1" in refused(limits, one).message
    again.__exit__(None, None, None)


def test_a_lease_that_is_stored_while_its_request_is_open_counts_once(limits):
    held = indexed([worker(0, lease(id="i", holder=ANN.digest))]).leases
    two = pool(identity={"leases": 2}, pool={"leases": 2})
    with limits.one_more(two, ANN, "a", LiveLeases(), at=NOW) as claiming:
        claiming("i")
        with limits.one_more(two, ANN, "b", held, at=NOW), pytest.raises(NoCapacity):
            limits.one_more(two, ANN, "c", LiveLeases(), at=NOW).__enter__()
    with pytest.raises(NoCapacity):
        limits.one_more(pool(identity={"leases": 1}), ANN, "b", held, at=NOW).__enter__()


def test_accounts_of_inactive_callers_are_dropped(limits, time):
    some = pool(identity={"perMinute": 5})
    for number in range(1000):
        ask(limits, some, type(ANN)(f"caller-{number}"))
    time.now += 61
    ask(limits, some)
    assert len(limits._accounts) == 2, "the last caller's, and the pool's"


async def test_leases_and_open_requests_are_counted_together(world):
    await world.pool(scaling={"max": 5}, auth={"limits": {"identity": {"leases": 2}, "pool": {"leases": 3}}})
    api = world.replicas[0]
    first = await api.allocate()
    world.runtime.may_start.clear()
    second = asyncio.create_task(api.allocate(job_id="j"))
    await world.until(lambda: len(world.held()) == 2)
    with pytest.raises(NoCapacity, match=r"identity\.leases: ann may have 2 leases at once, and has or waits for 2"):
        await api.allocate()
    again = asyncio.create_task(api.allocate(job_id="j"))
    world.runtime.may_start.set()
    assert (await again).token == (await second).token, "a repeated job finds its lease"
    await api.allocate(BOB)
    with pytest.raises(NoCapacity, match=r"pool\.leases: all callers of p together may have 3"):
        await api.allocate(BOB)
    await api.leases.release(first.token)
    await api.allocate(ANN)


async def test_a_waiting_request_counts(world):
    await world.pool(scaling={"max": 1}, auth={"limits": {"identity": {"leases": 1}}})
    api = world.replicas[0]
    held = await api.allocate(BOB)
    waiting = asyncio.create_task(api.allocate(ANN))
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    with pytest.raises(NoCapacity, match="ann may have 1"):
        await api.allocate(ANN)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    again = asyncio.create_task(api.allocate(ANN))
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    await api.leases.release(held.token)
    await again
