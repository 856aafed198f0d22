"""Puts the label of its pool on each worker that lacks it: a gateway in a cluster lists and watches by that label.

bkpool makes no worker without it, but a person or another program may have removed it. Nothing else of a worker is
written, and one that cannot be read is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable
from bkpool.core.names import LABEL_POOL, Key
from bkpool.core.worker import Worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror, MirrorChange

log = structlog.get_logger(__name__)

_PAUSE = 2.0  # seconds until the store is tried again


class WorkerLabels:
    """Keeps the label on all workers.

    Args:
        store: Where the workers are.
        mirror: The copy in memory.
        pause: Waits that many seconds.
    """

    def __init__(
        self, store: Store, mirror: Mirror, *, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._pause = pause
        self._missing: set[Key] = set()
        self._changed = asyncio.Event()
        self.complete = asyncio.Event()
        """Set once every worker that was there at the beginning has the label, as far as the store takes it."""

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._mirror.ready.wait()
        unsubscribe = self._mirror.subscribe(self._on_change)
        try:
            for worker in list(self._mirror.workers.values()):
                self._note(worker)
            while True:
                self._changed.clear()
                if await self._add_all():
                    self.complete.set()
                    await self._changed.wait()
                else:
                    await self._pause(_PAUSE)
        finally:
            unsubscribe()

    def _on_change(self, change: MirrorChange) -> None:
        worker = self._mirror.workers.get(change.slot.worker) if change.slot else None
        if worker is not None:
            self._note(worker)

    def _note(self, worker: Worker) -> None:
        if worker.metadata.labels.get(LABEL_POOL) != worker.pool.name:
            self._missing.add(worker.key)
            self._changed.set()

    async def _add_all(self) -> bool:
        """Returns False if the store could not be written."""
        while self._missing:
            key = self._missing.pop()
            worker = self._mirror.workers.get(key)
            if worker is None or worker.metadata.labels.get(LABEL_POOL) == worker.pool.name:
                continue
            try:
                await self._add(worker)
            except Unavailable as error:
                self._missing.add(key)
                log.warning("worker.label_not_added", worker=str(key), reason=error.message)
                return False
            except BkpoolError as error:  # it stays so, and must not hold up the others
                log.warning("worker.label_not_added", worker=str(key), reason=error.message)
        return True

    async def _add(self, worker: Worker) -> None:
        labels = {**worker.metadata.labels, LABEL_POOL: worker.pool.name}
        with suppress(Conflict, NotFound):  # the mirror brings what it is now
            written = await self._store.replace(worker.but(metadata=worker.metadata.but(labels=labels)))
            self._mirror.apply(written)
            log.info("worker.label_added", worker=str(worker.key))
