"""The Store in one SQLite file, for a machine without a cluster.

One thread writes and one reads; the event loop never touches the file. A watch reads the event log from the file, for
old and new changes alike. So there is no gap between them, no queue that a slow reader could fill, and no polling.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from bkpool.core.errors import Gone, InvalidInput
from bkpool.core.names import Key, slot_of
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.store import Listing, Store, WatchEvent, database
from bkpool.store.recent import RecentlyWritten
from bkpool.store.tables import Tables
from bkpool.store.thread import SqlThread

HISTORY = 10_000
"""Events that the log keeps, some 20 MB. At fifty changes a second, a reader may be away for over three minutes."""


def _nothing(_tables: Tables) -> None:
    pass


def _group(kind: type[Resource], key: Key) -> Key:
    """The group of a command about this object. A pool and its workers are one group."""
    if kind is not Worker:
        return key
    try:
        slot = slot_of(key)
    except InvalidInput:
        return key
    return Key(slot.namespace, slot.pool)


def _utc() -> datetime:
    return datetime.now(UTC)


class SqliteStore(Store):
    """A Store for one event loop. Open it with `open`, and only once for a file (see home.lock.HomeLock)."""

    def __init__(self, path: Path, *, now: Callable[[], datetime], history: int) -> None:
        self._watches: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        recent = RecentlyWritten()

        def start(name: str, begin: str, *, read_only: bool) -> SqlThread:
            db = database.connect(path, read_only=read_only)
            return SqlThread(
                path, db, Tables(db, now=now, history=history, recent=recent), begin, self._wake, name=name
            )

        self._writer = start("store writer", "BEGIN IMMEDIATE", read_only=False)
        self._reader = start("store reader", "BEGIN", read_only=True)

    @classmethod
    async def open(
        cls, path: Path, *, now: Callable[[], datetime] = _utc, history: int = HISTORY, only_user: bool = True
    ) -> Self:
        """Opens the store, and creates it if there is no file.

        Args:
            path: The database file; its directory exists.
            now: The clock for creation and deletion timestamps.
            history: How many events the log keeps for watches.
            only_user: Whether the caller holds the lock of the home, so that a file of an earlier version may be
                migrated.

        Raises:
            HostFault: `Unreadable` (damaged, of another program, of a newer bkpool), `DiskFull` or `Permission`.
        """
        await asyncio.to_thread(database.prepare, path, only_user=only_user)
        return cls(path, now=now, history=history)

    async def close(self) -> None:
        """Finishes what was started and closes the file. A watch that is still open raises Unavailable."""
        await self._reader.close()
        await self._writer.close()
        self._wake(self._watches.keys())

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """See Store."""
        key = Key(namespace, name)
        return await self._reader.run(lambda tables: tables.get(kind, key), _group(kind, key))

    async def list(
        self, kind: type[R], *, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Listing[R]:
        """See Store."""
        return await self._reader.run(lambda tables: tables.list(kind, namespace, labels or {}), kind)

    async def create(self, obj: R) -> R:
        """See Store."""
        return await self._writer.run(lambda tables: tables.create(obj), _group(type(obj), obj.key))

    async def replace(self, obj: R) -> R:
        """See Store."""
        return await self._writer.run(lambda tables: tables.replace(obj), _group(type(obj), obj.key))

    async def replace_status(self, obj: R) -> R:
        """See Store."""
        return await self._writer.run(lambda tables: tables.replace_status(obj), _group(type(obj), obj.key))

    async def patch_status(self, found: Unreadable, fields: Mapping[str, Any]) -> None:
        """See Store."""
        await self._writer.run(lambda tables: tables.patch_status(found, fields), found.key)

    async def delete(
        self,
        kind: type[R],
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """See Store."""
        key = Key(namespace, name)
        await self._writer.run(lambda tables: tables.delete(kind, key, uid, resource_version), _group(kind, key))

    async def answers(self) -> None:
        """See Store."""
        await asyncio.gather(self._reader.run(_nothing), self._writer.run(_nothing))

    def scopes(self, kind: type[Resource]) -> tuple[str | None, ...]:  # noqa: ARG002
        """See Store."""
        return (None,)

    async def watch(
        self, kind: type[R], since: str, *, namespace: str | None = None
    ) -> AsyncGenerator[WatchEvent[R], None]:
        """See Store."""
        if not since.isdecimal():
            raise Gone(f"{since[:40]!r} is not a version of this store", hint="List again.")
        version = int(since)
        changed = asyncio.Event()
        self._watches[kind.KIND].add(changed)
        try:
            while True:
                changed.clear()
                page = await self._reader.run(partial(Tables.events_after, kind=kind, version=version), kind)
                for event in page.events:
                    if namespace in {None, event.object.key.namespace}:
                        yield event
                version = page.reached
                if page.complete:
                    await changed.wait()
        finally:
            self._watches[kind.KIND].discard(changed)

    def _wake(self, kinds: Collection[str]) -> None:
        for kind in kinds:
            for changed in self._watches[kind]:
                changed.set()
