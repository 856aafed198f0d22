"""Accepts the API's TCP connections, each into a place of its own, also while its TLS handshake runs.

aiohttp's own site lets any number of clients connect and say nothing. It knows no request: bkpool.api.server tells it
when a connection has asked for something.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, cast

from aiohttp import web

from bkpool.api.limits import HttpLimits
from bkpool.core.connection_places import ConnectionPlaces, origin_of
from bkpool.ports.acceptor import Acceptor

_BACKLOG = 512
_PAUSE = 0.5  # seconds, while the system has no descriptor left


class AcceptedConnection:
    """One accepted connection, from accept to close.

    Args:
        sock: The accepted socket; its transport closes it.
        site: What accepted it.
        deadline: The loop's time at which its first request must have a whole header.
    """

    def __init__(self, sock: socket.socket, site: BoundedTcpSite, deadline: float) -> None:
        self._sock = sock
        self._site = site
        self.deadline = deadline
        self.opening: asyncio.Task[None] | None = None
        """Makes its transport, with the TLS handshake."""
        self.has_transport = False
        """Whether a transport has the socket, and closes it."""
        self.transport: asyncio.Transport | None = None
        """Its transport, once its protocol has it."""

    def asks(self) -> None:
        """A whole request has come."""
        self._site.places.asks(self)

    def asks_nothing(self) -> None:
        """The request is answered."""
        self._site.places.asks_nothing(self)

    def closed(self) -> None:
        """Its socket is closed."""
        self._site.places.leave(self)

    def cut(self) -> None:
        """Closes it now, in whatever state it is, also while nothing is read from it."""
        if self.transport is not None:
            self.transport.abort()
            return
        if self.opening is not None:
            self.opening.cancel()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # a transport that is being made sees the end


class ServesConnections(Protocol):
    """Makes the protocol of a connection."""

    def protocol(self, connection: AcceptedConnection) -> asyncio.Protocol:
        """The protocol that reads the requests of this connection."""


class _Listeners:
    """The listening sockets: of asyncio's servers, aiohttp uses only these two members."""

    def __init__(self, sockets: list[socket.socket], close: Callable[[], None]) -> None:
        self.sockets = sockets
        self._close = close

    def close(self) -> None:
        self._close()


class BoundedTcpSite(web.BaseSite):
    """Listens on an address, with a limit of connections.

    Args:
        runner: Serves what is accepted.
        host: A name or an address; every address of a name is used.
        port: 0 takes a free port.
        ssl_context: Serves over TLS if given.
        limits: How many connections there may be, and how long one may take.
        server: Makes the protocols.
    """

    __slots__ = ("_acceptor", "_connections", "_host", "_limits", "_loop", "_port", "_protocols", "places")

    def __init__(
        self,
        runner: web.BaseRunner,
        host: str,
        port: int,
        *,
        server: ServesConnections,
        limits: HttpLimits,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(runner, ssl_context=ssl_context)
        self._host, self._port = host, port
        self._protocols = server
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._acceptor: Acceptor | None = None
        self._connections: set[AcceptedConnection] = set()  # whose transport is being made
        self.places: ConnectionPlaces[AcceptedConnection] = ConnectionPlaces(
            limits.connections, limits.connections_per_address
        )

    @property
    def name(self) -> str:
        """The address as a URL."""
        return f"{'https' if self._ssl_context else 'http'}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listens. Raises OSError if it cannot."""
        await super().start()
        listeners = await _listen(self._host, self._port)
        self._server = cast("asyncio.AbstractServer", _Listeners(listeners, self._close))
        self._acceptor = Acceptor(
            self._loop, listeners, paused_event="api.accept_paused", pause=_PAUSE, on_accept=self._enter
        )
        self._acceptor.start()

    def _close(self) -> None:
        if self._acceptor is not None:
            self._acceptor.stop()
        for connection in list(self._connections):
            connection.cut()

    def _enter(self, sock: socket.socket, address: tuple[str, int]) -> None:
        connection = AcceptedConnection(sock, self, self._loop.time() + self._limits.header_timeout)
        surplus = self.places.enter(connection, origin_of(address[0]))
        if surplus is connection:
            sock.close()
            return
        if surplus is not None:
            surplus.cut()
        self._connections.add(connection)
        connection.opening = opening = self._loop.create_task(self._open(connection, sock))
        opening.add_done_callback(lambda done: self._opened(connection, sock, done))

    async def _open(self, connection: AcceptedConnection, sock: socket.socket) -> None:
        def protocol() -> asyncio.Protocol:
            connection.has_transport = True
            return self._protocols.protocol(connection)

        await self._loop.connect_accepted_socket(
            protocol,
            sock,
            ssl=self._ssl_context,
            ssl_handshake_timeout=self._limits.header_timeout if self._ssl_context else None,
        )

    def _opened(self, connection: AcceptedConnection, sock: socket.socket, done: asyncio.Task[None]) -> None:
        """Gives the place back if there is no protocol that does. A task that was cut early has run nothing."""
        self._connections.discard(connection)
        connection.opening = None
        error = None if done.cancelled() else done.exception()
        if error is None and not done.cancelled():
            return
        connection.closed()
        if not connection.has_transport:
            sock.close()
        if error is not None and not isinstance(error, OSError):  # an OSError: the client has gone, or broke TLS
            raise error


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of a host. Raises OSError if there is none, or one cannot be used."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                listeners.append(socket.create_server(address, family=family, backlog=_BACKLOG))
            except OSError as error:
                # A name may also have addresses of a protocol that this machine does not use.
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    if not listeners:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for listener in listeners:
        listener.setblocking(False)
    return listeners
