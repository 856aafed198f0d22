"""Looks at the sizes of the slots' logs again and again, and bounds those that are too large.

It never touches a log while its slot is started, stopped or wiped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from bkpool.core.errors import HostFault
from bkpool.workers.processes import slot_log
from bkpool.workers.processes.slot_threads import FileWork
from bkpool.workers.processes.slots import ProcessSlot, SlotTable

log = structlog.get_logger(__name__)

INTERVAL = 5.0
"""Seconds between two looks at the sizes of all logs."""


class SlotLogs:
    """Keeps the logs of all slots small.

    Args:
        table: The slots.
        size: Bytes that a log has at most, and its earlier part as well.
        pause: Waits that many seconds.
    """

    def __init__(
        self, table: SlotTable, size: int, *, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._table = table
        self._size = size
        self._pause = pause

    async def run(self) -> None:
        """Looks at them at regular intervals until it is cancelled."""
        while True:
            await self._pause(INTERVAL)
            try:
                await self.bound_all()
            except (HostFault, OSError) as error:  # the disk hangs; the next look comes
                log.warning("worker.log_not_bounded", reason=str(error))

    async def bound_all(self) -> None:
        """Bounds every log that is too large."""
        slots = list(self._table)
        for slot in await self._table.threads.run(FileWork.PREPARE, None, self._too_large, slots):
            async with slot.lock:  # nobody removes or replaces the log meanwhile
                await self._table.threads.run(
                    FileWork.PREPARE, slot.files.slot, slot_log.bound, slot.files.log, self._size
                )

    def _too_large(self, slots: list[ProcessSlot]) -> list[ProcessSlot]:
        found = []
        for slot in slots:
            with suppress(OSError):
                if slot.files.log.stat().st_size > self._size:
                    found.append(slot)
        return found
