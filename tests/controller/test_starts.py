"""A controller starts few workers at once; leases go first, and the pools have turns (rule 11, docs/rules.md#r11)."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.controller.starts import Starts
from bkpool.core.names import Key, Slot
from bkpool.core.observation import MOST_STARTS
from support.objects import lease
from support.world import running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        yield world


def under_way(world):
    return len(world.controller._starts._under_way)


def idle(world):
    return [one for one in world.replicas[0].mirror.workers.values() if one.status.phase == "Idle"]


async def test_the_workers_of_a_floor_start_a_few_at_a_time_and_all_of_them_start(world):
    world.runtime.may_start.clear()
    began, counts = world.controller._starts.began, list[int]()

    def counted(slot):
        began(slot)
        counts.append(under_way(world))

    world.controller._starts.began = counted
    for name in ("a", "b", "c"):
        await world.pool(name, scaling={"min": 12, "max": 12})
    await world.until(lambda: len(world.replicas[0].mirror.workers) == 36 and under_way(world) == MOST_STARTS)
    world.runtime.may_start.set()
    await world.until(lambda: len(idle(world)) == 36)
    assert len(counts) == 36
    assert max(counts) == MOST_STARTS
    await world.asleep()
    assert under_way(world) == 0
    assert not world.controller._starts._waiting


async def test_a_lease_starts_its_worker_while_the_floor_waits(world):
    world.runtime.may_start.clear()
    await world.pool("p", scaling={"min": 20, "max": 20})
    await world.until(lambda: len(world.replicas[0].mirror.workers) == 20 and under_way(world) == MOST_STARTS)
    waiting = next(
        one for one in world.replicas[0].mirror.workers.values() if one.slot not in world.controller._restarting
    )
    await world.store.replace(waiting.with_lease(lease(owner="owner-a", now=world.clock.now)))
    await world.until(lambda: waiting.slot in world.controller._restarting)
    assert under_way(world) == MOST_STARTS + 1
    world.runtime.may_start.set()


async def test_pools_have_turns_and_a_start_that_takes_long_does_not_count():
    asked: list[str] = []
    ended = asyncio.Event()

    def look_again(pool):
        asked.append(pool.name)
        ended.set()

    starts = Starts(2, look_again, counts_for=0.01)
    a, b = Key("n", "a"), Key("n", "b")
    for number in range(2):
        starts.began(Slot("n", "a", number))
    starts.planned(a, begun=2, wanted=5)
    starts.planned(b, begun=0, wanted=1)
    assert starts.left == 0
    await ended.wait()
    assert asked[0] == "a", "it has waited longest"
    starts.planned(a, begun=1, wanted=3)
    asked.clear()
    starts.planned(b, begun=1, wanted=1)
    assert asked, "a pool that wants no more gives its turn to the next one"
    assert set(asked) == {"a"}
    starts.close()
