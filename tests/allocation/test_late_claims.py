"""A claim whose answer is late: its caller has gone, and another request of the same job has its lease by then."""

import asyncio

import pytest

from bkpool.allocation import Delivery
from bkpool.core.errors import Unavailable
from bkpool.core.names import Key
from bkpool.core.worker import Worker
from support.world import TAKEN

POOL = Key("default", "p")


class LateAnswer:
    """The first write of this kind is carried out, and its answer comes when it may.

    Args:
        race: Has the store.
        monkeypatch: Puts this in.
        write: The name of the write.
    """

    def __init__(self, race, monkeypatch, write):
        self.written = asyncio.Event()
        self.may_come = asyncio.Event()
        self._write = getattr(race.store, write)
        monkeypatch.setattr(race.store, write, self.call)

    async def call(self, worker):
        answer = await self._write(worker)
        if not self.written.is_set():
            self.written.set()
            await self.may_come.wait()
        return answer


class Unread:
    """The receipt of an answer that its caller's side has, and perhaps nobody has read."""

    def delivery(self):
        return Delivery.UNKNOWN


@pytest.fixture
async def late(race, monkeypatch):
    """The claim of a caller who goes away before its answer has come."""
    answer = LateAnswer(race, monkeypatch, "replace")
    first = asyncio.create_task(race.replicas[0].ask(POOL, "j").__aenter__())
    await answer.written.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    yield answer
    answer.may_come.set()


async def current(race, worker):
    return (await race.store.get(Worker, *worker.key)).held_lease


@pytest.mark.parametrize("receipt", [TAKEN, Unread()])
async def test_a_lease_that_another_request_was_answered_with_does_not_end(race, late, receipt):
    one = race.replicas[0]
    async with one.ask(POOL, "j") as offer:
        offer.answered(receipt)
    if receipt is not TAKEN:
        while one.allocator._deliveries._answers:  # noqa: ASYNC110 - it is asked what became of it
            await asyncio.sleep(0)
    late.may_come.set()
    await race.quiet(one)
    assert (await current(race, offer.grant.worker)).ended_at is None


async def test_a_lease_that_another_request_is_being_answered_with_does_not_end(race, late):
    one = race.replicas[0]
    async with one.ask(POOL, "j") as offer:
        late.may_come.set()
        await race.quiet(one)
        assert (await current(race, offer.grant.worker)).ended_at is None
        offer.answered(TAKEN)


async def test_a_lease_that_nobody_waits_for_ends_when_the_answer_comes(race, late):
    one = race.replicas[0]
    with pytest.raises(RuntimeError):
        async with one.ask(POOL, "j") as offer:
            raise RuntimeError
    await asyncio.sleep(0)
    assert not one.allocator._abandoner._ending
    assert (await current(race, offer.grant.worker)).ended_at is None, "the claim counts until its answer has come"
    late.may_come.set()
    await race.quiet(one)
    assert (await current(race, offer.grant.worker)).ended_at is not None


async def test_a_connected_lease_is_not_given_up(race):
    """Its caller has it, although their answer seemed to be lost. The replica learns that from the store only."""
    one = race.replicas[0]
    async with one.ask(POOL, "j") as offer:
        worker = offer.grant.worker
        await race.store.replace_status(worker.with_status(connected_lease=worker.held_lease.id))
        one.allocator._abandoner.abandon(worker)
        await race.quiet(one)
        assert (await current(race, worker)).ended_at is None
        offer.answered(TAKEN)


async def test_a_lease_of_a_new_worker_whose_token_could_not_be_written_does_not_end_if_another_request_has_it(
    race, monkeypatch
):
    one = race.replicas[0]
    for worker in (await race.store.list(Worker)).items:
        await race.store.delete(Worker, *worker.key)
    while one.mirror.workers:  # noqa: ASYNC110 - the watch shows that
        await asyncio.sleep(0)
    writing, may_fail, change = asyncio.Event(), asyncio.Event(), one.leases.change

    async def fails_once(*args):
        if writing.is_set():
            return await change(*args)
        writing.set()
        await may_fail.wait()
        raise Unavailable("the store is away")

    monkeypatch.setattr(one.leases, "change", fails_once)
    first = asyncio.create_task(one.ask(POOL, "j").__aenter__())
    await writing.wait()
    second = asyncio.create_task(one.ask(POOL, "j").__aenter__())
    counted = one.allocator._deliveries._requests._leases
    while sum(lease.requests for lease in counted.values()) < 2:  # noqa: ASYNC110 - the second one joins
        await asyncio.sleep(0)
    may_fail.set()
    with pytest.raises(Unavailable):
        await first
    await race.quiet(one)
    (worker,) = (await race.store.list(Worker)).items
    assert worker.held_lease.ended_at is None
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    await race.quiet(one)
    (worker,) = (await race.store.list(Worker)).items
    assert worker.held_lease.ended_at is not None
