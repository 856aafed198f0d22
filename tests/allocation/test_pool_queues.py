"""Who waits is served when a claim of another request ends, however it ends, although nothing else changes."""

import asyncio
from functools import partial

import pytest

from bkpool.allocation import pool_queues
from bkpool.core.errors import DiskFull, Unavailable
from bkpool.core.names import Key
from bkpool.core.worker import Worker
from support.job_race import WORKERS
from support.world import TAKEN, skip_real_time

POOL = Key("default", "p")
AWAY = [Unavailable("the store is away"), DiskFull("the disk is full")]


async def lease_of(replica, job=""):
    async with replica.ask(POOL, job) as offer:
        offer.answered(TAKEN)
    return offer.grant


async def keep_free(race, number):
    """Leaves so many workers without a lease. After that nothing changes any more."""
    for job in range(WORKERS - number):
        given = (await lease_of(race.replicas[0], f"other-{job}")).worker
        for replica in race.replicas:
            await race.known_to(replica, given, partial(is_delivered, replica, given))


def is_delivered(replica, given):
    known = replica.mirror.workers[given.key]
    return known.lease is not None and known.undelivered is None


class HeldClaims:
    """The claims that one replica writes: they wait until they may go on, and some fail.

    Args:
        race: Has the replica.
        monkeypatch: Puts this in.
        errors: One for each claim, the first first; None: it succeeds.
    """

    def __init__(self, race, monkeypatch, *errors):
        self.may_go_on = asyncio.Event()
        self.begun = []
        self._errors = iter(errors)
        self._replace = race.store.replace
        self._changed = asyncio.Condition()
        monkeypatch.setattr(race.store, "replace", self.replace)

    async def replace(self, worker):
        if worker.held_lease.undelivered is None or worker.held_lease.ended_at is not None:
            return await self._replace(worker)  # it is no claim
        error = next(self._errors, None)
        async with self._changed:
            self.begun.append(worker.key)
            self._changed.notify_all()
        await self.may_go_on.wait()
        if error is not None:
            raise error
        return await self._replace(worker)

    async def until(self, number):
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.begun) >= number)


async def until_waiting(replica, number):
    while replica.allocator.waiting(POOL) < number:  # noqa: ASYNC110 - it takes some turns of the loop
        await asyncio.sleep(0)


@pytest.fixture
def claims_of(race, monkeypatch):
    """Makes `HeldClaims`. At the end of the test none waits any more."""
    made = []

    def make(*errors):
        made.append(HeldClaims(race, monkeypatch, *errors))
        return made[-1]

    yield make
    for claims in made:
        claims.may_go_on.set()


@pytest.mark.parametrize("error", AWAY)
@pytest.mark.parametrize(("job", "free"), [("j", 2), ("", 1)])
async def test_a_request_is_served_after_the_claim_of_another_has_failed(race, claims_of, error, job, free):
    await keep_free(race, free)
    one = race.replicas[0]
    claims = claims_of(error)
    first = asyncio.create_task(lease_of(one, job))
    await claims.until(1)
    second = asyncio.create_task(lease_of(one, job))
    await until_waiting(one, 1)
    claims.may_go_on.set()
    with pytest.raises(type(error)):
        await first
    assert (await second).token


@pytest.mark.parametrize("error", AWAY)
@pytest.mark.parametrize(("job", "free"), [("j", 2), ("", 1)])
async def test_a_request_is_served_after_the_caller_of_a_claim_has_gone_and_it_fails(
    race, claims_of, error, job, free
):
    await keep_free(race, free)
    one = race.replicas[0]
    claims = claims_of(error)
    first = asyncio.create_task(lease_of(one, job))
    await claims.until(1)
    second = asyncio.create_task(lease_of(one, job))
    await until_waiting(one, 1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(claims.begun) == 1, "nothing is claimed beside a claim that is being written"
    claims.may_go_on.set()
    assert (await second).token


async def test_a_request_is_served_after_the_worker_of_another_did_not_answer(race, monkeypatch):
    """The store does not write either that it is silent."""
    await keep_free(race, 1)
    one = race.replicas[0]
    asked, answer = asyncio.Event(), asyncio.Event()

    async def away(_slot, _uid):
        asked.set()
        await answer.wait()
        monkeypatch.undo()
        raise Unavailable("the store is away")

    monkeypatch.setattr(one.allocator._presence, "_answers", away)
    first = asyncio.create_task(lease_of(one))
    await asked.wait()
    second = asyncio.create_task(lease_of(one))
    await until_waiting(one, 1)
    answer.set()
    with pytest.raises(Unavailable):
        await first
    assert (await second).token


async def test_a_request_is_served_after_another_went_away_that_had_been_given_a_worker(race):
    await keep_free(race, 0)
    one = race.replicas[0]
    first = asyncio.create_task(lease_of(one))
    await until_waiting(one, 1)
    second = asyncio.create_task(lease_of(one))
    await until_waiting(one, 2)
    # When its turn has come it goes away, before it has seen that.
    one.mirror.subscribe(lambda _change: first.cancel() if one.allocator.waiting(POOL) == 1 else None)
    held = next(worker for worker in (await race.store.list(Worker)).items if worker.undelivered is None)
    await race._take_lease_off(held)
    assert (await second).token
    assert first.cancelled()


async def test_a_store_that_is_away_refuses_those_who_wait_one_by_one_and_not_all_in_a_moment(
    race, claims_of, monkeypatch
):
    await keep_free(race, 1)
    one = race.replicas[0]
    pauses = []
    claims = claims_of(*[Unavailable("the store is away")] * 8)
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(seconds, callback, *args):
        if getattr(callback, "__func__", None) is pool_queues.PoolQueues._due:
            pauses.append(seconds)
            seconds = 0
        return call_later(seconds, callback, *args)

    monkeypatch.setattr(loop, "call_later", noted)
    waiting = [asyncio.create_task(lease_of(one)) for _ in range(10)]
    await claims.until(1)
    await until_waiting(one, 9)
    claims.may_go_on.set()
    ended = await asyncio.gather(*waiting[:9], return_exceptions=True)
    assert [type(result) for result in ended[:8]] == [Unavailable] * 8
    assert len(claims.begun) == 9
    assert pauses[:8] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    waiting[9].cancel()
    await asyncio.gather(waiting[9], return_exceptions=True)


async def test_the_reason_of_a_request_that_waits_for_the_claim_of_its_job_is_the_store(race, claims_of):
    one = race.replicas[0]
    claims = claims_of()
    first = asyncio.create_task(lease_of(one, "j"))
    await claims.until(1)
    second = asyncio.create_task(lease_of(one, "j"))
    await until_waiting(one, 1)
    skip_real_time()
    for request in (first, second):
        with pytest.raises(Unavailable, match="has a free worker, but the store did not write the lease"):
            await request
