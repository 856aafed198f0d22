"""Accepts connections from listening sockets, in one event loop.

When the system has no file descriptors or memory left, it pauses and continues by itself. It reads nothing from the
clients, and it does not know what the connections are for.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of a socket that are the fault of this process or machine, and not of the peer."""
_MAX_ACCEPTS = 64
"""Connections accepted in one step, before the loop turns to the connections that it has."""

OnAccept = Callable[[socket.socket, Any], None]
"""Called with each new socket, which is non-blocking, and the client's address as `socket.accept` returns it."""


class Acceptor:
    """Accepts connections from listening sockets until it is stopped.

    Args:
        loop: The loop that accepts. Everything but the constructor must be called in it.
        listeners: Non-blocking; closed by `stop`.
        paused_event: The event in the log when it pauses.
        pause: Seconds to wait when the system has no file descriptors or memory left.
        on_accept: Called with each new socket.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: Sequence[socket.socket],
        *,
        paused_event: str,
        pause: float,
        on_accept: OnAccept,
    ) -> None:
        self._loop = loop
        self._listeners = list(listeners)
        self._paused_event = paused_event
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
                if error.errno in OUT_OF_RESOURCES:
                    self._pause(error)
                    return
                continue  # only this connection failed, before it was accepted
            sock.setblocking(False)
            self._on_accept(sock, address)

    def _pause(self, error: OSError) -> None:
        """Stops accepting for a while: another attempt at once would only use CPU time."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._loop.call_later(self._pause_seconds, self.start)
        log.warning(self._paused_event, reason=error.strerror, seconds=self._pause_seconds)
