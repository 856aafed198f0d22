"""The pools that still have workers, and of whose spec nothing is known: deleted ones, and those that cannot be read.

Each is an object with a name and without a spec, for decisions about its workers. It writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from datetime import datetime

import structlog

from bkpool.core.errors import BkpoolError, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.unreadable import UnreadableObject
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class PoolsWithoutSpec:
    """Knows them.

    Args:
        store: Says whether a pool is deleted.
        mirror: The copy in memory.
        now: The clock.
        pause: Seconds for which a pool is left alone that could not be read from the store.
    """

    def __init__(self, store: Store, mirror: Mirror, now: Callable[[], datetime], pause: float) -> None:
        self._store = store
        self._mirror = mirror
        self._now = now
        self._pause = pause
        self._deleted: dict[Key, Pool] = {}

    def unreadable(self) -> list[Pool]:
        """The pools that cannot be read."""
        return [found.stand_in(Pool) for found in self._mirror.unreadable_pools.values()]

    def deleted(
        self, busy: Collection[Key], in_background: Callable[[Key, Coroutine[None, None, None]], None]
    ) -> list[Pool]:
        """The deleted pools that still have workers, as objects that are being deleted.

        Args:
            busy: Pools that something is done for already.
            in_background: Runs work for a pool: one that is only missing in the mirror is read first.
        """
        known = {*self._mirror.pools, *self._mirror.unreadable_pools}
        missing = {worker.pool for worker in self._mirror.workers.values()} - known
        self._deleted = {key: pool for key, pool in self._deleted.items() if key in missing}
        for key in missing - set(self._deleted) - set(busy):
            in_background(key, self._check(key))
        return list(self._deleted.values())

    async def _check(self, key: Key) -> None:
        try:
            self._mirror.apply(await self._store.get(Pool, *key))
        except NotFound:
            metadata = Metadata(name=key.name, namespace=key.namespace, deletion_timestamp=self._now())
            self._deleted[key] = Pool(metadata=metadata)
        except UnreadableObject as error:
            self._mirror.apply(error.found)
        except BkpoolError as error:
            log.warning("pool.not_read", pool=str(key), error=error.message)
            await asyncio.sleep(self._pause)
