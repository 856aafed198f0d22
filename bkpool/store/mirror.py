"""A copy of pools, workers and issuers in memory, kept up to date by list and watch. All other code reads this copy.

It never writes to the store. A writer may put in what it has just written, and an older version never replaces it.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import MappingProxyType

import structlog

from bkpool.core.auth import OIDCConfig
from bkpool.core.backoff import Backoff
from bkpool.core.names import Key
from bkpool.core.errors import DiskFull, Forbidden, Gone, NotFound, Unauthenticated, Unavailable
from bkpool.core.pool import Pool
from bkpool.core.resource import R, Resource
from bkpool.core.subscribers import Subscribers
from bkpool.core.versioned_cache import VersionedCache
from bkpool.core.worker import Worker
from bkpool.kube.list_and_watch import list_and_watch
from bkpool.store import Store, WatchEvent

log = structlog.get_logger(__name__)

_LONGEST_PAUSE = 5.0  # seconds: when the store is back, callers that wait for a worker wait for this pause, too
_TRANSIENT = (Gone, Unavailable, DiskFull)
_TRANSIENT_ONCE_LISTED = (*_TRANSIENT, Forbidden, Unauthenticated, NotFound)
"""An API server that has just restarted may refuse requests, or not know bkpool's kinds, until it has loaded its
roles and custom resource definitions."""
_UNLISTED = "the store has not been read yet"


def _cache() -> VersionedCache[Key, R]:
    return VersionedCache(lambda obj: obj.key, lambda obj: int(obj.metadata.resource_version or 0))


class Mirror:
    """Pools, workers and issuers as they were a moment ago.

    Args:
        store: Has the objects.
        configs: Whether to follow issuers, too. A gateway does not need them, and has no right to read them.
        pause: Waits that many seconds before the store is asked again.
        jitter: Returns a number from 0 to 1: how much of the longest allowed pause is waited, so that replicas spread
            out.
    """

    def __init__(
        self,
        store: Store,
        *,
        configs: bool = False,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._pause = pause
        self._jitter = jitter
        self._pools: VersionedCache[Key, Pool] = _cache()
        self._workers: VersionedCache[Key, Worker] = _cache()
        self._configs: VersionedCache[Key, OIDCConfig] = _cache()
        self._members: defaultdict[Key, dict[Key, Worker]] = defaultdict(dict)
        self._subscribers: Subscribers[[Key]] = Subscribers()
        self._config_subscribers: Subscribers[[]] = Subscribers()
        self._follows_configs = configs
        followed: tuple[type[Resource], ...] = (Pool, Worker, *((OIDCConfig,) if configs else ()))
        self._troubles = dict.fromkeys(followed, _UNLISTED)
        self._unlisted = set(followed)
        self.pools: Mapping[Key, Pool] = MappingProxyType(self._pools.items)
        self.workers: Mapping[Key, Worker] = MappingProxyType(self._workers.items)
        self.configs: Mapping[Key, OIDCConfig] = MappingProxyType(self._configs.items)
        self.ready = asyncio.Event()
        """Set once everything has been listed."""

    @property
    def trouble(self) -> str | None:
        """Why the copy may be out of date: not listed yet, or the store cannot be reached. None: it is up to date."""
        return next(iter(self._troubles.values()), None)

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled. While the store is away, it is tried ever more slowly."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow(Pool, self._pools, self._pools_changed))
            tasks.create_task(self._follow(Worker, self._workers, self._workers_changed))
            if self._follows_configs:
                tasks.create_task(self._follow(OIDCConfig, self._configs, self._configs_changed))

    def workers_of(self, pool: Key) -> list[Worker]:
        """The workers of a pool, in no particular order."""
        return list(self._members[pool].values()) if pool in self._members else []

    def apply(self, obj: Pool | Worker) -> None:
        """Takes over what has just been written. Does nothing if it is older than the copy, or was deleted since."""
        if isinstance(obj, Pool):
            self._pools_changed(self._pools.applied(obj))
        else:
            self._workers_changed(self._workers.applied(obj))

    def subscribe(self, callback: Callable[[Key], None]) -> Callable[[], None]:
        """Calls back with a pool's key, in the event loop, whenever the pool or one of its workers has changed.

        Returns:
            A function that unsubscribes.
        """
        return self._subscribers.add(callback)

    def on_config(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, in the event loop, when an issuer has changed. Returns a function that unsubscribes."""
        return self._config_subscribers.add(callback)

    async def _follow(self, kind: type[R], cache: VersionedCache[Key, R], changed: Callable[[list[R]], None]) -> None:
        async def list_all() -> str:
            listing = await self._store.list(kind)
            changed(cache.listed(listing.items, int(listing.resource_version), listing.unreadable))
            self._note_listed(kind)
            return listing.resource_version

        def watch(version: str) -> AsyncGenerator[WatchEvent[R], None]:
            return self._store.watch(kind, version)

        def take(event: WatchEvent[R]) -> None:
            changed(cache.event(event.type, event.object))

        def goes_on(error: Exception, seconds: float) -> bool:
            return self._note_failure(kind, error, seconds)

        backoff = Backoff(_LONGEST_PAUSE, jitter=self._jitter)
        await list_and_watch(list_all, watch, take, goes_on, backoff=backoff, pause=self._pause)

    def _note_listed(self, kind: type[Resource]) -> None:
        if self._troubles.pop(kind, _UNLISTED) != _UNLISTED:
            log.info("mirror.resumed", kind=kind.KIND)
        self._unlisted.discard(kind)
        if not self._troubles:
            self.ready.set()

    def _note_failure(self, kind: type[Resource], error: Exception, seconds: float) -> bool:
        """Notes and logs a failure that may pass. Returns whether to try again: any other failure ends the mirror."""
        passing = _TRANSIENT if kind in self._unlisted else _TRANSIENT_ONCE_LISTED
        if not isinstance(error, passing):
            return False
        self._troubles[kind] = error.message
        log.warning("mirror.interrupted", kind=kind.KIND, reason=error.message, again_in=round(seconds, 3))
        return True

    def _pools_changed(self, pools: list[Pool]) -> None:
        for pool in pools:
            self._subscribers.notify(pool.key)

    def _configs_changed(self, configs: list[OIDCConfig]) -> None:
        if configs:
            self._config_subscribers.notify()

    def _workers_changed(self, workers: list[Worker]) -> None:
        for worker in workers:
            members = self._members[worker.pool]
            if worker.key in self.workers:
                members[worker.key] = worker
            else:
                members.pop(worker.key, None)
            self._subscribers.notify(worker.pool)
