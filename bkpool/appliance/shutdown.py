"""When a process ends: at a signal, or when one of its background tasks fails.

It decides when the process ends. It does not know what is open: the caller enters that into an exit stack, and so
also determines the order in which it is closed.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import structlog

log = structlog.get_logger(__name__)

SWITCH_INTERVAL = 0.0005
"""Seconds that one thread may keep the others from running Python while it computes. With the default, 5 ms, a busy
main loop delays every byte through the gateway's loops: a round trip took ten times as long (docs/benchmarks.md)."""


class Shutdown:
    """Whether this process should end, and whether it should end at once.

    The first SIGTERM or SIGINT requests the end; the second one forces it. Create it in the event loop that it is
    for.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self._failure: BaseException | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def fail(self, error: BaseException) -> None:
        """Ends the process with this error and without waiting for builds: half an appliance is of no use."""
        self._failure = error
        self.requested.set()
        self.forced.set()

    def raise_failure(self) -> None:
        """Raises the error that `fail` was called with, if it was called."""
        if self._failure is not None:
            raise self._failure

    async def pause(self, seconds: float) -> None:
        """Waits for this many seconds, or until the end is forced."""
        await asyncio.wait([forced := asyncio.create_task(self.forced.wait())], timeout=seconds)
        forced.cancel()

    def _on_signal(self) -> None:
        (self.forced if self.requested.is_set() else self.requested).set()


async def run_until_stopped(start: Callable[[AsyncExitStack, Shutdown], Awaitable[None]]) -> None:
    """Starts a process's parts, waits until it should end, and closes them in the opposite order.

    Args:
        start: Opens the parts and enters each into the stack. It is cancelled if the process should end before.

    Raises:
        BaseException: What `start` raised, or what a background task failed with.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    # The objects that imports created live to the end. Without this the collector took 55 ms to go through them, and
    # in that time no thread moves a byte.
    gc.freeze()
    shutdown = Shutdown()
    async with AsyncExitStack() as stack:
        await _start_unless_stopped(start, stack, shutdown)
        await shutdown.requested.wait()
        log.info("appliance.stopping")
    shutdown.raise_failure()


async def _start_unless_stopped(
    start: Callable[[AsyncExitStack, Shutdown], Awaitable[None]], stack: AsyncExitStack, shutdown: Shutdown
) -> None:
    """Starts the parts, and gives up when the process should end: a cluster may never answer who waits for it."""

    async def give_up(starting: asyncio.Timeout) -> None:
        await shutdown.requested.wait()
        starting.reschedule(asyncio.get_running_loop().time())

    starting = asyncio.timeout(None)  # cancels this task, so that the parts are opened and closed in the same one
    try:
        async with starting:
            waiting = asyncio.create_task(give_up(starting))
            try:
                await start(stack, shutdown)
            finally:
                waiting.cancel()
    except TimeoutError:
        if not starting.expired():
            raise
