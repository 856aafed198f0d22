"""The steps by which the cache of one slot gets an owner or is removed. The caller holds the slot's lock.

Every step is on disk before what it announces happens, so a crash never leaves a cache whose owner is unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import structlog

from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.slot_files import CacheRecord, CacheState
from bkpool.workers.processes.slots import ProcessSlot, SlotTable

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


async def assign_owner(table: SlotTable, slot: ProcessSlot, owner: str | None) -> None:
    """Writes durably that the cache belongs to an owner.

    Args:
        table: Has the slot, and calls back after the change.
        slot: The slot; its cache does not belong to another owner.
        owner: Digest of the owner; None: the owner stays as they are.

    Raises:
        HostFault: It cannot be written.
    """
    record = CacheRecord.of(owner or (slot.cache.owner if slot.cache else None))
    if record == slot.cache:
        return
    await run_in_thread(slot.files.write_cache, record)
    slot.cache = record
    if slot.observation:
        slot.observation = replace(slot.observation, cache_owner=record.owner)
    table.changed()


async def remove_cache(table: SlotTable, slot: ProcessSlot, launcher: Launcher) -> None:
    """Removes the cache of a slot whose daemon has ended, with its logs.

    Raises:
        HostFault: Something cannot be removed. The cache stays marked, so the slot is not used until it is.
    """
    files = slot.files
    if slot.cache is None and not files.directory.exists():
        return
    slot.cache = CacheRecord(CacheState.WIPING)
    await run_in_thread(files.write_cache, slot.cache)
    await launcher.remove(files.slot, files.set_root_aside())
    await run_in_thread(files.remove)
    slot.cache = None
    log.info("cache.wiped", worker=slot.name)
    table.changed()


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs file work in a thread, and waits for its end even if the caller is cancelled.

    Otherwise it would go on beside the next write of the same slot, and might come after it.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
