"""Carries requests from a gateway's loop to the lease registry in the main loop, and the answers back.

Only immutable routes, digests and errors cross between the loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

import structlog

from bkpool.core.errors import BkpoolError, DiskFull, Gone, Unavailable
from bkpool.gateway.control.lease_registry import LeaseRegistry
from bkpool.gateway.session.lease_registration import OnDone
from bkpool.gateway.session.lease_table import LeaseRoute

log = structlog.get_logger(__name__)


class LoopBridge:
    """The lease registry for one of the gateway's loops: a `lease_registration.CallbackLeaseRegistry`.

    Args:
        main: The loop of the registry.
        gateway: The loop that calls.
        registry: Answers the requests.
        timeout: Seconds after which a request fails because the store does not answer.
    """

    def __init__(
        self,
        main: asyncio.AbstractEventLoop,
        gateway: asyncio.AbstractEventLoop,
        registry: LeaseRegistry,
        timeout: float,
    ) -> None:
        self._main = main
        self._gateway = gateway
        self._registry = registry
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, route: LeaseRoute, connections: int, on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.register, route, connections), on_done)

    def renew(self, route: LeaseRoute, connections: int, on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.renew, route, connections), on_done)

    def beat(self, leases: Mapping[str, int], on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.beat, self, leases), on_done)

    def withdraw(self, route: LeaseRoute, on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.withdraw, route), on_done)

    def report_worker(self, route: LeaseRoute, silent_for: float | None, on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.report_worker, route, silent_for), on_done)

    def find(self, token_sha256: str, on_done: OnDone) -> None:
        """See CallbackLeaseRegistry."""
        self._request(partial(self._registry.find, token_sha256), on_done)

    async def settle(self) -> None:
        """Waits for all running requests and for the requests that follow from them. Called in the main loop."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            answered = asyncio.Event()
            self._gateway.call_soon_threadsafe(self._main.call_soon_threadsafe, answered.set)
            await answered.wait()

    def _request(self, call: Callable[[], Awaitable[None]], on_done: OnDone) -> None:
        with suppress(RuntimeError):  # the main loop is closed, because the process ends
            self._main.call_soon_threadsafe(self._start, call, on_done)

    def _start(self, call: Callable[[], Awaitable[None]], on_done: OnDone) -> None:
        task = self._main.create_task(self._run(call, on_done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: Callable[[], Awaitable[None]], on_done: OnDone) -> None:
        error: BkpoolError | None = None
        say: Callable[[], object] | None = None
        try:
            async with asyncio.timeout(self._timeout):
                await call()
        except (Gone, Unavailable) as raised:
            error = raised
        except DiskFull as raised:
            error = Unavailable(f"the gateway cannot confirm this lease: {raised.message}", hint=raised.hint)
        except BkpoolError as raised:  # the store refuses this gateway; the client cannot change that
            say = partial(log.warning, "gateway.registry_refused", reason=raised.message)
            error = _store_unavailable()
        except TimeoutError:
            error = _store_unavailable()
        except Exception as raised:  # noqa: BLE001 - it is logged below
            say = partial(log.error, "gateway.registry_failed", exc_info=raised)
            error = _store_unavailable()
        with suppress(RuntimeError):  # the gateway's loop is closed, so nothing waits for the answer
            self._gateway.call_soon_threadsafe(on_done, error)
        if say is not None:  # after the answer, which a log that fails must not hold up
            say()


def _store_unavailable() -> Unavailable:
    return Unavailable(
        "the gateway cannot confirm this lease, because its store does not answer",
        hint="Try again in a moment. `bkpool status` shows details.",
    )
