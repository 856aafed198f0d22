"""Reaches a worker: an address in, a connected leg out, in bounded time and without blocking the loop.

A process on this machine is dialled in the clear (`Dial`), a pod over TLS (`TlsDialler`), and only the worker of the
lease is talked to. Nothing here tries twice.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol
from urllib.parse import urlsplit

from bkpool.core.errors import WorkerFailed
from bkpool.gateway.net.duplex import PeerStream, TlsStream
from bkpool.gateway.net.relay import SocketEndpoint
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import WORKER_VANISHED
from bkpool.pki.worker_tls import check_worker

_FLIGHT = 4096  # bytes read at once in a handshake; a server's part of one with P-256 certificates is under 2 KiB

Dialled = Callable[[SocketEndpoint | OSError | WorkerFailed], None]
"""Called once with the connected leg, or with why there is none: nobody answers (OSError), or somebody else does."""


class Attempt(Protocol):
    """A dial under way."""

    def cancel(self) -> None:
        """Gives up; nobody is called back any more."""


Dialler = Callable[[asyncio.AbstractEventLoop, LeaseRoute, float, Dialled], Attempt]
"""Begins to dial a route's endpoint, in so many seconds at most. May call back before it returns."""


class PlainDial:
    """Dials `unix:///path` or `tcp://host:port` (an address, not a name: nothing is resolved here)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        route: LeaseRoute,
        timeout: float,
        dialled: Callable[[SocketEndpoint | OSError], None],
        *,
        end: PeerStream | None = None,
    ) -> None:
        self._loop = loop
        self._dialled = dialled
        self._end = end or PeerStream()
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        try:
            family, address = _address(route.endpoint or "")
            self._vanished = None if family == socket.AF_UNIX else WORKER_VANISHED
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
        self._dialled(SocketEndpoint(self._loop, sock, self._end, vanished=self._vanished))

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


class TlsDialler:
    """Dials workers that speak TLS, also those on Unix sockets; never in the clear.

    Args:
        context: From pki.worker_tls.worker_context.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context

    def swap(self, context: ssl.SSLContext) -> None:
        """New dials use these settings, and what is open goes on. May be called in any thread."""
        self._context = context

    def __call__(
        self, loop: asyncio.AbstractEventLoop, route: LeaseRoute, timeout: float, dialled: Dialled
    ) -> Attempt:
        """Begins to dial (see Dialler)."""
        return TlsDial(self._context, loop, route, timeout, dialled)


class TlsDial:
    """One dial over TLS 1.3: connected, shaken hands with, and known by the uid in its certificate."""

    def __init__(
        self,
        context: ssl.SSLContext,
        loop: asyncio.AbstractEventLoop,
        route: LeaseRoute,
        timeout: float,
        dialled: Dialled,
    ) -> None:
        self._loop = loop
        self._route = route
        self._dialled = dialled
        self._tls = TlsStream(context, server_side=False)
        self._leg: SocketEndpoint | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = loop.time() + timeout
        self._connecting: Attempt | None = None
        self._connecting = PlainDial(loop, route, timeout, self._connected, end=PeerStream(self._tls))

    def cancel(self) -> None:
        """Gives up; nobody is called back any more."""
        leg = self._release()
        if leg is not None:
            leg.close()

    def _connected(self, outcome: SocketEndpoint | OSError) -> None:
        if isinstance(outcome, OSError):
            self._finish(outcome)
            return
        self._leg = outcome
        self._timer = self._loop.call_at(
            self._deadline, self._finish, TimeoutError(errno.ETIMEDOUT, "it does not shake hands")
        )
        outcome.attach(self._readable, self._settle)
        self._shake(memoryview(b""))

    def _readable(self) -> None:
        assert self._leg is not None  # noqa: S101 - its reader is being called
        try:
            data = self._leg.receive(memoryview(bytearray(_FLIGHT)))
        except OSError as error:
            self._finish(error)
            return
        if data is None:
            return
        if data:
            self._shake(data)
        else:  # a proxy before the worker (docker's, for host ports) accepts though nobody listens behind it
            self._finish(ConnectionResetError(errno.ECONNRESET, "it hangs up"))

    def _shake(self, data: memoryview) -> None:
        assert self._leg is not None  # noqa: S101 - it is connected
        try:
            complete = self._tls.handshake(data)
            if (
                complete
            ):  # our last flight goes with the leg: a stranger is told nothing, and no worker speaks before it
                check_worker(self._tls.peer_certificate(), self._route.worker_uid)
        except ssl.SSLError as error:
            self._leg.end.queue(self._tls.take())
            with suppress(OSError):
                self._leg.flush()  # the alert
            self._finish(_stranger(error))
        except WorkerFailed as error:
            self._finish(error)
        else:
            self._leg.end.queue(self._tls.take())
            if complete:
                self._finish(self._leg)
            else:
                self._settle()

    def _settle(self) -> None:
        assert self._leg is not None  # noqa: S101 - it is connected
        try:
            self._leg.flush()
        except OSError as error:
            self._finish(error)
        else:
            self._leg.watch(read=True, write=bool(self._leg.end.unsent))

    def _finish(self, outcome: SocketEndpoint | OSError | WorkerFailed) -> None:
        leg = self._release()
        if leg is not None and leg is not outcome:
            leg.close()
        self._dialled(outcome)

    def _release(self) -> SocketEndpoint | None:
        leg, self._leg = self._leg, None
        timer, self._timer = self._timer, None
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        if timer is not None:
            timer.cancel()
        if leg is not None:
            leg.watch(read=False, write=False)
        return leg


def _stranger(error: ssl.SSLError) -> WorkerFailed:
    why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or "no TLS"
    return WorkerFailed(f"what answers has no certificate of a worker: {why}", code="WrongWorker")


def _address(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Raises OSError for what cannot be dialled, as the socket itself would."""
    url = urlsplit(endpoint)
    if url.scheme == "unix":
        return socket.AF_UNIX, url.path
    if url.scheme == "tcp" and url.hostname and url.port:
        return (socket.AF_INET6 if ":" in url.hostname else socket.AF_INET), (url.hostname, url.port)
    raise OSError(errno.EINVAL, f"{endpoint} is no address of a worker")
