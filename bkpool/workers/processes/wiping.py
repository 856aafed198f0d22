"""Removes the caches of slots: a few at a time, in threads and processes of their own.

A cache may have millions of files. Its slot waits for the removal, and nothing else does. A removal that is given up
leaves the slot marked, and the next one completes it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import structlog

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.workers.processes.child import ChildProcess
from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.slot_files import CacheRecord, CacheState, as_host_fault
from bkpool.workers.processes.slot_threads import FileWork
from bkpool.workers.processes.slots import ProcessSlot, SlotTable

log = structlog.get_logger(__name__)

_KEPT = 1 << 16  # bytes of what rm writes
_SHOWN = 500  # characters of their end that a person is shown


class Wiper:
    """Removes caches.

    Args:
        table: The slots.
        launcher: Knows how directories are removed as the user who made them.
        limits: How many caches may be removed at once, and how long one may take.
    """

    def __init__(self, table: SlotTable, launcher: Launcher, limits: ProcessLimits) -> None:
        self._table = table
        self._launcher = launcher
        self._seconds = limits.wipe_timeout
        self._places = asyncio.Semaphore(limits.concurrent_wipes)

    async def remove_cache(self, slot: ProcessSlot) -> None:
        """Removes the cache of a slot whose daemon has ended, with its logs. The caller holds the slot's lock.

        Raises:
            HostFault: Something cannot be removed, or not in time. The cache stays marked, so the slot is not used
                until it is.
        """
        files, run = slot.files, self._table.threads.run
        if slot.cache is None and not files.directory.exists():
            return
        slot.cache = CacheRecord(CacheState.WIPING)
        await run(FileWork.RECORD, files.slot, files.write_cache, slot.cache)
        async with self._places:
            if directories := await run(FileWork.WIPE, files.slot, files.set_root_aside):
                await self._remove(files.slot, directories)
            await run(FileWork.WIPE, files.slot, files.remove)
        slot.cache = None
        log.info("cache.wiped", worker=slot.name)
        self._table.changed(slot.files.slot)

    async def _remove(self, slot: Slot, directories: Sequence[Path]) -> None:
        removal = await self._table.threads.run(FileWork.WIPE, slot, self._launcher.removal, slot, directories)
        with as_host_fault(directories[0]), _output() as output:
            child = ChildProcess(removal.command, removal.environment, output)
            try:
                code = await child.wait(self._seconds)
            finally:
                await child.end()
            if code == 0:
                return
            output.seek(0)
            reason = output.read().rstrip(b"\0").decode("utf-8", "replace").strip()[-_SHOWN:]
        if code is None:
            raise HostFault(
                f"the old cache of {slot.worker} could not be removed within {self._seconds:g} s",
                hint="It is tried again. The slot is not used until it is gone.",
                code="DiskHangs",
            )
        raise HostFault(
            f"the old cache of {slot.worker} cannot be removed: {reason}",
            hint=f"Remove {directories[0]} by hand. The slot is not used until it is gone.",
            code="Permission",
        )


def _output() -> IO[bytes]:
    """A file in memory, because the disk may be full. Its size is fixed: what is written beyond it is lost."""
    output = os.fdopen(os.memfd_create("wipe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    output.truncate(_KEPT)
    fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return output
