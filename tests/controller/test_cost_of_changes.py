"""The controller looks at what has changed or is due, and at nothing else (rule 16, docs/rules.md#r16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bkpool.controller.pool_states import CHECK_INTERVAL, PoolStates
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_state import PoolState, Spec
from bkpool.core.wall_clock import ClockReading
from bkpool.core.worker import Phase
from bkpool.store import WatchEvent
from bkpool.store.mirror import Mirror
from support.no_store import NoStore
from support.objects import NOW, lease, pool, worker
from support.world import POOL, MemoryWorkers, running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        yield world


async def test_a_lease_of_one_pool_makes_it_look_at_no_other(world, monkeypatch):
    for name in ("p", *(f"other-{number}" for number in range(10))):
        await world.pool(name, scaling={"min": 1, "max": 2})
    await world.until(lambda: len(idle_workers(world)) == 11)
    await world.asleep()
    planned: list[Key] = []
    plan = PoolState.plan

    def noted(state, moment):
        planned.append(state.pool.key)
        return plan(state, moment)

    monkeypatch.setattr(PoolState, "plan", noted)
    grant = await world.replicas[0].allocate()
    await world.replicas[0].leases.release(grant.token)
    await world.until(lambda: not world.held())
    assert set(planned) == {POOL}


async def test_a_report_that_is_lost_is_made_good(world):
    """Nothing says that the daemon has ended."""
    await world.pool(scaling={"min": 1, "max": 1})
    slot = Slot(*POOL, 0)
    await world.until(lambda: idle_workers(world))
    world.runtime.daemons[slot] = replace(world.runtime.daemons[slot], state=DaemonState.EXITED, message="killed")
    world.clock.moved = world.controller.check_clock
    world.clock.advance(seconds=CHECK_INTERVAL.total_seconds())
    await world.until(lambda: "killed" in next(iter(world.replicas[0].mirror.workers.values())).status.message)


async def test_nothing_is_looked_at_again_for_a_pool_that_is_gone(world):
    pool = await world.pool(scaling={"min": 2, "max": 2})
    await world.until(lambda: len(idle_workers(world)) == 2)
    await world.store.delete(Pool, *pool.key)
    await world.until(lambda: not world.replicas[0].mirror.workers and not world.runtime.daemons)
    for slot in list(world.runtime.cache_owners):
        del world.runtime.cache_owners[slot]
        world.runtime.changed(slot)
    await world.asleep()
    assert world.controller._states.due_at is None
    assert not world.controller._states._states


def test_a_pool_that_was_deleted_may_have_been_created_again_when_it_has_a_worker_again():
    """Its cache is still there. Another replica leases a worker, and this mirror sees it before the pool."""
    store: Any = NoStore()
    mirror, runtime = Mirror(store), MemoryWorkers()
    reading = ClockReading(NOW, 0)
    states = PoolStates(mirror, runtime, runtime)
    runtime.cache_owners[Slot(*POOL, 0)] = "owner-a"
    first = worker(0)
    mirror.apply(first)
    states.follow(lambda: None)
    assert states.take_over(reading)[POOL].spec is Spec.MISSING
    states.pool_deleted(pool().but(metadata=pool().metadata.but(deletion_timestamp=NOW)))
    assert states.take_over(reading)[POOL].spec is Spec.KNOWN
    mirror._workers.event(WatchEvent("DELETED", first.but(metadata=first.metadata.but(resource_version="2"))))
    states.take_over(reading)
    again = worker(0, lease())
    mirror.apply(again.but(metadata=again.metadata.but(uid="another", resource_version="3")))
    assert states.take_over(reading)[POOL].spec is Spec.MISSING, "the store must be asked about it"


def idle_workers(world):
    return [w for w in world.replicas[0].mirror.workers.values() if w.status.phase is Phase.IDLE]
