"""Revokes leases that are named by what they have in common: an id, a worker, a caller, a tenant or a pool.

It reads the store and not the copy in memory, so that no lease is missed. A caller who is not the admin reaches their
own leases only, and learns nothing about others.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from bkpool.allocation.leases import LeaseService, find_pool, may_be_theirs, revoker
from bkpool.core.errors import BkpoolError, Forbidden, Gone, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import Worker
from bkpool.identity import Identity
from bkpool.identity.rules import is_theirs
from bkpool.store import Store
from bkpool.store.mirror import Mirror
from bkpool.store.readable_scopes import list_readable

_AT_ONCE = 16
"""Writes at the same time. One after the other, a thousand leases would take many seconds."""
_GIVE_RIGHTS = "Give bkpool its rights in this namespace again (`bkpool manifests`), or name another one."


def unread_leases(namespace: str) -> str:
    """Says that leases of a namespace may be missing."""
    return f"bkpool may not read the workers in namespace {namespace!r}"


@dataclass(frozen=True, slots=True)
class LeaseSelector:
    """Which leases are meant. Exactly one of the first five fields is given."""

    lease_id: str = ""
    worker: Key | None = None
    identity: str = ""
    """The name of the caller who made them, whatever it comes from."""
    tenant: str = ""
    """The name of the owner of the cache that they use."""
    pool: Key | None = None
    namespace: str | None = None
    """For an id, an identity or a tenant: only leases in this namespace; None: in all."""

    def selects(self, worker: Worker) -> bool:
        """Whether the lease on this worker is meant."""
        lease = worker.lease
        if lease is None or self.namespace not in {None, worker.key.namespace}:
            return False
        if self.worker is not None or self.pool is not None:
            return worker.key == self.worker or worker.pool == self.pool
        tenant = lease.tenant or lease.requested_by  # leases of earlier versions do not have their tenant's name
        return (
            (bool(self.lease_id) and lease.id == self.lease_id)
            or (bool(self.identity) and lease.requested_by == self.identity)
            or (bool(self.tenant) and tenant == self.tenant)
        )

    def may_select(self, found: Unreadable) -> bool:
        """Whether the lease on a worker that cannot be read may be meant: nothing that it says is against it."""
        if self.namespace not in {None, found.key.namespace}:
            return False
        if self.worker is not None or self.pool is not None:
            return found.key == self.worker or found.pool == self.pool
        wanted = {"id": self.lease_id, "requestedBy": self.identity, "tenant": self.tenant}
        return any(name and found.of_lease(field) in {"", name} for field, name in wanted.items())

    def __str__(self) -> str:
        """For a log line."""
        named = {"lease": self.lease_id, "worker": self.worker, "identity": self.identity, "tenant": self.tenant}
        return next((f"{kind} {name}" for kind, name in named.items() if name), f"pool {self.pool}")


@dataclass(frozen=True, slots=True)
class Revocation:
    """What became of the selected leases."""

    revoked: tuple[Worker, ...]
    """The workers with the leases that are revoked now."""
    failed: tuple[tuple[Worker, BkpoolError], ...] = ()
    """The workers with the leases that could not be revoked. The same request may be sent again."""
    unreadable: tuple[Unreadable, ...] = ()
    """The workers that cannot be read. They may have selected leases, which are not revoked."""
    refused: tuple[str, ...] = ()
    """The namespaces whose workers bkpool may not read. They may have selected leases, which are not revoked."""


class Revoker:
    """Revokes leases.

    Args:
        store: Where the workers are.
        mirror: Knows the pools.
        leases: Changes one lease.
    """

    def __init__(self, *, store: Store, mirror: Mirror, leases: LeaseService) -> None:
        self._store = store
        self._mirror = mirror
        self._leases = leases

    async def revoke(self, selector: LeaseSelector, identities: tuple[Identity, ...]) -> Revocation:
        """Ends the selected leases of this caller, and has their connections and builds cut.

        Leases that have ended and whose builds still run are among them. If an error interrupts it, those that are
        revoked stay revoked, and a second call revokes the others.

        Args:
            selector: Which leases.
            identities: The identities of the caller. The admin reaches every lease, others their own ones.

        Raises:
            NotFound: A lease or worker was named and there is none, or it is not the caller's. Or the admin named a
                pool that does not exist.
            Unavailable: No lease was found, and there are namespaces that bkpool may not read.
            BkpoolError: None of the leases could be revoked; the error of the first.
        """
        admin = any(one.admin for one in identities)
        selected, unreadable, refused = await self._selected(selector, identities)
        if not selected and not unreadable and not refused:
            self._check_named(selector, admin=admin)
        by, slots = revoker(identities), asyncio.Semaphore(_AT_ONCE)
        failed: list[tuple[Worker, BkpoolError]] = []

        async def end(worker: Worker) -> Worker | None:
            async with slots:
                try:
                    return await self._leases.revoke(worker, by)
                except (Gone, NotFound):  # it has left its worker meanwhile, so nothing of it is open
                    return None
                except BkpoolError as error:
                    failed.append((worker, error))
                    return None

        revoked = tuple(filter(None, await asyncio.gather(*map(end, selected))))
        if failed and not revoked:
            raise failed[0][1]
        if unreadable and not revoked:
            raise UnreadableObject(unreadable[0])
        if refused and not revoked:
            raise Unavailable(f"no lease was ended: {unread_leases(refused[0])}", hint=_GIVE_RIGHTS)
        return Revocation(revoked, tuple(failed), unreadable, refused)

    async def _selected(
        self, selector: LeaseSelector, identities: tuple[Identity, ...]
    ) -> tuple[list[Worker], tuple[Unreadable, ...], tuple[str, ...]]:
        """The workers with the selected leases, those that cannot be read but may have one, and unread namespaces."""
        unreadable: tuple[Unreadable, ...] = ()
        refused: tuple[str, ...] = ()
        namespace = selector.pool.namespace if selector.pool else selector.namespace
        if selector.worker is not None:
            workers = await self._worker(selector.worker, admin=any(one.admin for one in identities))
        elif namespace is None:
            items, unreadable, refused = await list_readable(self._store, Worker)
            workers = list(items)
        else:
            listing = await self._store.list(Worker, namespace=namespace)
            workers, unreadable = list(listing.items), listing.unreadable
        mine = [w for w in workers if w.lease and is_theirs(w.pool, identities, w.lease.holder)]
        selected = sorted((w for w in mine if selector.selects(w)), key=lambda worker: worker.key)
        doubtful = (found for found in unreadable if selector.may_select(found) and may_be_theirs(found, identities))
        if selector.lease_id and selected:  # there is only one of an id
            refused = ()
        return selected, tuple(doubtful), refused

    async def _worker(self, key: Key, *, admin: bool) -> list[Worker]:
        """The worker, if it exists. The admin is told if it does not."""
        with suppress(NotFound, Forbidden):  # Forbidden: bkpool itself may not read workers in that namespace
            try:
                return [await self._store.get(Worker, *key)]
            except UnreadableObject:
                if admin:
                    raise
        if not admin:
            return []
        raise NotFound(
            f"there is no worker {key.name!r} in namespace {key.namespace!r}",
            hint="`bkpool status -p POOL` shows the workers of a pool.",
            field="workerName",
        )

    def _check_named(self, selector: LeaseSelector, *, admin: bool) -> None:
        """Raises the error for a selection without leases, if it named one lease or a pool that does not exist."""
        yours = "" if admin else " of yours"
        if selector.worker is not None:
            name, namespace = selector.worker.name, selector.worker.namespace
            raise NotFound(
                f"there is no lease{yours} on worker {name!r} in namespace {namespace!r}, so nothing was ended",
                hint="`bkpool status -p POOL` shows the workers and who holds them.",
                code="NoSuchLease",
                field="workerName",
            )
        if selector.lease_id:
            raise NotFound(
                f"there is no lease{yours} with the id {selector.lease_id!r}, so nothing was ended",
                hint="It has ended, or it is in another namespace. `bkpool status -p POOL --json` shows the ids.",
                code="NoSuchLease",
                field="leaseId",
            )
        if selector.pool is not None and admin:
            find_pool(self._mirror, selector.pool)
