"""Connects to a worker: an address goes in and a connected endpoint comes out, in bounded time.

A process on this machine is dialled without TLS (`PlainDial`), a pod with TLS (`TlsDialler`). With TLS, only the
worker that the caller asked for is accepted. Nothing here blocks the loop or tries a second time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import urlsplit

from bkpool.core.errors import WorkerFailed
from bkpool.core.names import Key
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.tls_stream import TlsStream

_HANDSHAKE_READ = 4096
"""Bytes read in one step of a handshake. All that a server with P-256 certificates sends in it is under 2 KiB."""

VerifyPeer = Callable[[bytes | None], None]
"""Checks the peer's certificate (DER; None if there is none). Raises WorkerFailed if it is another worker's."""

OnDialled = Callable[[SocketEndpoint | OSError | WorkerFailed], None]
"""Called once with the connected endpoint, or with the reason that there is none: OSError if nobody answers,
WorkerFailed if something else than the worker answers."""


@dataclass(frozen=True, slots=True)
class DialTarget:
    """A worker to connect to."""

    pool: Key
    """The worker's pool."""
    endpoint: str
    """`unix:///path` or `tcp://host:port`, where host is an IP address: names are not resolved."""
    verify_peer: VerifyPeer
    """Called after a TLS handshake. Without TLS it is not called."""


@dataclass(frozen=True, slots=True)
class DialLimits:
    """Limits of one dial and of the connection that it makes, in seconds."""

    timeout: float
    """For the whole attempt."""
    peer_timeout: float
    """A connected worker that does not answer for this long is given up. It has no effect on a Unix socket."""


class DialAttempt(Protocol):
    """A dial that is under way."""

    def cancel(self) -> None:
        """Gives up. The callback is not called any more."""


Dialler = Callable[[asyncio.AbstractEventLoop, DialTarget, DialLimits, OnDialled], DialAttempt]
"""Starts to dial a target, within these limits. May call back before it returns."""


class PlainDial:
    """One connection attempt without TLS.

    Args:
        loop: The loop of this thread.
        target: The worker.
        limits: Of the attempt and its connection.
        on_dialled: Called once with the outcome.
        stream: The stream of the endpoint to make; by default one without TLS.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        target: DialTarget,
        limits: DialLimits,
        on_dialled: Callable[[SocketEndpoint | OSError], None],
        *,
        stream: PeerStream | None = None,
    ) -> None:
        self._loop = loop
        self._on_dialled = on_dialled
        self._stream = stream or PeerStream()
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        try:
            family, address = _parse_endpoint(target.endpoint)
            self._peer_timeout = None if family == socket.AF_UNIX else limits.peer_timeout
            self._sock = sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._fail(error)
            return
        match sock.connect_ex(address):
            case 0:
                self._succeed()
            case errno.EINPROGRESS:
                timed_out = TimeoutError(errno.ETIMEDOUT, f"no answer within {limits.timeout:g} s")
                self._timer = loop.call_later(limits.timeout, self._fail, timed_out)
                loop.add_writer(sock, self._connect_finished)
            case number:  # also EAGAIN: the backlog of a Unix socket is full
                self._fail(OSError(number, os.strerror(number)))

    def cancel(self) -> None:
        """Gives up. The callback is not called any more."""
        sock = self._release()
        if sock is not None:
            sock.close()

    def _connect_finished(self) -> None:
        assert self._sock is not None  # noqa: S101 - the loop calls its writer
        number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            self._fail(OSError(number, os.strerror(number)))
        else:
            self._succeed()

    def _succeed(self) -> None:
        sock = self._release()
        assert sock is not None  # noqa: S101 - it has just connected
        self._on_dialled(SocketEndpoint(self._loop, sock, self._stream, peer_timeout=self._peer_timeout))

    def _fail(self, error: OSError) -> None:
        self.cancel()
        self._on_dialled(error)

    def _release(self) -> socket.socket | None:
        sock, self._sock = self._sock, None
        timer, self._timer = self._timer, None
        if sock is not None and timer is not None:
            timer.cancel()
            self._loop.remove_writer(sock)
        return sock


class TlsDialler:
    """Dials workers with TLS, also those on Unix sockets; never without.

    Args:
        contexts: Returns TLS settings from pki.worker_tls.worker_context for the workers of a pool: first those for
            most workers, then those for workers with a certificate of a former CA. It is called in any thread.
    """

    def __init__(self, contexts: Callable[[Key], Sequence[ssl.SSLContext]]) -> None:
        self._contexts = contexts

    def __call__(
        self, loop: asyncio.AbstractEventLoop, target: DialTarget, limits: DialLimits, on_dialled: OnDialled
    ) -> DialAttempt:
        """Starts to dial (see Dialler)."""
        return TlsDial(self._contexts(target.pool), loop, target, limits, on_dialled)


class TlsDial:
    """One connection attempt with TLS: connect, handshake, and the check of the worker's certificate.

    If a worker's certificate is not from the CA of the first TLS settings, it connects again with the next ones. The
    worker has got no certificate of ours by then, because in TLS 1.3 it shows its own one first.

    Args:
        contexts: The TLS settings, in the order in which they are tried.
        loop: The loop of this thread.
        target: The worker.
        limits: Of the attempt and its connection.
        on_dialled: Called once with the outcome.
    """

    def __init__(
        self,
        contexts: Sequence[ssl.SSLContext],
        loop: asyncio.AbstractEventLoop,
        target: DialTarget,
        limits: DialLimits,
        on_dialled: OnDialled,
    ) -> None:
        self._loop = loop
        self._target = target
        self._limits = limits
        self._on_dialled = on_dialled
        self._endpoint: SocketEndpoint | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = loop.time() + limits.timeout
        self._connecting: DialAttempt | None = None
        self._connect(contexts)

    def _connect(self, contexts: Sequence[ssl.SSLContext]) -> None:
        self._tls, self._others = TlsStream(contexts[0], server_side=False), contexts[1:]
        left = replace(self._limits, timeout=max(0.0, self._deadline - self._loop.time()))
        self._connecting = PlainDial(self._loop, self._target, left, self._connected, stream=PeerStream(self._tls))

    def cancel(self) -> None:
        """Gives up. The callback is not called any more."""
        self._close()

    def _close(self) -> None:
        endpoint = self._release()
        if endpoint is not None:
            endpoint.close()

    def _connected(self, outcome: SocketEndpoint | OSError) -> None:
        if isinstance(outcome, OSError):
            self._finish(outcome)
            return
        self._endpoint = outcome
        timed_out = TimeoutError(errno.ETIMEDOUT, f"no TLS handshake within {self._limits.timeout:g} s")
        self._timer = self._loop.call_at(self._deadline, self._finish, timed_out)
        outcome.set_callbacks(self._readable, self._flush_and_watch)
        self._handshake(memoryview(b""))

    def _readable(self) -> None:
        assert self._endpoint is not None  # noqa: S101 - the loop calls its reader
        try:
            data = self._endpoint.receive(memoryview(bytearray(_HANDSHAKE_READ)))
        except OSError as error:
            self._finish(error)
            return
        if data is None:
            return
        if data:
            self._handshake(data)
        else:  # docker's proxy for host ports accepts connections though nothing listens behind it
            self._finish(ConnectionResetError(errno.ECONNRESET, "the connection was closed during the handshake"))

    def _handshake(self, data: memoryview) -> None:
        assert self._endpoint is not None  # noqa: S101 - it is connected
        try:
            complete = self._tls.handshake(data)
            if complete:
                # Our last handshake message is not sent yet: the relay sends it. So another server than the worker
                # learns nothing of us. The worker sends nothing before it.
                self._target.verify_peer(self._tls.peer_certificate())
        except ssl.SSLError as error:
            self._endpoint.stream.queue(self._tls.take())
            with suppress(OSError):
                self._endpoint.flush()  # the alert
            if isinstance(error, ssl.SSLCertVerificationError) and self._others:
                self._close()
                self._connect(self._others)
            else:
                self._finish(_not_a_worker(error))
        except WorkerFailed as error:
            self._finish(error)
        else:
            self._endpoint.stream.queue(self._tls.take())
            if complete:
                self._finish(self._endpoint)
            else:
                self._flush_and_watch()

    def _flush_and_watch(self) -> None:
        assert self._endpoint is not None  # noqa: S101 - it is connected
        try:
            self._endpoint.flush()
        except OSError as error:
            self._finish(error)
        else:
            self._endpoint.watch(read=True, write=bool(self._endpoint.stream.unsent))

    def _finish(self, outcome: SocketEndpoint | OSError | WorkerFailed) -> None:
        endpoint = self._release()
        if endpoint is not None and endpoint is not outcome:
            endpoint.close()
        self._on_dialled(outcome)

    def _release(self) -> SocketEndpoint | None:
        endpoint, self._endpoint = self._endpoint, None
        timer, self._timer = self._timer, None
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
        if timer is not None:
            timer.cancel()
        if endpoint is not None:
            endpoint.watch(read=False, write=False)
        return endpoint


def _not_a_worker(error: ssl.SSLError) -> WorkerFailed:
    why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else error.reason or "no TLS"
    return WorkerFailed(f"the server at this address has no worker's certificate: {why}", code="WrongWorker")


def _parse_endpoint(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """Raises OSError for an endpoint that cannot be dialled, as the socket itself would."""
    url = urlsplit(endpoint)
    if url.scheme == "unix":
        return socket.AF_UNIX, url.path
    if url.scheme == "tcp" and url.hostname and url.port:
        return (socket.AF_INET6 if ":" in url.hostname else socket.AF_INET), (url.hostname, url.port)
    raise OSError(errno.EINVAL, f"{endpoint!r} is not an address of a worker")
