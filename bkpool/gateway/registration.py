"""Keeps a gateway's entries in the status of workers: the promise that a worker is not given away under a connection.

It runs in the main loop, beside the store (DESIGN rule 10); the gateway's own loop never comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from bkpool.core.errors import Conflict, Gone, NotFound, Unavailable
from bkpool.core.objects import GatewayRegistration, Worker
from bkpool.gateway.table import Route
from bkpool.store import Store

_TRIES = 10  # of a compare-and-swap; more would mean that something writes a worker's status without end


class Registrar(Protocol):
    """What the gateway asks of the main loop."""

    async def register(self, route: Route) -> None:
        """Enters this gateway. Raises Gone (the lease does not hold the worker) or Unavailable."""

    async def renew(self, route: Route) -> None:
        """Renews the entry, also of a lease that has ended. Raises Gone (the worker is another's) or Unavailable."""

    async def withdraw(self, route: Route) -> None:
        """Takes the entry out, if it is there. Raises Unavailable."""


class StoreRegistrar:
    """The registrar over the store.

    Args:
        store: Where the workers are.
        gateway: This gateway's name, unique among replicas.
        now: The time that is written and compared.
        written: Gets every worker that was written (mirror.apply).
    """

    def __init__(
        self, store: Store, gateway: str, now: Callable[[], datetime], written: Callable[[Worker], None]
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._now = now
        self._written = written

    async def register(self, route: Route) -> None:
        """Enters this gateway. Raises Gone (the lease does not hold the worker) or Unavailable."""
        await self._change(route, self._registered)

    async def renew(self, route: Route) -> None:
        """Renews the entry, also of a lease that has ended. Raises Gone (the worker is another's) or Unavailable."""
        await self._change(route, self._renewed)

    async def withdraw(self, route: Route) -> None:
        """Takes the entry out, if it is there. Raises Unavailable."""
        await self._change(route, self._withdrawn)

    async def _change(self, route: Route, change: Callable[[Worker, Route], Worker | None]) -> None:
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

    def _registered(self, worker: Worker, route: Route) -> Worker:
        self._check_holder(worker, route)
        over = worker.allocation.ended(self._now()) if worker.allocation else None
        if over is not None:
            raise Gone(f"the lease is over: it was {over}", hint="Run `bkpool allocate` again.", code="LeaseOver")
        return self._entered(worker, route)

    def _renewed(self, worker: Worker, route: Route) -> Worker:
        self._check_holder(worker, route)
        return self._entered(worker, route)

    def _entered(self, worker: Worker, route: Route) -> Worker:
        entry = GatewayRegistration(gateway=self._gateway, allocation_id=route.allocation_id, renewed_at=self._now())
        return worker.with_status(gateways=(*self._others(worker), entry))

    def _withdrawn(self, worker: Worker, route: Route) -> Worker | None:
        others = tuple(
            entry
            for entry in worker.status.gateways
            if (entry.gateway, entry.allocation_id) != (self._gateway, route.allocation_id)
        )
        return worker.with_status(gateways=others) if others != worker.status.gateways else None

    def _others(self, worker: Worker) -> tuple[GatewayRegistration, ...]:
        return tuple(entry for entry in worker.status.gateways if entry.gateway != self._gateway)

    def _check_holder(self, worker: Worker, route: Route) -> None:
        lease = worker.allocation
        if lease is None or lease.id != route.allocation_id or worker.uid != route.worker_uid:
            raise _not_its_own(route)


def _not_its_own(route: Route) -> Gone:
    return Gone(
        f"the lease is over: worker {route.worker} is not held by it any more",
        hint="Run `bkpool allocate` again.",
        code="LeaseOver",
    )
