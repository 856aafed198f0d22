"""Ends a process that does not end by itself in time: nobody should have to kill an appliance that was told to stop.

It runs in a thread of its own, because what hangs may be the event loop. It begins after a drain, not before.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from bkpool.appliance import logs

log = structlog.get_logger(__name__)

END_TIMEOUT = 60.0
"""Seconds. A usual end takes one; a worker that is killed while its disk hangs takes thirty."""
EXIT_CODE = 70
"""sysexits' EX_SOFTWARE."""
_SHOWN_TASKS = 20


def _exit() -> None:
    logs.flush()
    os._exit(EXIT_CODE)


class EndDeadline:
    """The time that the end of a process may take. A context manager; at its exit the process has ended in time.

    Args:
        seconds: From `start` on.
        end: Ends the process.
    """

    def __init__(self, seconds: float = END_TIMEOUT, *, end: Callable[[], None] = _exit) -> None:
        self._seconds = seconds
        self._end = end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Begins to count, in the event loop that should end. A second call does nothing."""
        if self._timer is None:
            self._loop = asyncio.get_running_loop()
            self._timer = threading.Timer(self._seconds, self._expired)
            self._timer.daemon = True
            self._timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expired(self) -> None:
        try:
            hint = "Workers that still run are adopted by the next `bkpool up`. Please report this with the log."
            log.critical("appliance.end_overdue", seconds=self._seconds, waiting=self._waiting(), hint=hint)
        finally:
            self._end()

    def _waiting(self) -> list[str]:
        """What has not ended, as file and line of each task."""
        tasks = asyncio.all_tasks(self._loop) if self._loop is not None else set()
        frames = [frame for task in list(tasks)[:_SHOWN_TASKS] for frame in task.get_stack(limit=1)]
        return sorted(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}" for frame in frames)
