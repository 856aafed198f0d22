"""Reaches a worker: an address in, a connected leg out, in bounded time and without blocking the loop.

Unix and TCP sockets are dialled in the clear; where workers speak TLS, the handshake belongs here too.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Protocol
from urllib.parse import urlsplit

from bkpool.gateway.exchange import End
from bkpool.gateway.relay import Leg
from bkpool.gateway.table import Route

Dialled = Callable[[Leg | OSError], None]
"""Called once with the connected leg, or with why there is none."""


class Attempt(Protocol):
    """A dial under way."""

    def cancel(self) -> None:
        """Gives up; nobody is called back any more."""


Dialler = Callable[[asyncio.AbstractEventLoop, Route, float, Dialled], Attempt]
"""Begins to dial a route's endpoint, in so many seconds at most. May call back before it returns."""


class Dial:
    """Dials `unix:///path` or `tcp://host:port` (an address, not a name: nothing is resolved here)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, route: Route, timeout: float, dialled: Dialled) -> None:
        self._loop = loop
        self._dialled = dialled
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        try:
            family, address = _address(route.endpoint or "")
            self._sock = sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._fail(error)
            return
        match sock.connect_ex(address):
            case 0:
                self._succeed()
            case errno.EINPROGRESS:
                self._timer = loop.call_later(
                    timeout, self._fail, TimeoutError(errno.ETIMEDOUT, "it does not answer")
                )
                loop.add_writer(sock, self._decided)
            case number:  # also EAGAIN: a Unix socket whose backlog is full
                self._fail(OSError(number, os.strerror(number)))

    def cancel(self) -> None:
        """Gives up; nobody is called back any more."""
        sock = self._release()
        if sock is not None:
            sock.close()

    def _decided(self) -> None:
        assert self._sock is not None  # noqa: S101 - its writer is being called
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._fail(OSError(number, os.strerror(number)))
        else:
            self._succeed()

    def _succeed(self) -> None:
        sock = self._release()
        assert sock is not None  # noqa: S101 - it has just connected
        self._dialled(Leg(self._loop, sock, End()))

    def _fail(self, error: OSError) -> None:
        self.cancel()
        self._dialled(error)

    def _release(self) -> socket.socket | None:
        sock, self._sock = self._sock, None
        timer, self._timer = self._timer, None
        if sock is not None and timer is not None:
            timer.cancel()
            self._loop.remove_writer(sock)
        return sock


def _address(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Raises OSError for what cannot be dialled, as the socket itself would."""
    url = urlsplit(endpoint)
    if url.scheme == "unix":
        return socket.AF_UNIX, url.path
    if url.scheme == "tcp" and url.hostname and url.port:
        return (socket.AF_INET6 if ":" in url.hostname else socket.AF_INET), (url.hostname, url.port)
    raise OSError(errno.EINVAL, f"{endpoint} is no address of a worker")
