"""Background tasks of a process: run beside the rest, cancelled at the end, reported when they fail.

It does not know what the tasks do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog

from bkpool.core.errors import BkpoolError
from bkpool.kube.leader import LeaderElection

log = structlog.get_logger(__name__)


@asynccontextmanager
async def background_task(
    work: Coroutine[Any, Any, None], on_failure: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Runs a coroutine beside the rest; at the exit it is cancelled and awaited.

    Args:
        work: What to run. It should only end by being cancelled.
        on_failure: Called with the error if the coroutine raises one.
    """
    task = asyncio.create_task(work)

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)
            log.critical("appliance.task_failed", exc_info=error)

    task.add_done_callback(on_done)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def run_while_leading(leadership: LeaderElection, work: Callable[[], Awaitable[None]]) -> None:
    """Runs the work while this replica holds the Lease; when cancelled, gives the Lease back at once."""
    try:
        await leadership.lead(work)
    finally:
        with suppress(BkpoolError):  # it then expires without our help
            await leadership.release()
