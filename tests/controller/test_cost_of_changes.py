"""The controller looks at what has changed or is due, and at nothing else (rule 16, docs/rules.md#r16)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bkpool.controller.pool_states import CHECK_INTERVAL
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState
from bkpool.core.reconcile.pool_state import PoolState
from bkpool.core.worker import Phase
from support.world import POOL, running_world


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


def idle_workers(world):
    return [w for w in world.replicas[0].mirror.workers.values() if w.status.phase is Phase.IDLE]
