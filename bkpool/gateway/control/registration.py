"""Keeps a gateway's entries in the status of workers: the promise that a worker is not given away under a connection.

It also looks for leases that are newer than this replica's copy of them. It runs in the main loop, beside the store
(DESIGN rule 10); the gateway's own loop never comes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Protocol

from bkpool.core.errors import Conflict, Gone, NotFound, Unavailable
from bkpool.core.worker import GatewayRegistration, Worker
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.store import Store

_BETWEEN_LISTINGS = 1.0  # seconds: however many old certificates come back, the API server is asked no more often
_REMEMBERED = 4096  # tokens that were looked for
_TRIES = 10  # of a compare-and-swap; more would mean that something writes a worker's status without end


class Registrar(Protocol):
    """What the gateway asks of the main loop."""

    async def register(self, route: LeaseRoute, connections: int) -> None:
        """Enters this gateway, which has so many connections of the lease.

        Raises Gone (the lease does not hold the worker) or Unavailable.
        """

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        """Renews the entry, also of a lease that has ended.

        The number of connections is that of this moment, and as old as the entry (20 s, Limits.renew) when read.
        Raises Gone (the worker is another's) or Unavailable.
        """

    async def withdraw(self, route: LeaseRoute) -> None:
        """Takes the entry out, if it is there. Raises Unavailable."""

    async def find(self, token_sha256: str) -> None:
        """Looks for the lease with this token where no copy is behind.

        When it returns, the gateway has been handed a table with the lease in it, if there is one. Raises
        Unavailable.
        """


class StoreRegistrar:
    """The registrar over the store.

    Args:
        store: Where the workers are.
        gateway: This gateway's name, unique among replicas.
        now: The time that is written and compared.
        written: Gets every worker that was written, or found (mirror.apply). The gateway's new table follows from
            it at the latest in the loop's next turn (Gateway.update).
        pause: Waits so many seconds before the workers are listed again.
    """

    def __init__(
        self,
        store: Store,
        gateway: str,
        now: Callable[[], datetime],
        written: Callable[[Worker], None],
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._now = now
        self._written = written
        self._pause = pause
        self._listing = asyncio.Lock()
        self._begun = self._done = 0  # the last listing that was begun, and the last that succeeded
        self._begun_at = -_BETWEEN_LISTINGS
        self._sought: dict[str, None] = {}  # the oldest first

    async def register(self, route: LeaseRoute, connections: int) -> None:
        """Enters this gateway. Raises Gone (the lease does not hold the worker) or Unavailable."""
        await self._change(route, partial(self._registered, connections))

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        """Renews the entry, also of a lease that has ended. Raises Gone (the worker is another's) or Unavailable."""
        await self._change(route, partial(self._renewed, connections))

    async def withdraw(self, route: LeaseRoute) -> None:
        """Takes the entry out, if it is there. Raises Unavailable."""
        await self._change(route, self._withdrawn)

    async def find(self, token_sha256: str) -> None:
        """Lists the workers live, at most once a second; whoever asks meanwhile shares the next listing.

        A token is looked for once: nobody has it before its lease is in the store, so what was not found never is.

        Raises Unavailable.
        """
        if token_sha256 in self._sought:
            return
        seen = self._begun
        async with self._listing:
            if self._done <= seen:  # else it was begun after we came, and so is not older than the token
                await self._list()
        self._sought[token_sha256] = None
        if len(self._sought) > _REMEMBERED:
            del self._sought[next(iter(self._sought))]

    async def _list(self) -> None:
        time = asyncio.get_running_loop().time
        await self._pause(max(0.0, self._begun_at + _BETWEEN_LISTINGS - time()))  # 0: who asks in this turn shares it
        self._begun += 1
        self._begun_at = time()
        for worker in (await self._store.list(Worker)).items:
            self._written(worker)
        await asyncio.sleep(0)  # the turn in which the table is handed over, before anybody looks into it
        self._done = self._begun

    async def _change(self, route: LeaseRoute, change: Callable[[Worker, LeaseRoute], Worker | None]) -> None:
        for _ in range(_TRIES):
            try:
                worker = await self._store.get(Worker, route.worker.namespace, route.worker.name)
                changed = change(worker, route)
                if changed is not None:
                    self._written(await self._store.replace_status(changed))
            except Conflict:
                continue
            except NotFound:
                if change == self._withdrawn:
                    return
                raise _not_its_own(route) from None
            return
        raise Unavailable(
            f"worker {route.worker} changes too fast to register a connection",
            hint="Try again in a moment; `bkpool status` says more.",
        )

    def _registered(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        self._check_holder(worker, route)
        over = worker.lease.ended(self._now()) if worker.lease else None
        if over is not None:
            raise Gone(f"the lease is over: it was {over}", hint="Run `bkpool allocate` again.", code="LeaseOver")
        return self._entered(connections, worker, route)

    def _renewed(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        self._check_holder(worker, route)
        return self._entered(connections, worker, route)

    def _entered(self, connections: int, worker: Worker, route: LeaseRoute) -> Worker:
        entry = GatewayRegistration(
            gateway=self._gateway,
            allocation_id=route.allocation_id,
            renewed_at=self._now(),
            connections=connections,
        )
        return worker.with_status(gateways=(*self._others(worker), entry))

    def _withdrawn(self, worker: Worker, route: LeaseRoute) -> Worker | None:
        others = tuple(
            entry
            for entry in worker.status.gateways
            if (entry.gateway, entry.allocation_id) != (self._gateway, route.allocation_id)
        )
        return worker.with_status(gateways=others) if others != worker.status.gateways else None

    def _others(self, worker: Worker) -> tuple[GatewayRegistration, ...]:
        return tuple(entry for entry in worker.status.gateways if entry.gateway != self._gateway)

    def _check_holder(self, worker: Worker, route: LeaseRoute) -> None:
        lease = worker.lease
        if lease is None or lease.id != route.allocation_id or worker.uid != route.worker_uid:
            raise _not_its_own(route)


def _not_its_own(route: LeaseRoute) -> Gone:
    return Gone(
        f"the lease is over: worker {route.worker} is not held by it any more",
        hint="Run `bkpool allocate` again.",
        code="LeaseOver",
    )
