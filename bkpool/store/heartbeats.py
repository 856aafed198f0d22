"""A copy of the heartbeats of gateways in memory, kept up to date by list and watch.

A cluster whose definitions or rights are of an earlier version does not have them: then the copy stays empty, and
nothing else suffers. It never writes to the store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import MappingProxyType

import structlog

from bkpool.core.backoff import Backoff
from bkpool.core.errors import DiskFull, Forbidden, Gone, NotFound, Unauthenticated, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key
from bkpool.core.subscribers import Subscribers
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.versioned_cache import VersionedCache
from bkpool.kube.list_and_watch import list_and_watch
from bkpool.store import Store, WatchEvent

log = structlog.get_logger(__name__)

_LONGEST_PAUSE = 60.0
"""Seconds until a copy that is refused is tried again: somebody may apply the manifests meanwhile."""
_REFUSED = (Forbidden, NotFound)
_TRANSIENT = (Gone, Unavailable, DiskFull, Unauthenticated)
_Cache = VersionedCache[Key, GatewayHeartbeat]


class Heartbeats:
    """The heartbeats as they were a moment ago.

    Args:
        store: Has the objects.
        pause: Waits that many seconds before the store is asked again.
        jitter: Returns a number from 0 to 1: how much of the longest allowed pause is waited.
    """

    def __init__(
        self,
        store: Store,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._pause = pause
        self._jitter = jitter
        self._caches = {scope: _empty_cache() for scope in store.scopes(GatewayHeartbeat)}
        self._gateways: dict[Key, GatewayHeartbeat] = {}
        self._asked: set[str | None] = set()
        self._followed: set[str | None] = set()
        self._subscribers: Subscribers[[Key]] = Subscribers()
        self._followed_subscribers: Subscribers[[]] = Subscribers()
        self.gateways: Mapping[Key, GatewayHeartbeat] = MappingProxyType(self._gateways)
        self.answered = asyncio.Event()
        """Set once the store has said for all namespaces whether it has them."""

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for scope in self._caches:
                tasks.create_task(self._follow(scope))

    def followed_in(self, namespace: str) -> bool:
        """Whether this process sees the heartbeats of a namespace. Where it does not, no gateway must rely on one."""
        return bool(self._followed & {namespace, None})

    def subscribe(self, callback: Callable[[Key], None]) -> Callable[[], None]:
        """Calls back with the name of each heartbeat that has changed. Returns a function that unsubscribes."""
        return self._subscribers.add(callback)

    def on_followed(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back when `followed_in` may have changed. Returns a function that unsubscribes."""
        return self._followed_subscribers.add(callback)

    async def is_current(self, key: Key, known: GatewayHeartbeat | None) -> bool:
        """Asks the store itself whether a heartbeat is there as it was known. The copy has afterwards what is there.

        Where heartbeats cannot be read, no gateway relies on one, so that none is missing.

        Args:
            key: Its name.
            known: It as it was known to the caller, perhaps before the copy was corrected; None: there was none.
        """
        cache = self._cache_of(key)
        try:
            found = await self._store.get(GatewayHeartbeat, *key)
        except NotFound:
            if (held := self.gateways.get(key)) is not None:
                self._take(cache, cache.event("DELETED", held))
            return known is None
        except (Forbidden, UnreadableObject):
            return True
        self._take(cache, cache.applied(found))
        return known is not None and (known.uid, _version_of(known)) == (found.uid, _version_of(found))

    async def _follow(self, scope: str | None) -> None:
        cache = self._caches[scope]

        async def list_all() -> str:
            listing = await self._store.list(GatewayHeartbeat, namespace=scope)
            self._note(scope, followed=True)
            self._take(cache, cache.listed(listing.items, int(listing.resource_version)))
            return listing.resource_version

        def watch(version: str) -> AsyncGenerator[WatchEvent[GatewayHeartbeat], None]:
            return self._store.watch(GatewayHeartbeat, version, namespace=scope)

        def on_event(event: WatchEvent[GatewayHeartbeat]) -> None:
            if not isinstance(event.object, Unreadable):
                self._take(cache, cache.event(event.type, event.object))

        def goes_on(error: Exception, _seconds: float) -> bool:
            if isinstance(error, _REFUSED):
                if scope in self._followed or scope not in self._asked:
                    log.info("heartbeats.not_followed", reason=error.message)
                self._note(scope, followed=False)
            return isinstance(error, (*_REFUSED, *_TRANSIENT))

        backoff = Backoff(_LONGEST_PAUSE, jitter=self._jitter)
        await list_and_watch(list_all, watch, on_event, goes_on, backoff=backoff, pause=self._pause)

    def _note(self, scope: str | None, *, followed: bool) -> None:
        changed = (scope in self._followed) is not followed
        (self._followed.add if followed else self._followed.discard)(scope)
        self._asked.add(scope)
        if self._asked == self._caches.keys():
            self.answered.set()
        if changed:
            self._followed_subscribers.notify()

    def _cache_of(self, key: Key) -> _Cache:
        return self._caches.get(key.namespace) or self._caches.get(None) or _empty_cache()

    def _take(self, cache: _Cache, changed: list[GatewayHeartbeat]) -> None:
        for found in changed:
            if found.key in cache.items:
                self._gateways[found.key] = found
            else:
                self._gateways.pop(found.key, None)
            self._subscribers.notify(found.key)


def _empty_cache() -> _Cache:
    return VersionedCache(lambda found: found.key, _version_of)


def _version_of(found: GatewayHeartbeat) -> int:
    return int(found.metadata.resource_version or 0)
