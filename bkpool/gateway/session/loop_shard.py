"""What of the gateway lives in one event loop: the connections in it, and the leases that it is home to.

Everything about a lease happens in its home, so nothing of it is shared: a connection that was accepted elsewhere
goes there once its certificate is read. What comes from other threads comes through the loop's call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import datetime

from bkpool.core.names import Key
from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.dial import Dialler
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.connection import Connection
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.gateway.session.shard_leases import Registry, ShardLeases


class LoopShard:
    """Lets each connection of its loop live its life, and keeps count of who is inside.

    Args:
        loop: Its loop. Everything but the constructor is called in it.
        context: The TLS settings of new connections; replaced while others go on.
        registry: Where leases are registered.
        now: The time by which leases and certificates are judged.
        limits: The bounds.
        capacity: The places of the whole gateway.
        metrics: What is counted.
        dial: How a worker is reached.
        pool: The only pool that is served; None serves all.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext,
        *,
        registry: Registry,
        now: Callable[[], datetime],
        limits: GatewayLimits,
        capacity: Capacity,
        metrics: GatewayMetrics,
        dial: Dialler,
        pool: Key | None = None,
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
        self.homes: tuple[LoopShard, ...] = (self,)
        """The gates of all loops. A lease's home is the one that its token's digest falls on."""
        self._guests: dict[Connection, None] = {}  # hold no lease; the oldest first
        self._tenants: dict[Connection, None] = {}
        self._draining = False
        self._empty: list[Callable[[], None]] = []
        self._deadline: asyncio.TimerHandle | None = None

    def receive(self, sock: socket.socket, peer: str) -> None:
        """A client has been accepted."""
        if self._draining:
            sock.close()
            return
        try:
            self._welcome(Connection(self, sock, peer))
        except OSError:  # reset since
            sock.close()

    def swap(self, context: ssl.SSLContext) -> None:
        """New connections get these TLS settings."""
        self.context = context

    def drain(self, seconds: float, empty: Callable[[], None]) -> None:
        """Takes nobody in any more, and cuts what is still open after so many seconds; again: the last call decides.

        Args:
            seconds: What relayed connections have left. Those that are not relayed yet are closed at once: their
                clients come again by themselves, to whoever listens then.
            empty: Called when no connection is left.
        """
        self._draining = True
        self._empty.append(empty)
        for connection in [*self._guests, *self._tenants]:
            if not connection.relaying:
                connection.cut("the gateway is closing")
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._cut_all)
        self._tell_if_empty()

    # --- what connections tell (connection.Host) --------------------------------------------------------------------

    def lead_home(self, connection: Connection, token_sha256: str) -> bool:
        """Whether this lease's home is another loop; then the connection is on its way there, and not ours."""
        home = self.homes[int(token_sha256[:8], 16) % len(self.homes)]
        if home is self:
            return False
        connection.move_out(home)
        # First there, then gone from here: a drain that finds us empty is behind it in the other loop too.
        home.loop.call_soon_threadsafe(home._take_over, connection, token_sha256)  # noqa: SLF001 - another of our kind
        self.closed(connection)
        return True

    def admitted(self, connection: Connection) -> None:
        """It holds a lease now."""
        del self._guests[connection]
        self.metrics.pending(-1)
        self._tenants[connection] = None

    def refused(self, connection: Connection) -> None:
        """It holds no lease any more, and will soon be closed."""
        if connection in self._tenants:
            del self._tenants[connection]
            self._welcome(connection)

    def closed(self, connection: Connection) -> None:
        """Its sockets are closed."""
        if connection in self._guests:
            del self._guests[connection]
            self.metrics.pending(-1)
        self._tenants.pop(connection, None)
        self._tell_if_empty()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _take_over(self, connection: Connection, token_sha256: str) -> None:
        self._welcome(connection)
        if self._draining:  # and may have told already that it is empty: no lease is joined any more
            connection.cut("the gateway is closing")
        else:
            connection.move_in(token_sha256)

    def _welcome(self, guest: Connection) -> None:
        """So many that never finish a handshake cannot keep a good client out: the oldest goes."""
        self._guests[guest] = None
        self.metrics.pending(+1)
        if len(self._guests) > self.limits.guests / len(self.homes):
            next(iter(self._guests)).cut("too many connections without a lease")

    def _cut_all(self) -> None:
        for connection in [*self._guests, *self._tenants]:
            connection.cut("the gateway is closing")

    def _tell_if_empty(self) -> None:
        if self._empty and not self._guests and not self._tenants:
            self.leases.withdraw_all()
            told, self._empty = self._empty, []
            if self._deadline is not None:
                self._deadline.cancel()
            for empty in told:
                empty()
