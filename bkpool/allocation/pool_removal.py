"""Begins the removal of a pool at the admin's request. The controller carries it out (`core.removal`).

It deletes nothing itself. Where pools are custom resources, it says how to delete one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import structlog

from bkpool.allocation.leases import MAX_CONFLICTS
from bkpool.allocation.revocation import LeaseSelector, Revoker
from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.removal import being_removed, removal_of, what_happens
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker
from bkpool.identity import Identity
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PoolRemoval:
    """A removal that has begun."""

    pool: Pool
    leases: int
    """Leases that go on."""
    what_happens: str
    """A sentence about what is left of the pool, and until when."""


class PoolRemover:
    """Begins removals.

    Args:
        store: Where pools are.
        mirror: Gets what is written.
        revoker: Ends the leases of a pool that is removed at once.
        now: The clock.
        only_files: Whether pools come from files and from requests like this one. False: they are custom resources.
    """

    def __init__(
        self, *, store: Store, mirror: Mirror, revoker: Revoker, now: Callable[[], datetime], only_files: bool
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._revoker = revoker
        self._now = now
        self._only_files = only_files

    async def remove(self, key: Key, identities: tuple[Identity, ...], *, at_once: bool) -> PoolRemoval:
        """Begins to remove a pool, or goes on with it.

        Args:
            key: The pool.
            identities: Those of the caller, who is the admin.
            at_once: Its leases are revoked, and its caches are not kept.

        Raises:
            NotFound: There is no such pool.
            Conflict: Pools are custom resources here, or others change the pool all the time.
        """
        pool = await self._marked(key, at_once=at_once)
        log.warning("pool.removing", pool=str(key), reason="the admin deleted it", at_once=at_once)
        removal = removal_of(pool)
        if at_once and removal:  # else it is gone: no worker can have had its name
            with suppress(NotFound):  # the controller was faster
                await self._revoker.revoke(LeaseSelector(pool=key), identities)
        workers = [w for w in (await self._store.list(Worker, namespace=key.namespace)).items if w.pool == key]
        leased = [worker for worker in workers if worker.lease and not worker.lease.ended(self._now())]
        last_end = max((end for w in workers if (end := w.last_activity_at)), default=None)
        leases = sum(worker.lease is not None for worker in workers)
        sentence = what_happens(pool, removal, leases, last_end, self._now()) if removal else ""
        return PoolRemoval(pool, len(leased), sentence)

    async def _marked(self, key: Key, *, at_once: bool) -> Pool:
        for _ in range(MAX_CONFLICTS):
            try:
                pool = await self._store.get(Pool, *key)
            except NotFound:
                raise NotFound(
                    f"there is no pool {key.name!r} in namespace {key.namespace!r}",
                    hint="`bkpool status` lists the pools.",
                    field="poolName",
                ) from None
            except UnreadableObject as error:
                pool = error.found.stand_in(Pool)  # its spec is of no use any more
            if not self._only_files:
                raise Conflict(
                    f"pool {key.name!r} is a custom resource, so this appliance does not delete it",
                    hint=f"kubectl -n {key.namespace} delete buildkitpool {key.name} (this ends its leases at once)",
                    code="CustomResource",
                )
            try:
                marked = await self._store.replace(being_removed(pool, self._now(), caches_at_once=at_once))
            except Conflict:
                continue
            except UnreadableObject:  # not its spec, but its name: no worker and no cache was ever made
                await self._store.delete(Pool, *key, uid=pool.uid)
                return pool
            self._mirror.apply(marked)
            return marked
        raise Conflict(f"too many requests change pool {key} at once", hint="Try again.", retry_after=1)
