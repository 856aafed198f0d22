"""The way between a gateway's loop and the main loop: requests for the registrar go out, their answers come back.

Nothing but immutable routes, digests and errors passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import structlog

from bkpool.core.errors import BkpoolError, Gone, Unavailable
from bkpool.gateway.control.registration import Registrar
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.shard_leases import Told

log = structlog.get_logger(__name__)


class LoopBridge:
    """Takes requests for the registrar from one of the gateway's loops to the main loop, and the answers back.

    A `leases.Registry` for that loop.

    Args:
        main: Where the registrar lives.
        gateway: The loop that asks.
        registrar: Answers.
        timeout: Seconds after which the asker is told that the store is silent.
    """

    def __init__(
        self,
        main: asyncio.AbstractEventLoop,
        gateway: asyncio.AbstractEventLoop,
        registrar: Registrar,
        timeout: float,
    ) -> None:
        self._main = main
        self._gateway = gateway
        self._registrar = registrar
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, route: LeaseRoute, connections: int, told: Told) -> None:
        """See `leases.Registry`."""
        self._ask(partial(self._registrar.register, route, connections), told)

    def renew(self, route: LeaseRoute, connections: int, told: Told) -> None:
        """See `leases.Registry`."""
        self._ask(partial(self._registrar.renew, route, connections), told)

    def withdraw(self, route: LeaseRoute, told: Told) -> None:
        """See `leases.Registry`."""
        self._ask(partial(self._registrar.withdraw, route), told)

    def find(self, token_sha256: str, told: Told) -> None:
        """See `leases.Registry`."""
        self._ask(partial(self._registrar.find, token_sha256), told)

    async def settle(self) -> None:
        """Waits for what has been asked, in the main loop, and for what its answers lead to."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            answered = asyncio.Event()
            self._gateway.call_soon_threadsafe(self._main.call_soon_threadsafe, answered.set)
            await answered.wait()

    def _ask(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        with suppress(RuntimeError):  # the main loop is closed: so is the process
            self._main.call_soon_threadsafe(self._begin, call, told)

    def _begin(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        task = self._main.create_task(self._do(call, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        error: BkpoolError | None = None
        try:
            async with asyncio.timeout(self._timeout):
                await call()
        except (Gone, Unavailable) as raised:
            error = raised
        except BkpoolError as raised:  # what the store holds against us is none of the client's doing
            log.warning("gateway.registrar-refused", reason=raised.message)
            error = _silent_store()
        except TimeoutError:
            error = _silent_store()
        except Exception:
            log.exception("gateway.registrar-failed")
            error = _silent_store()
        with suppress(RuntimeError):  # the gateway's loop is closed: nobody waits for this
            self._gateway.call_soon_threadsafe(told, error)


def _silent_store() -> Unavailable:
    return Unavailable(
        "the gateway cannot confirm this lease, because its store does not answer",
        hint="Try again in a moment; `bkpool status` says more.",
    )
