"""Leases from their claim until a caller has them: marks, renewals, and what a killed replica leaves."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from bkpool.allocation import AllocationRequest, Delivery
from bkpool.allocation.deliveries import MARK_DELAY
from bkpool.core.durations import parse
from bkpool.core.errors import Unavailable
from bkpool.core.pool import PoolGateway
from bkpool.core.reconcile.undelivered import LONGEST_STEP
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import UNDELIVERED_LIFE, EndReason, Lease, Worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.session.lease_table import leases_of
from support.world import ANN, POOL, WAIT, Replica, World, running_world

NO_LIMITS = {"limits": {"identity": {"leases": 1000, "waiters": 1000}}}


class Fate:
    """A receipt whose result the test sets."""

    def __init__(self, delivery: Delivery = Delivery.ON_ITS_WAY) -> None:
        self.now = delivery

    def delivery(self) -> Delivery:
        return self.now


async def answered(api: Replica, fate: Fate, **request):
    """Leases a worker and answers; what becomes of the answer is up to the fate."""
    async with api.allocator.offer(ANN, AllocationRequest(POOL, parse("60s"), **request)) as offer:
        offer.answered(fate)
    return offer.grant


async def time_passes(world: World, steps: int = UNDELIVERED_LIFE // LONGEST_STEP + 2) -> None:
    def looks() -> float:
        return world.registry.get_sample_value("buildkit_controller_decisions_total") or 0

    for _ in range(steps):
        before = looks()
        world.clock.advance(seconds=LONGEST_STEP.total_seconds())
        await world.until(lambda before=before: looks() > before)


async def settled(world: World) -> None:
    """The replica has seen what became of its answers. It renews no lease from here on."""
    await world.until(lambda: len(world.replicas[0].allocator._deliveries) == 0)


def live(world: World) -> list[Lease]:
    return [w.held_lease for w in world.held() if w.held_lease.ended_at is None]


@asynccontextmanager
async def killed(api: Replica):
    """From here on this replica writes nothing: as after kill -9."""

    async def nothing(*_args: object) -> None:
        await asyncio.Event().wait()

    api.leases.change = nothing
    yield


async def test_a_lease_says_that_nobody_has_it_until_its_answer_is_taken(world):
    await world.pool()
    fate = Fate()
    await answered(world.replicas[0], fate)
    assert live(world)[0].undelivered is not None
    fate.now = Delivery.TAKEN
    await world.until(lambda: live(world)[0].undelivered is None)
    await time_passes(world)
    assert len(live(world)) == 1


async def test_a_lease_whose_answer_is_lost_ends_at_once(world):
    await world.pool()
    fate = Fate()
    await answered(world.replicas[0], fate)
    fate.now = Delivery.LOST
    await world.until(lambda: not live(world))


async def test_a_lease_whose_answer_may_not_have_been_read_ends_if_nobody_uses_it(world):
    await world.pool()
    await answered(world.replicas[0], Fate(Delivery.UNKNOWN))
    await settled(world)
    await time_passes(world, 2)
    assert len(live(world)) == 1
    await time_passes(world)
    await world.until(lambda: not live(world))


async def test_who_breaks_the_connection_soon_after_the_answer_may_not_have_read_it(world):
    await world.pool()
    fate = Fate()
    looks = iter([Delivery.ON_ITS_WAY, Delivery.TAKEN, Delivery.TAKEN])
    fate.delivery = lambda: next(looks, Delivery.UNKNOWN)
    await answered(world.replicas[0], fate)
    await settled(world)
    await time_passes(world)
    await world.until(lambda: not live(world))


async def test_marks_that_wait_share_a_transaction(world):
    world.moment = 0.02  # it looks at answers 600 times: they must not be given up before all workers are allocated
    await world.pool(scaling={"min": 12, "max": 12}, auth=NO_LIMITS)
    await world.until(lambda: sum(w.lease is None for w in world.replicas[0].mirror.workers.values()) == 12)
    fate, writer, sizes = Fate(), world.store._writer, []
    held, may_go_on = threading.Event(), threading.Event()
    await asyncio.gather(*(answered(world.replicas[0], fate) for _ in range(12)))
    await world.until(lambda: all(w.status.phase.value == "Allocated" for w in world.held()))
    deliveries = world.replicas[0].allocator._deliveries  # those of one look are written together
    await world.until(lambda: all(deliveries._waited - one.sent_at >= MARK_DELAY for one in deliveries._answers))
    transaction = writer._transaction

    def counted(jobs):
        sizes.append(len(jobs))
        return transaction(jobs)

    def hold(_tables):
        held.set()
        assert may_go_on.wait(WAIT)

    writer._transaction = counted
    holding = asyncio.create_task(writer.run(hold))
    await world.until(held.is_set)
    fate.now = Delivery.TAKEN
    try:
        await world.until(lambda: writer._queue.qsize() >= 12)
    finally:
        may_go_on.set()
    await holding
    await world.until(lambda: all(lease.undelivered is None for lease in live(world)))
    assert max(sizes) >= 12, sizes


async def test_what_a_killed_appliance_had_not_answered_ends_and_the_rest_goes_on(tmp_path):
    async with running_world(tmp_path) as world:
        await world.pool(scaling={"max": 6}, auth=NO_LIMITS)
        api = world.replicas[0]
        grants = [await answered(api, Fate()) for _ in range(5)]
        kept = await api.allocate()
        renewed, looked_up, connected, old, lost = grants
        async with killed(api):
            pass
    async with running_world(tmp_path) as world:
        api = world.replicas[0]
        await world.until(lambda: len(live(world)) == 6)

        async def anybody(_worker, _pool):
            pass

        await api.leases.renew(renewed.token, None, anybody)
        await api.leases.lookup(looked_up.token)
        worker = api.mirror.workers[connected.worker.key]
        route = leases_of(worker, PoolGateway()).route
        registry = StoreLeaseRegistry(world.store, "gateway", world.clock, api.mirror.apply)
        await registry.register(route, 1)
        await registry.withdraw(route)
        worker = await world.store.get(type(worker), *old.worker.key)
        doc = worker.to_json()
        del doc["spec"]["allocation"]["undelivered"]  # as an earlier version wrote it
        await world.store.replace(type(worker).model_validate(doc))
        await time_passes(world)
        await world.until(lambda: len(live(world)) == 5)
        ids = {lease.id for lease in live(world)}
        assert ids == {g.worker.held_lease.id for g in (renewed, looked_up, connected, old, kept)}
        await world.until(lambda: api.mirror.workers[lost.worker.key].ended_leases)
        ended = api.mirror.workers[lost.worker.key].ended_leases[-1]
        assert ended.reason is EndReason.ABANDONED
        assert "did not reach its caller" in ended.message


async def test_the_leases_of_a_killed_replica_end_while_another_goes_on(two_replicas):
    world = two_replicas
    await world.pool(scaling={"max": 3}, auth=NO_LIMITS)
    one, other = world.replicas
    await world.until(lambda: POOL in other.mirror.pools)
    await answered(one, Fate())
    kept = await other.allocate()
    async with killed(one):
        await time_passes(world)
        await world.until(lambda: [lease.id for lease in live(world)] == [kept.worker.held_lease.id])


async def test_a_worker_that_starts_slowly_keeps_the_lease_of_the_request_that_waits(world):
    await world.pool()
    world.runtime.may_start.clear()
    deliveries = world.replicas[0].allocator._deliveries
    pause, pauses = deliveries._pause, []

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await pause(seconds)

    deliveries._pause = noted
    waiting = asyncio.create_task(world.replicas[0].allocate())
    await world.until(lambda: pauses)
    [lease] = live(world)
    for step in range(12):
        await time_passes(world, 1)
        await world.until(lambda step=step: len(pauses) == step + 2)  # the renewal is written
    assert [one.id for one in live(world)] == [lease.id]
    assert live(world)[0].undelivered.renewals > 0
    world.runtime.may_start.set()
    assert (await waiting).worker.held_lease.id == lease.id


async def test_a_job_that_repeats_its_request_after_a_crash_gets_its_lease_and_keeps_it(two_replicas):
    world = two_replicas
    await world.pool()
    one, other = world.replicas
    await world.until(lambda: POOL in other.mirror.pools)
    first = await answered(one, Fate(), job_id="j")
    async with killed(one):
        again = await other.allocate(job_id="j")
        assert again.token == first.token
        await time_passes(world)
        assert len(live(world)) == 1


async def test_a_replica_does_not_end_a_lease_that_another_one_answers_for(two_replicas):
    world = two_replicas
    await world.pool()
    one, other = world.replicas
    await world.until(lambda: POOL in other.mirror.pools)
    fate = Fate()
    first = await answered(one, fate, job_id="j")
    second = await answered(other, Fate(), job_id="j")
    assert first.token == second.token
    fate.now = Delivery.LOST
    await world.until(lambda: len(one.allocator._deliveries) == 0)
    await one.allocator._abandoner.close()
    assert len(live(world)) == 1


async def test_a_job_that_asks_while_its_lease_is_given_up_gets_another_one(world):
    await world.pool()
    api = world.replicas[0]
    change, may_end = api.leases.change, asyncio.Event()

    async def slow(*args):
        if api.allocator._abandoner._ending:
            await may_end.wait()
        return await change(*args)

    api.leases.change = slow
    fate = Fate()
    first = await answered(api, fate, job_id="j")
    fate.now = Delivery.LOST
    await world.until(lambda: api.allocator._abandoner._ending)
    again = asyncio.create_task(answered(api, Fate(Delivery.TAKEN), job_id="j"))
    await asyncio.sleep(0)
    may_end.set()
    assert (await again).token != first.token
    await world.until(lambda: [lease.undelivered for lease in live(world)] == [None])


async def test_a_lease_that_could_not_be_given_up_ends_later(world):
    await world.pool()
    api = world.replicas[0]
    change = api.leases.change
    fate = Fate()
    await answered(api, fate)

    async def away(*_args):
        raise Unavailable("the store is away")

    api.leases.change = away
    fate.now = Delivery.LOST
    await world.until(lambda: len(api.allocator._deliveries) == 0)
    await api.allocator._abandoner.close()
    api.leases.change = change
    await time_passes(world)
    await world.until(lambda: not live(world))


async def test_a_mark_that_cannot_be_written_is_written_later(world):
    await world.pool()
    api = world.replicas[0]
    change, tries = api.leases.change, []

    async def away_once(*args):
        tries.append(args)
        if len(tries) == 1:
            raise Unavailable("the store is away")
        return await change(*args)

    fate = Fate()
    await answered(api, fate)
    api.leases.change = away_once
    fate.now = Delivery.TAKEN
    await world.until(lambda: live(world)[0].undelivered is None)


async def test_a_mark_that_still_cannot_be_written_is_tried_ever_more_seldom(world):
    await world.pool()
    api = world.replicas[0]
    change, tries = api.leases.change, []

    async def away(*_args):
        tries.append(api.allocator._deliveries._waited)
        raise Unavailable("the store is away")

    await answered(api, fate := Fate())
    api.leases.change = away
    fate.now = Delivery.TAKEN
    await world.until(lambda: len(tries) >= 8)
    api.leases.change = change
    pauses = [round(later - earlier) for earlier, later in pairwise(tries)]
    assert pauses[:7] == [1, 2, 4, 8, 16, 32, 60]


async def test_the_mark_of_a_worker_that_cannot_be_read_is_given_up(world):
    await world.pool()
    api, tries = world.replicas[0], []

    async def unreadable(worker, *_args):
        tries.append(1)
        raise UnreadableObject(Unreadable(Worker, worker.key, "spec.ended: cannot be read", {}))

    await answered(api, fate := Fate())
    api.leases.change = unreadable
    fate.now = Delivery.TAKEN
    await world.until(lambda: tries)
    await world.until(lambda: api.allocator._deliveries._marking is None)
    assert (len(tries), api.allocator._deliveries._marks) == (1, {})


async def test_an_end_of_the_process_writes_the_marks_first(world):
    await world.pool()
    api = world.replicas[0]
    world.moment = 60
    await answered(api, Fate(Delivery.TAKEN))
    await api.allocator.close()
    await world.until(lambda: live(world)[0].undelivered is None)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), asyncio.CancelledError()])
async def test_any_error_before_the_answer_gives_the_lease_back(world, error):
    await world.pool()
    with pytest.raises(type(error)):
        async with world.replicas[0].allocator.offer(ANN, AllocationRequest(POOL, parse("60s"))):
            raise error
    await world.until(lambda: not live(world))


async def test_callers_who_go_while_others_are_served_break_nothing(world):
    """A caller's future is cancelled a moment before they leave the queue."""
    await world.pool(scaling={"max": 1}, auth=NO_LIMITS)
    api = world.replicas[0]
    held = await api.allocate()
    goes = asyncio.create_task(api.allocate())
    stays = asyncio.create_task(api.allocate())
    await world.until(lambda: api.allocator.waiting(POOL) == 2)
    await api.leases.release(held.token)
    key = held.worker.key
    while api.mirror.workers[key].lease is not None and api.allocator.waiting(POOL) == 2:
        goes.cancel()
        api.allocator._queues.serve(POOL)
        await asyncio.sleep(0)
    assert (await stays).token
