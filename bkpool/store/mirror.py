"""A copy of pools, workers and issuers in memory, kept up to date by list and watch. All other code reads this copy.

It never writes to the store. A writer may put in what it has just written, and an older version never replaces it.
Objects that cannot be read are kept apart: nobody decides by an earlier state of them.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple, cast

import structlog

from bkpool.core.auth import OIDCConfig
from bkpool.core.backoff import Backoff
from bkpool.core.claim_order import ClaimOrder, Request
from bkpool.core.errors import DiskFull, Forbidden, Gone, NotFound, Unauthenticated, Unavailable
from bkpool.core.lease_index import LeaseIndex
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.pool_index import PoolIndex
from bkpool.core.resource import R, Resource
from bkpool.core.subscribers import Subscribers
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.store import Listing, Store, WatchEvent
from bkpool.store.heartbeats import Heartbeats
from bkpool.store.kind_copy import KindCopy, version_of, where
from bkpool.store.rush import Rush
from bkpool.store.troubles import Followed, Troubles

log = structlog.get_logger(__name__)

_LONGEST_PAUSE = 5.0  # seconds: when the store is back, callers that wait for a worker wait for this pause, too
_TRANSIENT = (Gone, Unavailable, DiskFull)
_TRANSIENT_ONCE_LISTED = (*_TRANSIENT, Forbidden, Unauthenticated, NotFound)
"""An API server that has just restarted may refuse requests, or not know bkpool's kinds, until it has loaded its
roles and custom resource definitions."""


class _AllOf:
    """The values of several mappings. It can be looked through again and again."""

    def __init__(self, *mappings: Mapping[Key, Worker | Unreadable]) -> None:
        self._mappings = mappings

    def __iter__(self) -> Iterator[Worker | Unreadable]:
        return chain.from_iterable(mapping.values() for mapping in self._mappings)


class MirrorChange(NamedTuple):
    """What has changed: a pool, or one of its workers."""

    pool: Key
    slot: Slot | None = None
    """The slot of the worker; None: the pool itself has changed, or a worker that is in no slot."""


class Mirror:
    """Pools, workers and issuers as they were a moment ago.

    Args:
        store: Has the objects.
        configs: Whether to follow issuers, too. A gateway does not need them, and has no right to read them.
        heartbeats: Whether to follow the heartbeats of gateways, too. The same is true of them.
        pause: Waits that many seconds before the store is asked again.
        jitter: Returns a number from 0 to 1: how much of the longest allowed pause is waited, so that replicas spread
            out.
        seconds: Monotonic time.
    """

    def __init__(
        self,
        store: Store,
        *,
        configs: bool = False,
        heartbeats: bool = False,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._pause = pause
        self._jitter = jitter
        self._pools = KindCopy(Pool, store.scopes(Pool), self._pool_changed)
        self._workers = KindCopy(Worker, store.scopes(Worker), self._worker_changed)
        self._configs = KindCopy(OIDCConfig, store.scopes(OIDCConfig), self._config_changed)
        self._indexes: dict[Key, PoolIndex] = {}
        self._unreadable_members: defaultdict[Key, dict[Key, Unreadable]] = defaultdict(dict)
        self.rush = Rush()
        """The answers that are being made from this copy."""
        self.leases = LeaseIndex()
        """The leases of all workers, by the digests of their tokens."""
        self._claims = {scope: ClaimOrder() for scope in self._workers.scopes}
        self._subscribers: Subscribers[[MirrorChange]] = Subscribers()
        self._claim_subscribers: Subscribers[[Request]] = Subscribers()
        self._config_subscribers: Subscribers[[]] = Subscribers()
        self._follows_configs = configs
        self._follows_heartbeats = heartbeats
        self.heartbeats = Heartbeats(store, pause=pause, jitter=jitter)
        """The heartbeats of gateways; empty where they are not followed."""
        if not heartbeats:
            self.heartbeats.answered.set()
        followed: tuple[type[Resource], ...] = (Pool, Worker, *((OIDCConfig,) if configs else ()))
        self._troubles = Troubles(((kind, scope) for kind in followed for scope in store.scopes(kind)), seconds)
        self.pools = self._pools.readable
        self.workers = self._workers.readable
        self.configs = self._configs.readable
        self.unreadable_pools = self._pools.unreadable
        self.unreadable_workers = self._workers.unreadable
        self.unreadable_configs = self._configs.unreadable
        self.ready = asyncio.Event()
        """Set once everything has been listed."""

    @property
    def trouble(self) -> str | None:
        """Why the copy may be out of date: not listed yet, or the store cannot be reached. None: it is up to date.

        One namespace that may not be read any more is no reason: its pools alone stand still. Nor are issuers for a
        minute.
        """
        return self._troubles.worst

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled. While the store is away, it is tried ever more slowly."""
        async with asyncio.TaskGroup() as tasks:
            for scope in self._pools.scopes:
                tasks.create_task(self._follow(self._pools, scope))
            for scope in self._workers.scopes:
                tasks.create_task(self._follow(self._workers, scope))
            if self._follows_configs:
                for scope in self._configs.scopes:
                    tasks.create_task(self._follow(self._configs, scope))
            if self._follows_heartbeats:
                tasks.create_task(self.heartbeats.run())

    def workers_of(self, pool: Key) -> list[Worker]:
        """The workers of a pool, in no particular order."""
        return list(self._indexes[pool].workers.values()) if pool in self._indexes else []

    def index_of(self, pool: Key) -> PoolIndex:
        """The workers of a pool by what allocation asks for, kept up to date. That of an unknown pool stays empty."""
        index = self._indexes.get(pool)
        if index is None:
            index = PoolIndex()
            if pool in self.pools:
                self._indexes[pool] = index
        return index

    def claims_in(self, namespace: str) -> ClaimOrder:
        """Which lease of a request was claimed first, of the pools in this namespace."""
        return self._claims.get(namespace) or self._claims[None]

    def all_workers(self) -> Iterable[Worker | Unreadable]:
        """Every worker, also those that cannot be read, in no particular order. It is no copy."""
        return _AllOf(self.workers, self.unreadable_workers)

    def unreadable_of(self, pool: Key) -> list[Unreadable]:
        """The workers of a pool that cannot be read, in no particular order."""
        return list(self._unreadable_members[pool].values()) if pool in self._unreadable_members else []

    def unreadable_slots(self, pool: Key) -> frozenset[Slot]:
        """The slots of a pool whose worker cannot be read: nothing is created, started or stopped there."""
        return frozenset(slot for found in self.unreadable_of(pool) if (slot := found.slot))

    def apply(self, obj: Pool | Worker | Unreadable) -> None:
        """Takes over what has just been written or read. Does nothing if it is older than the copy, or deleted since.

        Args:
            obj: The object; or a pool or worker that could not be read (`UnreadableObject.found`).
        """
        if isinstance(obj, Pool):
            self._pools.applied(obj)
        elif isinstance(obj, Worker):
            self._workers.applied(obj)
        elif obj.kind is Pool:
            self._pools.applied(obj)
        elif obj.kind is Worker:
            self._workers.applied(obj)

    def subscribe(self, callback: Callable[[MirrorChange], None]) -> Callable[[], None]:
        """Calls back, in the event loop, whenever a pool or a worker has changed.

        Returns:
            A function that unsubscribes.
        """
        return self._subscribers.add(callback)

    def subscribe_afterwards(self, callback: Callable[[MirrorChange], None]) -> Callable[[], None]:
        """The same for those whom nobody waits for: while answers are being made, each change comes once after them.

        Returns:
            A function that unsubscribes.
        """
        note, forget = self.rush.collected(callback)
        unsubscribe = self._subscribers.add(note)

        def end() -> None:
            unsubscribe()
            forget()

        return end

    def on_claims(self, callback: Callable[[Request], None]) -> Callable[[], None]:
        """Calls back, in the event loop, when list or watch has shown a change of a request's leases.

        Returns:
            A function that unsubscribes.
        """
        return self._claim_subscribers.add(callback)

    def on_config(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, in the event loop, when an issuer has changed. Returns a function that unsubscribes."""
        return self._config_subscribers.add(callback)

    async def _follow(self, copy: KindCopy[R], scope: str | None) -> None:
        kind = copy.kind

        def listed(listing: Listing[R]) -> None:
            if kind is Worker:
                found = cast("list[Worker | Unreadable]", [*listing.items, *listing.unreadable])
                self._claims_changed(self._claims[scope].listed(found, int(listing.resource_version)))
            if self._troubles.listed((kind, scope)):
                log.info("mirror.resumed", kind=kind.KIND, **where(scope))
            if not self._troubles.unlisted:
                self.ready.set()

        def changed(event: WatchEvent[R]) -> None:
            if kind is Worker:
                now = None if event.type == "DELETED" else cast("Worker | Unreadable", event.object)
                self._claims_changed(self._claims[scope].event(event.object.key, now, version_of(event.object)))

        def goes_on(error: Exception, seconds: float) -> bool:
            return self._note_failure((kind, scope), error, seconds)

        backoff = Backoff(_LONGEST_PAUSE, jitter=self._jitter)
        await copy.follow(self._store, scope, goes_on, listed, changed, backoff=backoff, pause=self._pause)

    def _claims_changed(self, requests: set[Request]) -> None:
        for request in requests:
            self._claim_subscribers.notify(request)

    def _note_failure(self, followed: Followed, error: Exception, seconds: float) -> bool:
        """Notes and logs a failure that may pass. Returns whether to try again: any other failure ends the mirror."""
        kind, scope = followed
        passing = _TRANSIENT if followed in self._troubles.unlisted else _TRANSIENT_ONCE_LISTED
        if not isinstance(error, passing):
            return False
        if seconds:  # else it is listed again at once: the copy is as good as with a watch that is a little late
            self._troubles.note(followed, error)
        log.warning(
            "mirror.interrupted", kind=kind.KIND, **where(scope), reason=error.message, again_in=round(seconds, 3)
        )
        return True

    def _pool_changed(self, pool: Pool | Unreadable, _before: Unreadable | None) -> None:
        self._drop_index_of_nothing(pool.key)
        self._subscribers.notify(MirrorChange(pool.key))

    def _config_changed(self, _config: OIDCConfig | Unreadable, _before: Unreadable | None) -> None:
        self._config_subscribers.notify()

    def _worker_changed(self, worker: Worker | Unreadable, before: Unreadable | None) -> None:
        key, pool = worker.key, worker.pool
        self.leases.put(key, self.workers.get(key) or self.unreadable_workers.get(key))
        if before is not None and before.pool is not None:
            self._unreadable_members[before.pool].pop(key, None)
            if before.pool != pool:
                self._subscribers.notify(MirrorChange(before.pool))
        if pool is None:
            return
        slot = worker.slot
        if slot is not None:
            if pool not in self._indexes:
                self._indexes[pool] = PoolIndex()
            self._indexes[pool].put(slot, self.workers.get(key))
            self._drop_index_of_nothing(pool)
        if isinstance(worker, Unreadable) and key in self.unreadable_workers:
            self._unreadable_members[pool][key] = worker
        self._subscribers.notify(MirrorChange(pool, slot))

    def _drop_index_of_nothing(self, pool: Key) -> None:
        if pool not in self.pools and pool in self._indexes and not self._indexes[pool].workers:
            del self._indexes[pool]
