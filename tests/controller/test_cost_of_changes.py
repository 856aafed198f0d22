"""The controller looks at what has changed or is due, and at nothing else (rule 16, docs/rules.md#r16)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bkpool.controller.looks import AT_ONCE
from bkpool.controller.pool_states import CHECK_INTERVAL, PoolStates
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState
from bkpool.core.pool import Pool, PoolSpec
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

    def noted(state, *args):
        planned.append(state.pool.key)
        return plan(state, *args)

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


def test_a_large_pool_is_taken_over_in_parts_and_holds_up_no_other():
    store: Any = NoStore()
    mirror, runtime, reading = Mirror(store), MemoryWorkers(), ClockReading(NOW, 0)
    mirror.apply(pool(scaling={"min": 0, "max": 1000}))
    for number in range(3 * AT_ONCE):
        mirror.apply(worker(number))
    states = PoolStates(mirror, runtime, runtime)
    states.follow(lambda: None)
    assert states.take_over(reading)[POOL].taking_over
    states.pool_changed(other := Key("default", "other"))
    rounds: list[set[Key]] = []
    while states.has_more:
        found = states.take_over(reading)
        rounds.append({key for key, state in found.items() if not state.taking_over})
    assert sum(POOL in found for found in rounds) == 1, "once, with all its slots"
    assert other in rounds[0] | rounds[1], "a part of the first pool, and then the other one"
    assert len(rounds) < 5


async def test_one_round_starts_few_actions_and_the_next_ones_go_on(world):
    count = 3 * AT_ONCE
    await world.pool(scaling={"min": count, "max": count, "scaleDownDelay": "0s"})
    await world.until(lambda: len(idle_workers(world)) == count)
    began: list[int] = []
    decide = world.controller._decide

    def counted():
        before = len(world.controller._actions)
        at = decide()
        began.append(len(world.controller._actions) - before)
        return at

    world.controller._decide = counted
    await world.asleep()
    spec = PoolSpec.model_validate({"scaling": {"min": 0, "max": 1}})
    await world.store.replace(world.replicas[0].mirror.pools[POOL].but(spec=spec))
    await world.until(lambda: len(idle_workers(world)) <= 1)
    assert max(began) <= AT_ONCE


def idle_workers(world):
    return [w for w in world.replicas[0].mirror.workers.values() if w.status.phase is Phase.IDLE]
