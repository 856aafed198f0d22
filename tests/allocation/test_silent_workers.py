"""Workers that do not answer are given to nobody, also where the store still says that they are ready."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from bkpool.core.errors import Conflict, NoCapacity
from bkpool.core.names import Slot
from bkpool.core.worker import EndReason, GatewayRegistration, Phase, Worker
from support.world import ANN, POOL

FIRST = Slot(*POOL, 0)


def idle(world):
    return [w for w in world.replicas[0].mirror.workers.values() if w.status.phase is Phase.IDLE and not w.lease]


async def idle_worker(world, count=1, **spec):
    await world.pool(scaling={"min": count, "max": count, "scaleDownDelay": "1h"}, **spec)
    await world.until(lambda: len(idle(world)) == count)


def current(world) -> Worker:
    return world.replicas[0].mirror.workers[FIRST.worker]


async def test_a_request_gets_another_worker_than_the_one_that_hangs_though_that_was_used_last(world):
    await idle_worker(world, 2, cache={"reuse": "identity"}, auth={"limits": {"identity": {"leases": 2}}})
    replica = world.replicas[0]
    grant = await replica.allocate(ANN)
    hung = grant.worker.slot
    await replica.leases.release(grant.token)
    await world.until(lambda: len(idle(world)) == 2)
    world.runtime.hung.add(hung)
    other = await replica.allocate(ANN)
    assert other.worker.slot != hung
    assert replica.mirror.workers[hung.worker].status.silent_since is not None, "every replica knows"
    with pytest.raises(NoCapacity):
        await replica.allocate(ANN, wait=0.2)
    world.runtime.go_on(hung)
    assert (await replica.allocate(ANN)).worker.slot == hung, "it answers again"


async def test_a_waiting_request_gets_the_worker_that_replaces_one_that_hung(world):
    await idle_worker(world)
    world.runtime.hang(FIRST, 1.0)
    await world.until(lambda: current(world).status.silent_since)
    waiting = asyncio.create_task(world.replicas[0].allocate(ANN))
    await world.until(lambda: world.replicas[0].allocator.waiting(POOL) == 1)
    world.runtime.hang(FIRST, 9.0)
    world.clock.advance(seconds=1)
    await world.until(lambda: current(world).status.failures == 1)
    world.clock.advance(seconds=1)
    grant = await waiting
    assert world.runtime.stopped_at_once == [FIRST]
    assert grant.worker.held_lease.requested_by == "ann"


async def test_a_worker_of_a_former_life_is_asked_before_a_lease_on_it_is_answered(world):
    """Nothing runs there any more, and the controller has not looked yet: the caller waits until it runs again."""
    await idle_worker(world)
    world.runtime.may_start.clear()
    del world.runtime.daemons[FIRST]  # without a word: a machine that was started again
    waiting = asyncio.create_task(world.replicas[0].allocate(ANN))
    await world.until(lambda: FIRST in world.runtime.asked)
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    world.runtime.may_start.set()
    grant = await waiting
    assert world.runtime.daemons[FIRST].worker_uid == grant.worker.uid


async def test_the_lease_of_a_worker_that_hangs_goes_on_and_bytes_of_it_put_its_end_off(world):
    await idle_worker(world)
    grant = await world.replicas[0].allocate(ANN)
    registered = GatewayRegistration(gateway="g", lease_id=grant.worker.held_lease.id, renewed_at=world.clock())
    await world.until(lambda: current(world).status.phase is Phase.ALLOCATED)
    await world.store.replace_status(current(world).with_status(gateways=(registered,)))
    await world.until(lambda: current(world).status.gateways)
    world.runtime.hang(FIRST, 9.0)
    await world.until(lambda: current(world).status.silent_since)
    began = current(world).status.silent_since
    world.clock.advance(seconds=14)
    await world.store.replace_status(current(world).noted_answering())  # a gateway has got a byte
    await world.until(lambda: current(world).status.silent_since == began + timedelta(seconds=14))
    world.clock.advance(seconds=14)
    assert current(world).status.failures == 0
    world.clock.advance(seconds=1)
    await world.until(lambda: current(world).status.failures == 1)
    assert current(world).status.message == "buildkitd has not answered for 15 s, so it was ended"
    world.clock.advance(seconds=1)
    await world.until(lambda: current(world).status.phase is Phase.ALLOCATED)
    assert current(world).held_lease.id == grant.worker.held_lease.id
    assert current(world).held_lease.end_reason is None


async def test_a_byte_that_comes_while_the_end_is_decided_saves_the_worker(world):
    await idle_worker(world)
    decided_on = current(world).noted_silent(world.clock())
    written = await world.store.replace_status(decided_on)
    await world.store.replace_status(written.noted_answering())  # by a gateway
    with pytest.raises(Conflict):
        await world.controller._replace_daemon(decided_on, "it hangs")
    assert world.runtime.stopped_at_once == []
    assert FIRST in world.runtime.daemons


async def test_six_kills_of_a_floor_worker_do_not_end_the_lease_of_the_next_tenant(world):
    await idle_worker(world)
    for number in range(1, 7):
        await world.until(lambda: FIRST in world.runtime.daemons and idle(world))
        world.runtime.may_start.clear()
        world.runtime.die(FIRST)
        await world.until(lambda number=number: current(world).status.failures == number)
        world.clock.advance(minutes=2)
        if number < 6:
            world.runtime.may_start.set()
    waiting = asyncio.create_task(world.replicas[0].allocate(ANN))
    await world.until(lambda: current(world).lease)
    world.runtime.may_start.set()
    grant = await waiting
    assert grant.worker.held_lease.end_reason is not EndReason.LOST
    assert current(world).status.failures_of in {"", grant.worker.held_lease.id}
