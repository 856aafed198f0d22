"""The part of the gateway that lives in one event loop: its connections, and the leases that it owns.

Each lease is owned by one loop, and everything about it happens there, so no lease is shared between threads. A
connection that another loop accepted moves to the owner once its certificate is read. Other threads call a shard only
through its loop's call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import datetime
from math import ceil

from bkpool.core.connection_places import ConnectionPlaces
from bkpool.core.names import Key
from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.dial import Dialler
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.connection import Connection
from bkpool.gateway.session.lease_registration import CallbackLeaseRegistry
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.gateway.session.shard_leases import ShardLeases

_CLOSING = "the gateway is closing"


class LoopShard:
    """Runs the connections of its loop and keeps count of them.

    Args:
        loop: The shard's loop. Everything but the constructor is called in it.
        context: The TLS settings of new connections.
        registry: Registers leases at their workers.
        now: Returns the time against which leases and certificates are checked.
        limits: The gateway's limits.
        capacity: Counts the connections of the whole gateway.
        metrics: Counts what happens.
        dial: Dials a worker.
        pool: The only pool that is served; None serves all.
        loops: The number of the gateway's loops. Each gets its part of the places for connections without a lease.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext,
        *,
        registry: CallbackLeaseRegistry,
        now: Callable[[], datetime],
        limits: GatewayLimits,
        capacity: Capacity,
        metrics: GatewayMetrics,
        dial: Dialler,
        pool: Key | None = None,
        loops: int = 1,
    ) -> None:
        self.loop = loop
        self.context = context
        self.now = now
        self.limits = limits
        self.metrics = metrics
        self.dial = dial
        self.buffers = LoopBuffers()
        self.error_watcher = SocketErrorWatcher(loop)
        self.leases = ShardLeases(loop, registry, now, limits, capacity, pool=pool)
        self.shards: tuple[LoopShard, ...] = (self,)
        """The shards of all loops. The digest of a lease's token decides which of them owns the lease."""
        self._pending: ConnectionPlaces[Connection] = ConnectionPlaces(  # without a lease
            ceil(limits.pending_connections / loops), ceil(limits.pending_connections_per_address / loops)
        )
        self._surplus: dict[Connection, None] = {}  # that were cut to make room, until they are closed
        self._admitted: dict[Connection, None] = {}  # with a lease
        self._draining = False
        self._on_empty: list[Callable[[], None]] = []
        self._drain_deadline: asyncio.TimerHandle | None = None

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Starts the connection of a client that was accepted.

        Args:
            sock: Accepted and non-blocking.
            peer: The client's address, for the log.
        """
        if self._draining:
            sock.close()
            return
        try:
            self._add_pending(Connection(self, sock, peer))
        except OSError:  # the client has closed the connection already
            sock.close()

    def set_tls_context(self, context: ssl.SSLContext) -> None:
        """Uses these TLS settings for new connections. Open ones stay."""
        self.context = context

    def drain(self, seconds: float, on_empty: Callable[[], None]) -> None:
        """Accepts no client any more, and cuts connections that are still open after this many seconds.

        May be called again; then the last call decides about the time.

        Args:
            seconds: For relayed connections. Others are closed at once: their clients connect again by themselves, to
                another gateway.
            on_empty: Called when no connection is left.
        """
        self._draining = True
        self._on_empty.append(on_empty)
        for connection in [*self._pending, *self._admitted]:
            if not connection.relaying:
                connection.cut(_CLOSING)
        if self._drain_deadline is not None:
            self._drain_deadline.cancel()
        self._drain_deadline = self.loop.call_later(seconds, self._cut_all)
        self._report_if_empty()

    # --- called by connections (connection.ConnectionHost) ----------------------------------------------------------

    def hand_over(self, connection: Connection, token_sha256: str) -> bool:
        """Moves the connection to the loop that owns its lease; returns whether that is another loop."""
        owner = self.shards[int(token_sha256[:8], 16) % len(self.shards)]
        if owner is self:
            return False
        connection.leave_loop(owner)
        # Post it to the owner before it is removed here: if a drain finds this shard empty, the drain's call to the
        # owner comes after the connection.
        owner.loop.call_soon_threadsafe(owner._take_over, connection, token_sha256)  # noqa: SLF001 - the same class
        self.closed(connection)
        return True

    def admitted(self, connection: Connection) -> None:
        """The connection has a lease now."""
        self._pending.leave(connection)
        self.metrics.count_pending(-1)
        self._admitted[connection] = None

    def refused(self, connection: Connection) -> None:
        """The connection has no lease any more, and will soon be closed."""
        if connection in self._admitted:
            del self._admitted[connection]
            self._add_pending(connection)

    def closed(self, connection: Connection) -> None:
        """The connection's sockets are closed."""
        if connection in self._pending:
            self._pending.leave(connection)
            self.metrics.count_pending(-1)
        self._admitted.pop(connection, None)
        self._surplus.pop(connection, None)
        self._report_if_empty()

    # --- internal ---------------------------------------------------------------------------------------------------

    def _take_over(self, connection: Connection, token_sha256: str) -> None:
        self._add_pending(connection)
        if self._draining:  # this shard may have reported already that it is empty, so it must not use a lease again
            connection.cut(_CLOSING)
        else:
            connection.enter_loop(token_sha256)

    def _add_pending(self, connection: Connection) -> None:
        """Adds a connection without a lease. If there are too many, one of the address that has most is closed.

        So clients that never complete a handshake cannot keep others out.
        """
        surplus = self._pending.enter(connection, connection.origin)
        if surplus is None:
            self.metrics.count_pending(+1)
        else:  # it takes its place, so the metric never shows more than the limit
            self._surplus[surplus] = None
            surplus.cut("too many connections without a lease")

    def _cut_all(self) -> None:
        for connection in [*self._pending, *self._admitted]:
            connection.cut(_CLOSING)

    def _report_if_empty(self) -> None:
        if self._on_empty and not (self._pending or self._admitted or self._surplus):
            self.leases.withdraw_all()
            callbacks, self._on_empty = self._on_empty, []
            if self._drain_deadline is not None:
                self._drain_deadline.cancel()
            for on_empty in callbacks:
                on_empty()
