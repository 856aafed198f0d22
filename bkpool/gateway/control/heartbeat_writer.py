"""Writes this gateway's heartbeat: one object for all leases of all its loops (docs/decisions/0036).

Where it is refused, nothing is lost: each lease is then renewed on its worker. It runs in the main loop and never
touches a worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

import structlog

from bkpool.core.errors import BkpoolError, Conflict, Forbidden, InvalidInput, NotFound, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatSpec, HeartbeatStatus
from bkpool.core.names import LABEL_MANAGED, LABEL_POOL, MANAGER, Key, check_name
from bkpool.core.resource import Metadata
from bkpool.core.worker import PoolRef
from bkpool.store import Store

log = structlog.get_logger(__name__)

_GATHER = 0.1
"""Seconds that a write waits for the gateway's other loops, which beat at the same moment."""
_REFUSED_FOR = 60.0
"""Seconds after which a refused heartbeat is tried again: the controller may grant the right meanwhile."""
_TIMEOUT = 10.0
"""Seconds that a write may take in all."""
_MAX_ATTEMPTS = 3


def heartbeat_name(gateway: str) -> str:
    """The name of a gateway's heartbeat: that of the gateway, if it can be the name of an object."""
    try:
        return check_name(gateway, field="name")
    except InvalidInput:
        return f"gateway-{hashlib.sha256(gateway.encode()).hexdigest()[:12]}"


class HeartbeatWriter:
    """The heartbeat of one gateway.

    Args:
        store: Where it is written.
        key: Its name.
        now: Returns the time that is written.
        pool: The only pool that the gateway serves; None: all of them.
        allowed: Whether anybody follows heartbeats at the moment, as far as this process knows.
        seconds: Monotonic time.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        store: Store,
        key: Key,
        now: Callable[[], datetime],
        *,
        pool: Key | None = None,
        allowed: Callable[[], bool] = lambda: True,
        seconds: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.key = key
        self._store = store
        self._now = now
        self._pool = pool
        self._allowed = allowed
        self._seconds = seconds
        self._pause = pause
        self._leases: dict[object, Mapping[str, int]] = {}  # by loop: what it has named last
        self._stored: GatewayHeartbeat | None = None
        self._refused_until = 0.0
        self._refused = ""
        self._writing = asyncio.Lock()
        self._next: asyncio.Task[BkpoolError | None] | None = None

    async def write(self, loop: object, leases: Mapping[str, int]) -> None:
        """Writes a heartbeat with these leases of a loop, and with those that the others have named last.

        Raises:
            Unavailable: It is not written, or the store does not answer.
            BkpoolError: The store refuses it.
        """
        self._leases[loop] = leases
        if self._next is None:
            self._next = asyncio.create_task(self._write_soon())
        error = await asyncio.shield(self._next)
        if error is not None:
            raise error

    async def _write_soon(self) -> BkpoolError | None:
        async with self._writing:
            await self._pause(_GATHER)
            self._next = None  # who comes from now on needs another write
            named = {lease: count for leases in self._leases.values() for lease, count in leases.items()}
            try:
                async with asyncio.timeout(_TIMEOUT):
                    await self._write(named)
            except TimeoutError:
                self._stored = None
                return Unavailable("the store does not take this gateway's heartbeat")
            except BkpoolError as error:
                self._stored = None
                return error
            return None

    async def _write(self, leases: Mapping[str, int]) -> None:
        if self._seconds() < self._refused_until or not self._allowed():
            raise Unavailable("nobody follows this gateway's heartbeat")
        status = HeartbeatStatus(renewed_at=self._now(), leases=dict(leases))
        for _ in range(_MAX_ATTEMPTS):
            try:
                self._stored = await self._put(status)
            except Conflict:  # it was changed or deleted, or exists already
                self._stored = None
            except (Forbidden, NotFound) as error:
                self._note_refusal(error.message)
                raise Unavailable("this gateway's heartbeat is refused") from None
            else:
                self._refused = ""
                return
        raise Unavailable("this gateway's heartbeat changes too often")

    async def _put(self, status: HeartbeatStatus) -> GatewayHeartbeat:
        if self._stored is None:
            try:
                self._stored = await self._store.get(GatewayHeartbeat, *self.key)
            except NotFound:
                return await self._store.create(self._new(status))
        try:
            return await self._store.replace_status(self._stored.but(status=status))
        except NotFound:
            raise Conflict("the heartbeat was deleted") from None

    def _new(self, status: HeartbeatStatus) -> GatewayHeartbeat:
        labels = {LABEL_MANAGED: MANAGER, **({LABEL_POOL: self._pool.name} if self._pool else {})}
        served = PoolRef(name=self._pool.name, namespace=self._pool.namespace) if self._pool else None
        return GatewayHeartbeat(
            metadata=Metadata(name=self.key.name, namespace=self.key.namespace, labels=labels),
            spec=HeartbeatSpec(pool_ref=served),
            status=status,
        )

    def _note_refusal(self, reason: str) -> None:
        self._refused_until = self._seconds() + _REFUSED_FOR
        if self._refused != reason:
            log.info("gateway.heartbeat_refused", heartbeat=str(self.key), reason=reason)
        self._refused = reason
