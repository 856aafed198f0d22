"""A machine that sleeps: the wall clock jumps, and the monotonic one by which a loop sleeps does not.

The clocks are injected. A time namespace (time_namespaces(7)) cannot make a wall clock jump.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from bkpool.core import wall_clock
from bkpool.core.worker import GatewayRegistration, Phase, Worker
from support.world import BOB, running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        world.clock.moved = lambda: None  # nothing tells the controller that the clock has moved
        yield world


@pytest.fixture
def short(monkeypatch):
    """Clocks are looked at all the time."""
    monkeypatch.setattr(wall_clock, "LONGEST_SLEEP", 0.01)


@pytest.fixture
async def held(world):
    """The only worker of a pool, with a lease of 15 minutes. The controller has done all that it wants to do now."""
    await world.pool(scaling={"max": 1})
    grant = await world.replicas[0].allocate(ttl=timedelta(minutes=15))
    await world.until(lambda: world.held()[0].status.phase is Phase.ALLOCATED)
    await world.asleep()
    return grant


async def test_after_a_sleep_a_caller_who_waits_gets_the_worker_of_an_expired_lease_at_once(world, held):
    world.clock.sleep(hours=10)
    bobs = await world.replicas[0].allocate(BOB)
    assert bobs.worker.key == held.worker.key


async def test_after_a_sleep_an_expired_lease_ends_although_nobody_waits(short, world, held):
    world.clock.sleep(hours=10)
    await world.until(lambda: not world.held())


async def test_a_sleep_does_not_take_a_worker_from_under_a_gateway(short, world, held):
    """The gateway slept too. It is still registered, and its connections are still open."""
    entry = GatewayRegistration(gateway="g", lease_id=held.worker.held_lease.id, renewed_at=world.clock())
    worker = await world.store.get(Worker, *held.worker.key)
    await world.store.replace_status(worker.with_status(gateways=(entry,)))
    world.clock.sleep(hours=10)
    await world.until(lambda: world.held()[0].status.phase is Phase.DRAINING)
    world.controller.look_again()
    await world.asleep()
    assert world.held()
    world.clock.advance(seconds=61)
    await world.until(lambda: not world.held())


async def test_a_clock_that_is_set_back_delays_no_end_of_a_registration(short, world, held):
    entry = GatewayRegistration(gateway="g", lease_id=held.worker.held_lease.id, renewed_at=world.clock())
    worker = await world.store.get(Worker, *held.worker.key)
    await world.store.replace_status(worker.with_status(gateways=(entry,)))
    await world.replicas[0].leases.release(held.token)
    await world.until(lambda: world.held()[0].status.phase is Phase.DRAINING)
    await world.asleep()
    world.clock.sleep(hours=-5)
    world.clock.advance(seconds=61)
    await world.until(lambda: not world.held())
