"""The threads in which the files of slots are read and written, each kind of work apart from the others.

A wipe that takes long delays no start and no record. Work that hangs with its disk is given up after a time, and its
slot is not used until it has ended: it might write after whoever comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from typing import Any, ParamSpec, TypeVar

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.home.threads import Threads
from bkpool.workers.processes.limits import ProcessLimits

P = ParamSpec("P")
T = TypeVar("T")

_RECORDS = 4
"""Threads for records. Each waits for the disk (fsync(2))."""
_CLEANERS = 2
"""Threads for what daemons leave behind, besides those for starts."""
_CANCELLED = 10.0
"""Seconds for which a caller who was cancelled waits for the end of work that has begun."""


class FileWork(StrEnum):
    """The kinds of work."""

    PREPARE = "prepare"
    """Before a start and after an end: sockets, cgroups, configuration. 0.1 s is usual."""
    RECORD = "record"
    """Records of owners and daemons."""
    WIPE = "wipe"
    """Caches that are removed. It may take minutes."""


class SlotThreads:
    """Runs the file work of the slots of one home.

    Args:
        limits: How many starts and wipes there may be at once, and how long file work may take.
    """

    def __init__(self, limits: ProcessLimits) -> None:
        self._threads = {
            FileWork.PREPARE: Threads("worker files", limits.concurrent_starts + _CLEANERS),
            FileWork.RECORD: Threads("worker records", _RECORDS),
            FileWork.WIPE: Threads("worker wipes", limits.concurrent_wipes),
        }
        self._seconds = limits.file_timeout
        self._running: dict[Slot, Future[Any]] = {}

    async def run(
        self, work: FileWork, slot: Slot | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs file work, and waits for its end even if the caller is cancelled.

        Otherwise it would go on beside the next work in the same slot, and might come after it.

        Args:
            work: What kind it is.
            slot: Whose files; the caller holds its lock. None: no slot's.
            function: The work.
            args: Of the function.
            kwargs: Of the function.

        Raises:
            HostFault: `DiskHangs`: it has not ended in time, or earlier work of this slot has not.
        """
        if slot in self._running:
            raise _hangs(slot, self._seconds)
        future = self._threads[work].submit(function, *args, **kwargs)
        if slot is not None:
            self._running[slot] = future
        waiting = asyncio.wrap_future(future)
        timer = asyncio.timeout(self._seconds)
        try:
            async with timer:
                return await asyncio.shield(waiting)
        except TimeoutError:
            if not timer.expired():
                raise
            future.cancel()
            raise _hangs(slot, self._seconds) from None
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait([waiting], timeout=_CANCELLED)
            raise
        finally:
            if slot is not None:
                self._forget(slot, future, waiting)

    def close(self) -> None:
        """Ends the threads once they have nothing to do. Later work gets new ones."""
        for threads in self._threads.values():
            threads.close()

    def _forget(self, slot: Slot, future: Future[Any], waiting: asyncio.Future[Any]) -> None:
        """Frees the slot, now or when the work has ended."""

        def ended(work: asyncio.Future[Any]) -> None:
            self._running.pop(slot, None)
            if not work.cancelled():
                work.exception()  # nobody waits for it any more

        if future.done():
            del self._running[slot]
        else:
            waiting.add_done_callback(ended)


def _hangs(slot: Slot | None, seconds: float) -> HostFault:
    whose = f"of {slot.worker} " if slot else ""
    return HostFault(
        f"the files {whose}could not be read or written within {seconds:g} s",
        hint="The disk hangs, or is very busy: look at dmesg.",
        code="DiskHangs",
    )
