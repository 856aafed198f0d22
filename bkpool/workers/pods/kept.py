"""A copy in memory of what a cluster has of one kind, kept by list and watch.

It changes nothing and judges nothing. What the program itself has just written may be put in at once; what is older
than that never comes back.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager

import structlog

from bkpool.core.errors import BkpoolError, Gone, Unavailable
from bkpool.core.names import Key
from bkpool.kube import Doc, KubeApi, paths
from bkpool.workers.pods.pod_spec import SELECTOR, key_of

log = structlog.get_logger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 15.0  # seconds, as in store.mirror
_WATCH_SECONDS = 240  # how long a watch is asked to last: balancers on the way often cut idle ones at five minutes


def _version_of(doc: Doc) -> int:
    return int(doc["metadata"]["resourceVersion"])


class Copy:
    """The objects of one collection. Every method returns the keys of the objects that have changed."""

    def __init__(self) -> None:
        self.items: dict[Key, Doc] = {}
        self.seen = 0
        """Up to this version everything is known: what is older and not here has been deleted."""

    def listed(self, docs: Sequence[Doc], version: str) -> list[Key]:
        """Takes over a whole listing."""
        self.seen = int(version)
        names = {key_of(doc) for doc in docs}
        gone = [key for key, doc in self.items.items() if key not in names and _version_of(doc) <= self.seen]
        for key in gone:
            del self.items[key]
        return gone + [key_of(doc) for doc in docs if self._put(doc)]

    def followed(self, event: Doc) -> list[Key]:
        """Takes over an event of a watch."""
        doc = event["object"]
        self.seen = max(self.seen, _version_of(doc))
        if event["type"] == "BOOKMARK":
            return []
        key = key_of(doc)
        if event["type"] != "DELETED":
            return [key] if self._put(doc) else []
        held = self.items.get(key)
        if held is None or _version_of(held) > _version_of(doc):
            return []
        del self.items[key]
        return [key]

    def applied(self, doc: Doc) -> list[Key]:
        """Takes over what has just been written or read, if it is news."""
        return [key_of(doc)] if _version_of(doc) > self.seen and self._put(doc) else []

    def _put(self, doc: Doc) -> bool:
        held = self.items.get(key_of(doc))
        if held is not None and _version_of(held) >= _version_of(doc):
            return False
        self.items[key_of(doc)] = doc
        return True


class Kept:
    """All objects of one kind that are workers', in all namespaces or in some.

    Args:
        api: The cluster.
        plural: The kind, of the core group.
        namespaces: None: all.
        changed: Called with the key of each object that has changed, in the event loop.
        pause: Waits that many seconds before the cluster is asked again.
        jitter: A number from 0 to 1: how much of the longest allowed pause is taken, so that replicas spread out.
    """

    def __init__(
        self,
        api: KubeApi,
        plural: str,
        namespaces: Sequence[str] | None,
        changed: Callable[[Key], None],
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._plural = plural
        self._changed = changed
        self._pause = pause
        self._jitter = jitter
        self._copies: dict[str | None, Copy] = {namespace: Copy() for namespace in namespaces or (None,)}
        self._unlisted = set(self._copies)
        self._waiting: defaultdict[Key, set[asyncio.Event]] = defaultdict(set)
        self.ready = asyncio.Event()
        """Set once everything has been listed."""

    async def run(self) -> None:
        """Keeps the copy up to date until cancelled; a cluster that is away is asked again, ever more slowly.

        Raises:
            BkpoolError: Whatever else than that keeps it from being listed for the first time.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                for namespace, copy in self._copies.items():
                    tasks.create_task(self._follow(namespace, copy))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def get(self, key: Key) -> Doc | None:
        """The object as it is known."""
        return self._copy_of(key).items.get(key)

    def __iter__(self) -> Iterator[Doc]:
        return iter([doc for copy in self._copies.values() for doc in copy.items.values()])

    def apply(self, doc: Doc) -> None:
        """Takes over what has just been written or read; does nothing if it is older than what is known."""
        self._tell(self._copy_of(key_of(doc)).applied(doc))

    async def until(self, key: Key, condition: Callable[[Doc | None], bool]) -> None:
        """Waits until it is so."""
        with self._waking(key) as changed:
            while not condition(self.get(key)):
                changed.clear()
                await changed.wait()

    async def _follow(self, namespace: str | None, copy: Copy) -> None:
        path, failures = paths.core(self._plural, namespace), 0
        while True:
            try:
                docs, version = await self._api.list(path, labelSelector=SELECTOR)
                self._tell(copy.listed(docs, version))
                self._note_listed(namespace)
                failures = 0
                await self._watch(path, copy)
            except BkpoolError as error:
                if namespace in self._unlisted and not isinstance(error, Gone | Unavailable):
                    raise
                log.warning("kept.interrupted", kind=self._plural, reason=error.message)
            except Exception:  # one odd document must not end what everything else is seen by
                log.exception("kept.crashed", kind=self._plural)
            failures += 1
            await self._pause(self._jitter() * min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(failures, 10)))

    async def _watch(self, path: str, copy: Copy) -> None:
        """Follows until that fails; the server ends a watch in good order every few minutes."""
        while True:
            before, heard = copy.seen, False
            seconds = round(_WATCH_SECONDS * (1 + self._jitter() / 4))
            watch = self._api.watch(path, str(before), labelSelector=SELECTOR, timeoutSeconds=str(seconds))
            async with aclosing(watch) as events:
                async for event in events:
                    heard = True
                    self._tell(copy.followed(event))
            if not heard:  # not even the bookmark with which a watch ends
                raise Unavailable(f"Kubernetes: the watch of {path} ended without a word", hint="It is tried again.")

    def _copy_of(self, key: Key) -> Copy:
        return self._copies.get(key.namespace) or self._copies.get(None) or Copy()

    def _note_listed(self, namespace: str | None) -> None:
        self._unlisted.discard(namespace)
        if not self._unlisted:
            self.ready.set()

    def _tell(self, keys: Sequence[Key]) -> None:
        for key in keys:
            for event in self._waiting.get(key, ()):
                event.set()
            self._changed(key)

    @contextmanager
    def _waking(self, key: Key) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting[key].add(event)
        try:
            yield event
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]
