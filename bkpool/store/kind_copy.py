"""A copy in memory of one kind of the store's objects, kept up to date by list and watch.

Objects that cannot be read are kept apart: nobody decides by an earlier state of them. It never writes to the store,
and what a failure means is for its owner to say.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Generic, NoReturn

import structlog

from bkpool.core.backoff import Backoff
from bkpool.core.names import Key
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable
from bkpool.core.versioned_cache import VersionedCache
from bkpool.kube.list_and_watch import list_and_watch
from bkpool.store import Listing, Store, WatchEvent

log = structlog.get_logger(__name__)


class KindCopy(Generic[R]):
    """The objects of one kind: those that can be read, and apart from them those that cannot.

    Args:
        kind: The kind.
        scopes: The namespaces that are followed one by one; (None,): all of them at once.
        changed: Called with each object that has changed, and with what it was if it could not be read before.
    """

    def __init__(
        self,
        kind: type[R],
        scopes: tuple[str | None, ...],
        changed: Callable[[R | Unreadable, Unreadable | None], None],
    ) -> None:
        self.kind = kind
        self._changed = changed
        self._caches: dict[str | None, VersionedCache[Key, R | Unreadable]] = {
            scope: VersionedCache(lambda found: found.key, version_of) for scope in scopes
        }
        self._readable: dict[Key, R] = {}
        self._unreadable: dict[Key, Unreadable] = {}
        self.readable: Mapping[Key, R] = MappingProxyType(self._readable)
        self.unreadable: Mapping[Key, Unreadable] = MappingProxyType(self._unreadable)

    @property
    def scopes(self) -> tuple[str | None, ...]:
        """The namespaces that are followed one by one."""
        return tuple(self._caches)

    async def follow(
        self,
        store: Store,
        scope: str | None,
        on_failure: Callable[[Exception, float], bool],
        on_list: Callable[[Listing[R]], None] = lambda _: None,
        on_event: Callable[[WatchEvent[R]], None] = lambda _: None,
        *,
        backoff: Backoff,
        pause: Callable[[float], Awaitable[None]],
    ) -> NoReturn:
        """Keeps a scope up to date until cancelled.

        Args:
            store: Has the objects.
            scope: One of `scopes`.
            on_failure: See `list_and_watch`.
            on_list: Called with each list that was taken over.
            on_event: Called with each event that was taken over.
            backoff: The pauses after failures.
            pause: Waits that many seconds.
        """

        async def list_all() -> str:
            listing = await store.list(self.kind, namespace=scope)
            self.listed(listing, scope)
            on_list(listing)
            return listing.resource_version

        def watch(version: str) -> AsyncGenerator[WatchEvent[R], None]:
            return store.watch(self.kind, version, namespace=scope)

        def take(event: WatchEvent[R]) -> None:
            self.event(event, scope)
            on_event(event)

        await list_and_watch(list_all, watch, take, on_failure, backoff=backoff, pause=pause)

    def listed(self, listing: Listing[R], scope: str | None = None) -> None:
        """Takes over a complete list of a scope."""
        cache = self._caches[scope]
        found: list[R | Unreadable] = [*listing.items, *listing.unreadable]
        self._take(cache, cache.listed(found, int(listing.resource_version)))

    def event(self, event: WatchEvent[R], scope: str | None = None) -> None:
        """Takes over one event of a scope's watch."""
        cache = self._caches[scope]
        self._take(cache, cache.event(event.type, event.object))

    def applied(self, found: R | Unreadable) -> None:
        """Takes over what has just been written or read, if it is news."""
        cache = self._cache_of(found.key)
        if cache is not None:
            self._take(cache, cache.applied(found))

    def deleted(self, key: Key) -> bool:
        """Takes over that an object is not there any more. Returns whether it was known, and could be read."""
        last, cache = self._readable.get(key), self._cache_of(key)
        if last is None or cache is None:
            return False
        self._take(cache, cache.event("DELETED", last))
        return True

    def _cache_of(self, key: Key) -> VersionedCache[Key, R | Unreadable] | None:
        return self._caches.get(key.namespace) or self._caches.get(None)

    def _take(self, cache: VersionedCache[Key, R | Unreadable], changed: list[R | Unreadable]) -> None:
        for found in changed:
            key = found.key
            before = self._unreadable.pop(key, None)
            if key not in cache.items:
                self._readable.pop(key, None)
            elif isinstance(found, Unreadable):
                self._readable.pop(key, None)
                self._unreadable[key] = found
                if before is None or before.reason != found.reason:
                    log.warning("store.object_unreadable", kind=self.kind.KIND, object=str(key), reason=found.reason)
            else:
                self._readable[key] = found
                if before is not None:
                    log.info("store.object_readable", kind=self.kind.KIND, object=str(key))
            self._changed(found, before)


def version_of(found: Resource | Unreadable) -> int:
    """The version by which two states of an object are ordered."""
    return int(found.version if isinstance(found, Unreadable) else found.metadata.resource_version or 0)


def where(scope: str | None) -> dict[str, str]:
    """The scope for a line of the log."""
    return {} if scope is None else {"namespace": scope}
