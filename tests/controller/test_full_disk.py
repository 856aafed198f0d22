"""A worker that does not start because the disk is full has not failed. Its lease goes on until there is room."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.allocation import abandoning
from bkpool.controller import controller
from bkpool.core.errors import DiskFull
from bkpool.core.worker import Worker
from support.world import running_world


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(controller, "PAUSE", 0.001)
    monkeypatch.setattr(abandoning, "ABANDON_INTERVAL", 0.001)
    async with running_world(tmp_path) as world:
        await world.pool(scaling={"max": 1})
        yield world


async def test_starts_without_room_are_not_counted_and_a_caller_who_waits_gets_the_worker(world, monkeypatch):
    attempts = 0

    async def no_room(*_):
        nonlocal attempts
        attempts += 1
        raise DiskFull("the file system /x is full", hint="Free some space there.")

    with monkeypatch.context() as patch:
        patch.setattr(world.runtime, "start", no_room)
        caller = asyncio.create_task(world.replicas[0].allocate())
        await world.until(lambda: attempts > 2 * controller.DEFAULT_LIMITS.max_failures)
        (worker,) = world.held()
        assert (worker.status.failures, worker.held_lease.ended_at) == (0, None)
        assert worker.status.message == "the file system /x is full. Free some space there."
    grant = await caller
    assert grant.worker.status.message == ""


async def test_a_lease_whose_caller_left_while_the_disk_was_full_ends_when_there_is_room(world, monkeypatch):
    world.runtime.may_start.clear()
    attempts = 0
    write = world.store.replace

    async def no_room(obj):
        nonlocal attempts
        if isinstance(obj, Worker) and obj.lease and obj.lease.ended_at:
            attempts += 1
            raise DiskFull("the file system /x is full")
        return await write(obj)

    with monkeypatch.context() as patch:
        caller = asyncio.create_task(world.replicas[0].allocate())
        await world.until(world.held)
        patch.setattr(world.store, "replace", no_room)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        await world.until(lambda: attempts > 2)
    world.runtime.may_start.set()
    await world.until(lambda: not world.held())
