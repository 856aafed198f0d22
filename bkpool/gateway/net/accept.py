"""Opens the gateway's ports and accepts clients there, in one loop, for all loops.

It reads nothing from the clients. When the system has no file descriptors or memory left, it pauses and continues by
itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence

import structlog

from bkpool.core.errors import HostFault

log = structlog.get_logger(__name__)

Address = tuple[str, int]

_BACKLOG = 1024
_MAX_ACCEPTS = 64
"""Connections accepted in one step, before the loop turns to the connections that it has."""
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """Accepts connections from listening sockets until it is stopped.

    Args:
        loop: The loop that accepts. Everything but the constructor must be called in it.
        listeners: Closed by `stop`.
        pause: Seconds to wait when the system has no file descriptors or memory left.
        on_accept: Called with each new socket, which is non-blocking, and the client's address.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: list[socket.socket],
        pause: float,
        on_accept: Callable[[socket.socket, str], None],
    ) -> None:
        self._loop = loop
        self._listeners = listeners
        self._pause_seconds = pause
        self._on_accept = on_accept

    def start(self) -> None:
        """Accepts connections from now on."""
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def stop(self) -> None:
        """Closes the ports. Does nothing if they are closed."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners = []

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause(error)
                    return
                continue  # only this connection failed, before it was accepted
            sock.setblocking(False)
            self._on_accept(sock, f"{address[0]}:{address[1]}")

    def _pause(self, error: OSError) -> None:
        """Stops accepting for a while: another attempt at once would only use CPU time."""
        log.warning("gateway.accept_paused", reason=error.strerror, seconds=self._pause_seconds)
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._loop.call_later(self._pause_seconds, self.start)


def listen(addresses: Sequence[Address]) -> list[socket.socket]:
    """Returns sockets that listen on these addresses.

    Raises:
        HostFault: An address is in use (code PortTaken), forbidden (code Permission) or not of this machine (code
            HostFault). No socket stays open then.
    """
    listeners: list[socket.socket] = []
    try:
        for host, port in addresses:
            listeners.append(_listen(host, port))
    except HostFault:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> HostFault:
    if error.errno == errno.EADDRINUSE:
        return HostFault(
            f"port {port} on {host} is in use by another program, and the gateway needs it",
            hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or choose another port.",
            code="PortTaken",
        )
    if error.errno == errno.EACCES:
        return HostFault(
            f"the gateway is not allowed to listen on port {port} of {host}",
            hint="Choose a port above 1023.",
            code="Permission",
        )
    reason = str(error.strerror or error)
    if error.errno is not None and not isinstance(error, socket.gaierror):
        reason = os.strerror(error.errno)  # socket.create_server adds a clause about bind, with the address again
    return HostFault(
        f"the gateway cannot listen on {host}:{port}: {reason}",
        hint="Choose an address of this machine.",
    )
