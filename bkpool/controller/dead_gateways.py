"""Deletes the heartbeats of gateways that are gone, so that they do not pile up.

A gateway without leases writes no heartbeat either. If it gets one later, it makes its object again. What a heartbeat
renews is not decided here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key
from bkpool.store import Store
from bkpool.store.heartbeats import Heartbeats

log = structlog.get_logger(__name__)

_INTERVAL = 60.0
"""Seconds between two looks."""
_KEPT = 600.0
"""Seconds after its last change until a heartbeat is deleted: ten times the life of what it renews."""


class DeadGateways:
    """Looks after the heartbeats.

    Args:
        store: Deletes them.
        heartbeats: The copy of them.
        seconds: Monotonic time.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        store: Store,
        heartbeats: Heartbeats,
        *,
        seconds: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._heartbeats = heartbeats
        self._seconds = seconds
        self._pause = pause
        self._since: dict[Key, tuple[str | None, float]] = {}

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            await self.look()
            await self._pause(_INTERVAL)

    async def look(self) -> None:
        """Deletes what has not changed for too long."""
        now, before, self._since = self._seconds(), self._since, {}
        for key, found in list(self._heartbeats.known.items()):
            version = found.metadata.resource_version
            known, since = before.get(key, (None, now))
            self._since[key] = version, since if known == version else now
            if known == version and now - since >= _KEPT:
                await self._delete(key, found)

    async def _delete(self, key: Key, found: GatewayHeartbeat) -> None:
        try:
            await self._store.delete(
                GatewayHeartbeat, *key, uid=found.uid, resource_version=found.metadata.resource_version
            )
            log.info("heartbeat.deleted", heartbeat=str(key))
        except (Conflict, NotFound):
            return  # it lives, or another controller was faster
        except BkpoolError as error:
            log.warning("heartbeat.not_deleted", heartbeat=str(key), reason=error.message)
