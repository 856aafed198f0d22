"""Registers a gateway at workers in the store, and searches the store for leases that the gateway does not know yet.

While a gateway is registered for a lease, its worker is not stopped, wiped or leased again (rule 10,
docs/rules.md#r10). It runs in the main loop. The gateway's own loops never call it directly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol

from bkpool.core.errors import Conflict, Gone, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndReason, GatewayRegistration, Worker
from bkpool.gateway.control.heartbeat_writer import HeartbeatWriter
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.store import Store
from bkpool.store.lease_search import LeaseSearch

_REPORTS_AT_ONCE = 8
"""Reports about workers that are written at once."""
_MAX_ATTEMPTS = 10
"""Attempts of a compare-and-swap. More are only needed if another program writes the worker's status all the time."""


class LeaseRegistry(Protocol):
    """What the gateway needs from the store. All methods run in the main loop."""

    async def register(self, route: LeaseRoute, connections: int) -> None:
        """Registers this gateway for a lease.

        Args:
            route: The lease.
            connections: How many connections of the lease the gateway has.

        Raises:
            Gone: The lease has ended, or does not hold the worker.
            Unavailable: The store does not answer, or the worker changes too often.
        """

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        """Renews the registration, also of a lease that has ended.

        Args:
            route: The lease.
            connections: How many connections the gateway has now.

        Raises:
            Gone: The lease does not hold the worker any more.
            Unavailable: The store does not answer, or the worker changes too often.
        """

    async def beat(self, loop: object, leases: Mapping[str, int]) -> None:
        """Renews the registrations of these leases by one write. What other loops have named last is in it, too.

        Args:
            loop: Which of the gateway's loops has these leases.
            leases: By their id, how many connections the gateway has. A reader sees numbers that are up to
                `GatewayLimits.heartbeat_interval` old (20 s).

        Raises:
            Unavailable: It was not written.
        """

    async def withdraw(self, route: LeaseRoute) -> None:
        """Removes the registration, if there is one.

        Raises:
            Unavailable: The store does not answer, or the worker changes too often.
        """

    async def report_worker(self, route: LeaseRoute, silent_for: float | None) -> None:
        """Notes on the worker that nobody hears from it, or that it answers. Does nothing if it says so already.

        Args:
            route: The lease.
            silent_for: Seconds since the last sign of the worker; None: bytes come from it.

        Raises:
            Gone: The worker was deleted.
            Unavailable: The store does not answer, or the worker changes too often.
        """

    async def find(self, token_sha256: str) -> None:
        """Searches for the lease with this token: if the copy of the store does not have it, in the store itself.

        When it returns, the gateway has got the change of its table with the lease in it, if the lease exists. Other
        changes may still be on their way.

        Raises:
            Unavailable: The store does not answer.
        """


class StoreLeaseRegistry:
    """The lease registry over the store.

    Args:
        store: The store with the workers.
        gateway: This gateway's name, unique among the replicas.
        now: Returns the time that is written and compared.
        on_worker: Called with every worker that was written or found (mirror.apply). The change of the gateway's
            table follows from it soon; nothing here waits for that.
        hand_on: Hands the gateway at once what the copy has of the lease with this token, and returns whether it has
            any (TableFeeder.hand_on).
        known: Returns the worker of this name as it was a moment ago (mirror.workers.get). A write tries this copy
            first, so that it needs no read; the store refuses it if the copy is old.
        heartbeat: Renews registrations by the gateway's heartbeat; None: it has none.
        pause: Waits this many seconds before the workers are listed again.
    """

    def __init__(
        self,
        store: Store,
        gateway: str,
        now: Callable[[], datetime],
        on_worker: Callable[[Worker | Unreadable], None],
        *,
        hand_on: Callable[[str], bool] = lambda _: False,
        known: Callable[[Key], Worker | None] = lambda _: None,
        heartbeat: HeartbeatWriter | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._now = now
        self._on_worker = on_worker
        self._hand_on = hand_on
        self._known = known
        self._heartbeat = heartbeat
        self._search = LeaseSearch(store, on_worker, pause=pause)
        self._reports = asyncio.Semaphore(_REPORTS_AT_ONCE)
        self._withdrawals: dict[str, object] = {}  # by lease: the withdrawal that may still write

    async def register(self, route: LeaseRoute, connections: int) -> None:
        """See LeaseRegistry. It ends a withdrawal that is still under way: its next attempt would remove this."""
        self._withdrawals.pop(route.lease_id, None)
        await self._change_worker(route, partial(self._registered, connections))

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        """See LeaseRegistry."""
        await self._change_worker(route, partial(self._renewed, connections))

    async def beat(self, loop: object, leases: Mapping[str, int]) -> None:
        """See LeaseRegistry."""
        if self._heartbeat is None:
            raise Unavailable("this gateway has no heartbeat")
        await self._heartbeat.write(loop, leases)

    async def withdraw(self, route: LeaseRoute) -> None:
        """See LeaseRegistry."""
        this = self._withdrawals[route.lease_id] = object()

        def withdrawn(worker: Worker, route: LeaseRoute) -> Worker | None:
            return self._withdrawn(worker, route) if self._withdrawals.get(route.lease_id) is this else None

        try:
            await self._change_worker(route, withdrawn)
        except Gone:  # the worker is deleted, and the registration with it
            pass
        finally:
            if self._withdrawals.get(route.lease_id) is this:
                del self._withdrawals[route.lease_id]

    async def report_worker(self, route: LeaseRoute, silent_for: float | None) -> None:
        """See LeaseRegistry. When a node is lost, all gateways report many workers: few of them at once."""
        async with self._reports:
            await self._change_worker(route, partial(self._reported, silent_for))

    async def find(self, token_sha256: str) -> None:
        """See LeaseRegistry. Where the copy has the lease already, the store is not asked."""
        if not self._hand_on(token_sha256):
            await self._search.find(token_sha256)
            self._hand_on(token_sha256)

    async def _change_worker(self, route: LeaseRoute, change: Callable[[Worker, LeaseRoute], Worker | None]) -> None:
        if await self._change_copy(route, change):
            return
        for _ in range(_MAX_ATTEMPTS):
            try:
                worker = await self._store.get(Worker, route.worker.namespace, route.worker.name)
                changed = change(worker, route)
                if changed is not None:
                    self._on_worker(await self._store.replace_status(changed))
            except Conflict:
                continue
            except NotFound:
                raise _not_held(route) from None
            return
        raise Unavailable(
            f"worker {route.worker} changes too often to register a connection",
            hint="Try again in a moment. `bkpool status` shows details.",
        )

    async def _change_copy(self, route: LeaseRoute, change: Callable[[Worker, LeaseRoute], Worker | None]) -> bool:
        """Tries the write with the copy of the worker. Returns whether it was written: nothing else is certain."""
        copy = self._known(route.worker)
        try:
            changed = change(copy, route) if copy is not None else None
            if changed is None:
                return False
            self._on_worker(await self._store.replace_status(changed))
        except (Conflict, Gone, NotFound):  # the copy may be old
            return False
        return True

    def _registered(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        self._check_holder(worker, route)
        end_reason = worker.lease.ended(self._now()) if worker.lease else None
        if end_reason is not None:
            by = f" {worker.lease_end_message}" if end_reason is EndReason.REVOKED else ""
            raise Gone(
                f"the lease has ended: it was {end_reason}{by}", hint="Run `bkpool allocate` again.", code="LeaseOver"
            )
        return self._with_registration(connections, worker, route)

    def _renewed(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        self._check_holder(worker, route)
        return self._with_registration(connections, worker, route)

    def _with_registration(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        registration = GatewayRegistration(
            gateway=self._gateway,
            lease_id=route.lease_id,
            renewed_at=self._now(),
            connections=connections,
            heartbeat=str(self._heartbeat.key) if self._heartbeat is not None else "",
        )
        # This lease holds the worker, so entries of other leases protect nothing (rule 10, docs/rules.md#r10).
        others = (
            other
            for other in worker.status.gateways
            if other.gateway != self._gateway and other.lease_id == route.lease_id
        )
        return worker.with_status(gateways=(*others, registration), connected_lease=route.lease_id)

    def _reported(self, silent_for: float | None, worker: Worker, route: LeaseRoute) -> Worker | None:
        held = worker.lease is not None and worker.lease.id == route.lease_id
        if not held or worker.status.endpoint is None or worker.status.endpoint != route.endpoint:
            return None  # this is about a buildkitd that is known to have ended
        if silent_for is None:
            return worker.noted_answering() if worker.status.silent_since is not None else None
        changed = worker.noted_silent(self._now() - timedelta(seconds=silent_for))
        return None if changed is worker else changed

    def _withdrawn(self, worker: Worker, route: LeaseRoute) -> Worker | None:
        others = tuple(
            other
            for other in worker.status.gateways
            if (other.gateway, other.lease_id) != (self._gateway, route.lease_id)
        )
        return worker.with_status(gateways=others) if others != worker.status.gateways else None

    def _check_holder(self, worker: Worker, route: LeaseRoute) -> None:
        lease = worker.lease
        if lease is None or lease.id != route.lease_id or worker.uid != route.worker_uid:
            raise _not_held(route)


def _not_held(route: LeaseRoute) -> Gone:
    return Gone(
        f"the lease has ended: it does not hold worker {route.worker} any more",
        hint="Run `bkpool allocate` again.",
        code="LeaseOver",
    )
