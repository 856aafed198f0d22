"""Asks the parts of a process whether they answer, for `/ready`. Each room says what it means that it answers.

However many ask, each part is asked once at a time, and nobody waits longer than for one answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from bkpool.core.errors import BkpoolError

log = structlog.get_logger(__name__)

ANSWER_TIMEOUT = 1.5
"""Seconds. The kubelet waits for two."""

Ask = Callable[[], Awaitable[None]]
"""Returns when the part has answered. A BkpoolError says why it is of no use at the moment."""


class ReadyChecks:
    """The parts of one process.

    Args:
        timeout: Seconds that a part may take to answer.
    """

    def __init__(self, timeout: float = ANSWER_TIMEOUT) -> None:
        self._timeout = timeout
        self._parts: dict[str, Ask] = {}
        self._asking: asyncio.Task[str | None] | None = None

    def add(self, name: str, ask: Ask) -> Callable[[], None]:
        """Asks this part from now on. Returns a function that ends it."""
        self._parts[name] = ask

        def remove() -> None:
            if self._parts.get(name) is ask:
                del self._parts[name]

        return remove

    async def trouble(self) -> str | None:
        """Which parts do not answer, or why they are of no use, as a sentence; None if all answer."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def _asked(self, _task: asyncio.Task[str | None]) -> None:
        self._asking = None

    async def _ask_all(self) -> str | None:
        found = await asyncio.gather(*(self._ask(name, ask) for name, ask in self._parts.items()))
        return "; ".join(reason for reason in found if reason) or None

    async def _ask(self, name: str, ask: Ask) -> str | None:
        try:
            async with asyncio.timeout(self._timeout):
                await ask()
        except TimeoutError:
            return f"{name} does not answer"
        except BkpoolError as error:
            return error.message
        except Exception:
            log.exception("ready.check_failed", part=name)
            return f"{name} does not answer"
        return None
