"""From a process's start to its end: at a signal, or with a room that died.

It knows when; what is opened, and so what ends in which order, is its user's.
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

STILL_ACCEPTING = 5.0
"""Seconds after SIGTERM in a cluster: endpoints take as long to leave every kube-proxy of one of some size."""

SWITCH_INTERVAL = 0.0005
"""Seconds that one thread may keep the others from Python while it computes. With the default, 5 ms, a busy main loop
makes every byte through the gateway's loops wait: a round trip took ten times as long (docs/benchmarks.md)."""


class Lifetime:
    """From a start to the first SIGTERM or SIGINT; the second one hurries.

    To be made in the event loop that it is for.
    """

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.forced = asyncio.Event()
        self._death: BaseException | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def died(self, error: BaseException) -> None:
        """Half an appliance helps nobody: without waiting for builds, it ends with the error."""
        self._death = error
        self.stopping.set()
        self.forced.set()

    def check(self) -> None:
        """Raises what a room died of."""
        if self._death is not None:
            raise self._death

    async def pause(self, seconds: float) -> None:
        """Waits so long, or until it is hurried."""
        await asyncio.wait([hurried := asyncio.create_task(self.forced.wait())], timeout=seconds)
        hurried.cancel()

    def _on_signal(self) -> None:
        (self.forced if self.stopping.is_set() else self.stopping).set()


async def live(start: Callable[[AsyncExitStack, Lifetime], Awaitable[None]]) -> None:
    """Starts everything, waits until it is to end, and ends it in the opposite order.

    Args:
        start: Enters into the stack whatever is to be ended.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.freeze()  # what the imports made stays anyway; to look through it took 55 ms, in which no thread moves a byte
    life = Lifetime()
    async with AsyncExitStack() as stack:
        await start(stack, life)
        await life.stopping.wait()
        log.info("appliance.stopping")
    life.check()
