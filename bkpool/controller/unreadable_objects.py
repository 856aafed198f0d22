"""Says on each pool and issuer that cannot be read that this is so: in a condition of its status, and in an Event.

A worker that cannot be read is named by its pool (`core.reconcile.pool_status`). Nothing but the status is written,
and each object is told of once: the condition itself remembers it, also for the next controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import datetime

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound, Unavailable
from bkpool.core.pool import Pool
from bkpool.core.resource import Resource
from bkpool.core.unreadable import CONDITION, Unreadable
from bkpool.store import Store
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

_PAUSE = 2.0  # seconds until the store is tried again


class UnreadableObjects:
    """Writes what cannot be read on the objects themselves.

    Args:
        store: Where the objects are.
        mirror: The copy in memory, with issuers (`configs=True`).
        recorder: Gets one event for each object.
        now: The clock.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        recorder: Recorder,
        now: Callable[[], datetime],
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._recorder = recorder
        self._now = now
        self._pause = pause
        self._told: dict[tuple[str, str], str] = {}
        """By kind and uid: the message that was written, or that the store refuses to write."""
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Runs until cancelled."""
        await self._mirror.ready.wait()
        with ExitStack() as subscriptions:
            subscriptions.callback(self._mirror.subscribe(lambda _pool: self._changed.set()))
            subscriptions.callback(self._mirror.on_config(self._changed.set))
            while True:
                self._changed.clear()
                if await self._tell_of_all():
                    await self._changed.wait()
                else:
                    await self._pause(_PAUSE)

    async def _tell_of_all(self) -> bool:
        """Returns False if the store could not be written."""
        found = [*self._mirror.unreadable_pools.values(), *self._mirror.unreadable_configs.values()]
        present = {(one.kind.KIND, one.uid) for one in found}
        self._told = {which: message for which, message in self._told.items() if which in present}
        return all([await self._tell_of(one) for one in found])

    async def _tell_of(self, found: Unreadable) -> bool:
        which = found.kind.KIND, found.uid
        fields = found.noted(self._now())
        if fields is None or self._told.get(which) == found.message:
            return True
        phase = {"phase": "Degraded"} if found.kind is Pool else {}
        try:
            await self._store.patch_status(found, {**fields, **phase})
        except (Conflict, NotFound):
            return True  # the mirror brings what it is now
        except Unavailable as error:
            log.warning("store.condition_not_written", object=str(found.key), reason=error.message)
            return False
        except BkpoolError as error:  # such as an API server whose schema refuses the object; it stays so
            log.warning("store.condition_not_written", object=str(found.key), reason=error.message)
        self._told[which] = found.message
        about: Resource = found.stand_in(found.kind)
        self._recorder.record(about, CONDITION, found.message, warning=True)
        return True
