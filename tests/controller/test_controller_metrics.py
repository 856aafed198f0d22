"""The controller's metrics: decisions, actions by their result, and how far it is behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import get_args

import pytest

from bkpool.controller.metrics import STOP_STRAY, ControllerMetrics, Result, action_name
from bkpool.core.reconcile.actions import Action, StartDaemon
from bkpool.telemetry.registry import new_registry
from support.world import World, running_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path) as world:
        await world.pool(scaling={"max": 1})
        yield world


def actions(world: World, action: str, result: str) -> float | None:
    labels = {"action": action, "result": result}
    return world.registry.get_sample_value("buildkit_controller_actions_total", labels)


async def test_actions_are_counted_with_their_result(world: World) -> None:
    await world.replicas[0].allocate()
    await world.until(lambda: actions(world, "start_daemon", "done") == 1)
    assert actions(world, "start_daemon", "failed") == 0


async def test_a_worker_that_does_not_start_is_a_failed_action(world: World) -> None:
    world.runtime.failure = "buildkitd ended with exit code 1"
    caller = asyncio.create_task(world.replicas[0].allocate())
    await world.until(lambda: (actions(world, "start_daemon", "failed") or 0) >= 1)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)


async def test_decisions_and_the_lag_behind_changes_are_counted(world: World) -> None:
    await world.until(lambda: world.registry.get_sample_value("buildkit_controller_decisions_total"))
    before = world.registry.get_sample_value("buildkit_controller_lag_seconds_count") or 0
    await world.replicas[0].allocate()
    name = "buildkit_controller_lag_seconds_count"
    await world.until(lambda: (world.registry.get_sample_value(name) or 0) > before)


def test_every_action_and_result_has_a_series_from_the_start() -> None:
    registry = new_registry()
    metrics = ControllerMetrics(registry)
    names = {action_name(kind) for kind in get_args(Action)} | {STOP_STRAY}
    series = {
        (sample.labels["action"], sample.labels["result"])
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "buildkit_controller_actions_total"
    }
    assert series == {(name, result.value) for name in names for result in Result}
    metrics.ended(StartDaemon, Result.CRASHED)
    metrics.ended(None, Result.DONE)
    for action in ("start_daemon", STOP_STRAY):
        result = "crashed" if action == "start_daemon" else "done"
        labels = {"action": action, "result": result}
        assert registry.get_sample_value("buildkit_controller_actions_total", labels) == 1
