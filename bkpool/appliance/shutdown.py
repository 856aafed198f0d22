"""When a process ends: at a signal, or when one of its background tasks or threads fails.

It decides when the process ends. It does not know what is open: the caller enters that into an exit stack, and so
also determines the order in which it is closed.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import structlog

from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.garbage import collect_when_grown, short_pauses
from bkpool.core.errors import BkpoolError
from bkpool.home.holder_process import DRAIN_SIGNAL

log = structlog.get_logger(__name__)

SWITCH_INTERVAL = 0.0005
"""Seconds that one thread may keep the others from running Python while it computes. With the default, 5 ms, a busy
main loop delays every byte through the gateway's loops: a round trip took ten times as long (docs/benchmarks.md)."""


class Shutdown:
    """Whether this process should end, and whether it should end at once.

    The first SIGTERM or SIGINT requests the end; the second one forces it. DRAIN_SIGNAL requests it too and never
    forces it, however often it comes: `bkpool down` sends it. Create it in the event loop that it is for.

    Args:
        deadline: Ends the process if its end takes too long; None: nothing does.
    """

    def __init__(self, deadline: EndDeadline | None = None) -> None:
        self._deadline = deadline
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self._failure: BaseException | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        loop.add_signal_handler(DRAIN_SIGNAL, self.requested.set)

    def fail(self, error: BaseException) -> None:
        """Ends the process with this error and without waiting for builds: half an appliance is of no use."""
        self._failure = self._failure or error
        self.requested.set()
        self._force()

    def drained(self) -> None:
        """Notes that no build is waited for any more. From now on the end has a deadline."""
        if self._deadline is not None:
            self._deadline.start()

    @contextmanager
    def watched_threads(self) -> Iterator[None]:
        """Ends the process if one of its threads ends with an error."""
        loop, before = asyncio.get_running_loop(), threading.excepthook

        def failed(what: threading.ExceptHookArgs) -> None:
            name = what.thread.name if what.thread is not None else "unknown"
            error = what.exc_value or what.exc_type()
            log.critical("thread.failed", thread=name, exc_info=error)
            fault = BkpoolError(
                f"the thread {name!r} of the appliance failed ({type(error).__name__}: {error})",
                hint="`bkpool up` starts it again. Please report this: `bkpool logs` shows the details.",
                code="ThreadFailed",
            )
            with suppress(RuntimeError):  # the loop is closed: the process has ended already
                loop.call_soon_threadsafe(self.fail, fault)

        threading.excepthook = failed
        try:
            yield
        finally:
            threading.excepthook = before

    def raise_failure(self) -> None:
        """Raises the error that `fail` was called with, if it was called."""
        if self._failure is not None:
            raise self._failure

    async def pause(self, seconds: float) -> None:
        """Waits for this many seconds, or until the end is forced."""
        await asyncio.wait([forced := asyncio.create_task(self.forced.wait())], timeout=seconds)
        forced.cancel()

    def _on_signal(self) -> None:
        if self.requested.is_set():
            self._force()
        self.requested.set()

    def _force(self) -> None:
        self.forced.set()
        self.drained()


async def run_until_stopped(
    start: Callable[[AsyncExitStack, Shutdown], Awaitable[None]], deadline: EndDeadline | None = None
) -> None:
    """Starts a process's parts, waits until it should end, and closes them in the opposite order.

    Args:
        start: Opens the parts and enters each into the stack. It is cancelled if the process should end before.
        deadline: Ends the process if closing them takes too long.

    Raises:
        BaseException: What `start` raised, or what a background task failed with.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    shutdown = Shutdown(deadline)
    async with AsyncExitStack() as stack:
        stack.enter_context(short_pauses())
        stack.callback(asyncio.create_task(collect_when_grown()).cancel)
        stack.enter_context(shutdown.watched_threads())
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
