"""Event loops for tests: one whose clock a test can advance, and the loops that a gateway can run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bkpool.gateway.control.server import new_loop


class SkewedLoop(asyncio.SelectorEventLoop):
    """A real event loop whose clock stands still until it is advanced. So no deadline comes by itself."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": SkewedLoop, "uvloop": new_loop}
"""The loops that a gateway can run on, by name."""


def open_libuv_pipe() -> None:
    """Makes and closes a uvloop. The first one in a process opens a pipe that stays open; later ones do not."""
    loop = new_loop()
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
