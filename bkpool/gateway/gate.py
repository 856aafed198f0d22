"""What of the gateway lives in its own event loop: it accepts, and keeps count of who is inside.

It takes from other threads only what is immutable, and only through the loop's call_soon_threadsafe.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from datetime import datetime

import structlog

from bkpool.core.names import Key
from bkpool.gateway.connection import Connection
from bkpool.gateway.dial import Dialler
from bkpool.gateway.exchange import Scratch
from bkpool.gateway.leases import Leases, Registry
from bkpool.gateway.limits import Limits
from bkpool.gateway.metrics import Metrics

log = structlog.get_logger(__name__)

_AT_ONCE = 64  # connections accepted before the loop turns to those that it has
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Gate:
    """Accepts connections, and lets each live its life.

    Args:
        loop: The gateway's loop. Everything but the constructor is called in it.
        context: The TLS settings of new connections; replaced while others go on.
        registry: Where leases are registered.
        now: The time by which leases and certificates are judged.
        limits: The bounds.
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
        limits: Limits,
        metrics: Metrics,
        dial: Dialler,
        pool: Key | None = None,
    ) -> None:
        self.loop = loop
        self.context = context
        self.now = now
        self.limits = limits
        self.metrics = metrics
        self.dial = dial
        self.scratch = Scratch()
        self.leases = Leases(loop, registry, now, limits, pool)
        self._listeners: list[socket.socket] = []
        self._guests: dict[Connection, None] = {}  # hold no lease; the oldest first
        self._tenants: dict[Connection, None] = {}
        self._empty: list[Callable[[], None]] = []
        self._deadline: asyncio.TimerHandle | None = None

    def listen(self, listeners: list[socket.socket]) -> None:
        """Accepts from these sockets, which are closed by `drain`."""
        self._listeners = listeners
        self._accept_from_now_on()

    def swap(self, context: ssl.SSLContext) -> None:
        """New connections get these TLS settings."""
        self.context = context

    def drain(self, seconds: float, empty: Callable[[], None]) -> None:
        """Accepts nothing more, and cuts what is still open after so many seconds; again: the last call decides.

        Args:
            seconds: What relayed connections have left. Those that are not relayed yet are closed at once: their
                clients come again by themselves, to whoever listens then.
            empty: Called when no connection is left.
        """
        for listener in self._listeners:
            self.loop.remove_reader(listener)
            listener.close()
        self._listeners = []
        self._empty.append(empty)
        for connection in [*self._guests, *self._tenants]:
            if not connection.relaying:
                connection.cut("the gateway is closing")
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(seconds, self._cut_all)
        self._tell_if_empty()

    # --- what connections tell (connection.Host) --------------------------------------------------------------------

    def admitted(self, connection: Connection) -> None:
        """It holds a lease now."""
        del self._guests[connection]
        self._tenants[connection] = None

    def refused(self, connection: Connection) -> None:
        """It holds no lease any more, and will soon be closed."""
        if connection in self._tenants:
            del self._tenants[connection]
            self._guests[connection] = None
            self._make_room()

    def closed(self, connection: Connection) -> None:
        """Its sockets are closed."""
        self._guests.pop(connection, None)
        self._tenants.pop(connection, None)
        self._tell_if_empty()

    # --- accepting --------------------------------------------------------------------------------------------------

    def _accept_from_now_on(self) -> None:
        for listener in self._listeners:
            self.loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue  # this one connection has gone wrong before it was accepted
            try:
                sock.setblocking(False)
                connection = Connection(self, sock, f"{address[0]}:{address[1]}")
            except OSError:  # reset since
                sock.close()
                continue
            self._guests[connection] = None
            self._make_room()

    def _pause(self, error: OSError) -> None:
        """The system has no descriptor or memory left; asking again at once would only burn time."""
        log.warning("gateway.accept-paused", reason=error.strerror, seconds=self.limits.accept_pause)
        for listener in self._listeners:
            self.loop.remove_reader(listener)
        self.loop.call_later(self.limits.accept_pause, self._accept_from_now_on)

    def _make_room(self) -> None:
        """So many that never finish a handshake cannot keep a good client out."""
        if len(self._guests) > self.limits.guests:
            next(iter(self._guests)).cut("too many connections without a lease")

    # --- draining ---------------------------------------------------------------------------------------------------

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
