"""Finds out whether a pool is deleted that has workers and is not in the mirror: it may only be missing there.

It writes nothing, and decides nothing about the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


class MissingPools:
    """Asks the store about them.

    Args:
        store: Says whether a pool is deleted.
        mirror: The copy in memory. It gets what is found.
        now: The clock.
        deleted: Called with a pool that is deleted, as an object that is being deleted.
        pause: Seconds for which a pool is left alone that could not be read from the store.
    """

    def __init__(
        self, store: Store, mirror: Mirror, now: Callable[[], datetime], deleted: Callable[[Pool], None], pause: float
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._now = now
        self._deleted = deleted
        self._pause = pause

    async def ask(self, key: Key) -> None:
        """Asks about one pool."""
        try:
            self._mirror.apply(await self._store.get(Pool, *key))
        except NotFound:
            metadata = Metadata(name=key.name, namespace=key.namespace, deletion_timestamp=self._now())
            self._deleted(Pool(metadata=metadata))
        except UnreadableObject as error:
            self._mirror.apply(error.found)
        except BkpoolError as error:
            log.warning("pool.not_read", pool=str(key), error=error.message)
            await asyncio.sleep(self._pause)
