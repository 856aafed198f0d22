"""Opens the gateway's ports and accepts clients there, in one loop, and deals them out to all.

It reads nothing from them. When the system runs out of descriptors or memory it pauses, and goes on by itself.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

import structlog

from bkpool.core.errors import HostFault

log = structlog.get_logger(__name__)

Address = tuple[str, int]

_BACKLOG = 1024
_AT_ONCE = 64  # connections accepted before the loop turns to those that it has
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """Accepts from listening sockets until it is told to stop.

    Args:
        loop: The loop that accepts. Everything but the constructor is called in it.
        listeners: Closed by `stop`.
        pause: Seconds before accepting goes on when the system had no descriptor or memory left.
        deal: Gets each new socket, non-blocking, and where it comes from.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: list[socket.socket],
        pause: float,
        deal: Callable[[socket.socket, str], None],
    ) -> None:
        self._loop = loop
        self._listeners = listeners
        self._seconds = pause
        self._deal = deal

    def start(self) -> None:
        """Accepts from now on."""
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def stop(self) -> None:
        """Closes the ports. Stopped already: does nothing."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners = []

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
            sock.setblocking(False)
            self._deal(sock, f"{address[0]}:{address[1]}")

    def _pause(self, error: OSError) -> None:
        """Asking again at once would only burn time."""
        log.warning("gateway.accept-paused", reason=error.strerror, seconds=self._seconds)
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._loop.call_later(self._seconds, self.start)


def listen(addresses: Sequence[Address]) -> list[socket.socket]:
    """Sockets that listen on these addresses.

    Raises:
        HostFault: An address is taken (code PortTaken), or not allowed or not there (code Permission, HostFault).
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
            f"port {port} on {host} is taken, and the gateway needs it",
            hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or give another --gateway-address.",
            code="PortTaken",
        )
    if error.errno == errno.EACCES:
        return HostFault(
            f"the gateway may not listen on port {port}",
            hint="Take a port above 1023 with --gateway-address.",
            code="Permission",
        )
    return HostFault(
        f"the gateway cannot listen on {host}:{port}: {error.strerror}",
        hint="Give an address of this machine with --gateway-address.",
    )
