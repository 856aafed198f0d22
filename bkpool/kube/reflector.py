"""A copy in memory of one kind of object in a cluster, kept up to date by list and watch.

It changes nothing in the cluster and does not interpret objects. A writer may put in what it has just written; an
older version never replaces it.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from bkpool.core.backoff import Backoff
from bkpool.core.errors import BkpoolError, Gone, Unavailable
from bkpool.core.names import Key
from bkpool.core.versioned_cache import VersionedCache
from bkpool.kube import paths
from bkpool.kube.client import KubeApi
from bkpool.kube.documents import Doc
from bkpool.kube.list_and_watch import list_and_watch
from bkpool.kube.watching import endless_watch

log = structlog.get_logger(__name__)

LONGEST_PAUSE = 15.0
"""Seconds between two tries while the cluster cannot be reached."""

DocCache = VersionedCache[Key, Doc]


@dataclass(frozen=True, slots=True)
class KubeCollection:
    """Which objects a reflector follows: those of one kind that the selectors choose."""

    api_version: str
    """Such as "v1" or "apps/v1"."""
    plural: str
    label_selector: str = ""
    field_selector: str = ""

    def path(self, namespace: str | None) -> str:
        """Where they are in the API, in one namespace or (None) in all."""
        if self.api_version == "v1":
            return paths.core(self.plural, namespace)
        return paths.group(self.api_version, self.plural, namespace)

    @property
    def params(self) -> dict[str, str]:
        """The selectors as query parameters."""
        selectors = {"labelSelector": self.label_selector, "fieldSelector": self.field_selector}
        return {name: selector for name, selector in selectors.items() if selector}


class Change(NamedTuple):
    """An object that has changed: as it is now, or as it was last."""

    key: Key
    doc: Doc
    deleted: bool


class Reflector:
    """Follows a collection, in all namespaces or in some.

    Args:
        api: The cluster. Its creator closes it.
        collection: What to follow.
        on_change: Called in the event loop with every change, whether the watch or `apply` brought it.
        namespaces: None: all of them, in one list and watch. Otherwise each has its own.
        fail_fast: Whether `run` raises an error of the first list that will not pass by itself, such as a missing
            right. Otherwise everything is tried again.
        longest_pause: Seconds between two tries, at most.
        pause: Waits that many seconds.
        jitter: Returns a number from 0 to 1: how much of the longest allowed pause is waited.
    """

    def __init__(
        self,
        api: KubeApi,
        collection: KubeCollection,
        on_change: Callable[[Change], None] = lambda _: None,
        *,
        namespaces: Sequence[str] | None = None,
        fail_fast: bool = False,
        longest_pause: float = LONGEST_PAUSE,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._collection = collection
        self._on_change = on_change
        self._fail_fast = fail_fast
        self._longest_pause = longest_pause
        self._pause = pause
        self._jitter = jitter
        self._caches: dict[str | None, DocCache] = {
            namespace: VersionedCache(paths.key_of, _version_of) for namespace in namespaces or (None,)
        }
        self._unlisted = set(self._caches)
        self._interrupted: set[str] = set()
        self._waiters: defaultdict[Key, set[asyncio.Event]] = defaultdict(set)
        self.ready = asyncio.Event()
        """Set once everything has been listed."""

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled. While the cluster is away, it is tried ever more slowly.

        Raises:
            BkpoolError: See `fail_fast`.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for namespace, cache in self._caches.items():
                    tasks.create_task(self._follow(namespace, cache))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def get(self, key: Key) -> Doc | None:
        """The object as it is known."""
        cache = self._cache_for(key)
        return None if cache is None else cache.items.get(key)

    def __iter__(self) -> Iterator[Doc]:
        return iter([doc for cache in self._caches.values() for doc in cache.items.values()])

    def apply(self, doc: Doc) -> None:
        """Takes over what has just been written or read. Does nothing if it is older than what is known."""
        cache = self._cache_for(paths.key_of(doc))
        if cache is not None:
            self._notify(cache, cache.applied(doc))

    async def until(self, key: Key, condition: Callable[[Doc | None], bool]) -> Doc | None:
        """Waits until the object, or None where there is none, fulfils the condition; returns it."""
        with self._woken_by(key) as changed:
            while not condition(found := self.get(key)):
                changed.clear()
                await changed.wait()
            return found

    async def versions(self, key: Key) -> AsyncGenerator[Doc, None]:
        """The object as it is and each time it has changed. Nothing while it does not exist.

        A reader that is slower than the changes gets the newest version only.
        """
        last: Doc | None = None
        while True:
            last = await self.until(key, lambda found: found is not None and found is not last)  # noqa: B023 - used at once
            if last is not None:
                yield last

    # --- list and watch ---------------------------------------------------------------------------------------------

    async def _follow(self, namespace: str | None, cache: DocCache) -> None:
        path = self._collection.path(namespace)

        async def list_all() -> str:
            docs, version = await self._api.list(path, **self._collection.params)
            self._notify(cache, cache.listed(docs, int(version)))
            self._note_listed(namespace, path)
            return version

        def watch(version: str) -> AsyncGenerator[Doc, None]:
            return endless_watch(self._api, path, version, jitter=self._jitter, **self._collection.params)

        def take(event: Doc) -> None:
            if event["type"] == "BOOKMARK":
                cache.bookmark(_version_of(event["object"]))
            else:
                self._notify(cache, cache.event(event["type"], event["object"]))

        def goes_on(error: Exception, seconds: float) -> bool:
            return self._note_failure(namespace, path, error, seconds)

        backoff = Backoff(self._longest_pause, jitter=self._jitter)
        await list_and_watch(list_all, watch, take, goes_on, backoff=backoff, pause=self._pause)

    def _note_failure(self, namespace: str | None, path: str, error: Exception, seconds: float) -> bool:
        """Logs the failure. Returns whether to try again."""
        if not isinstance(error, BkpoolError):  # one malformed document must not stop the watch of all others
            log.error("reflector.crashed", path=path, exc_info=error)
        elif self._fail_fast and namespace in self._unlisted and not isinstance(error, Gone | Unavailable):
            return False
        else:
            log.warning("reflector.interrupted", path=path, reason=error.message, again_in=round(seconds, 3))
        self._interrupted.add(path)
        return True

    def _note_listed(self, namespace: str | None, path: str) -> None:
        if path in self._interrupted:
            self._interrupted.discard(path)
            log.info("reflector.resumed", path=path)
        self._unlisted.discard(namespace)
        if not self._unlisted:
            self.ready.set()

    # --- changes ----------------------------------------------------------------------------------------------------

    def _notify(self, cache: DocCache, docs: Sequence[Doc]) -> None:
        """Wakes the tasks that wait for these objects and calls back. An error in a callback does not stop others."""
        for doc in docs:
            key = paths.key_of(doc)
            for waiter in self._waiters.get(key, ()):
                waiter.set()
            try:
                self._on_change(Change(key, doc, deleted=key not in cache.items))
            except Exception:
                log.exception("reflector.callback_failed", kind=self._collection.plural, object=str(key))

    def _cache_for(self, key: Key) -> DocCache | None:
        return self._caches.get(key.namespace) or self._caches.get(None)

    @contextmanager
    def _woken_by(self, key: Key) -> Iterator[asyncio.Event]:
        """An event that is set whenever the object changes."""
        waiter = asyncio.Event()
        self._waiters[key].add(waiter)
        try:
            yield waiter
        finally:
            self._waiters[key].discard(waiter)
            if not self._waiters[key]:
                del self._waiters[key]


def _version_of(doc: Doc) -> int:
    return int(doc["metadata"]["resourceVersion"])
