"""One HTTP/2 connection to one worker whose identity has been checked.

When a connection is lost, grpclib would connect again by itself. This never does: another worker may listen at the
same address by then. It bounds what a worker can make us hold in memory.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.protocol import H2Protocol, Stream
from grpclib.utils import Wrapper
from h2.events import Event
from h2.exceptions import ProtocolError

from bkpool.buildkit.tls_connection import connect_tls
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.pki.worker_tls import check_worker

MAX_MESSAGE = 16 * 2**20
"""Bytes of one message: what BuildKit's own client takes (util/grpcutil, DefaultMaxRecvMsgSize)."""

_WINDOW = 2**20  # bytes that a worker may send before they are read; grpclib's default is four times that
_VANISHED = 15.0  # seconds, as the gateway gives a worker that is silent: docs/decisions/0015-peers-that-vanish.md
_CLOSE_TIMEOUT = 1.0  # seconds for the event loop to report the end of a connection that was aborted
_PEERCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


@dataclass(frozen=True, slots=True)
class WorkerTls:
    """What is needed to reach a worker over mutual TLS, and to know that it is the right one."""

    context: ssl.SSLContext
    """Of `pki.worker_tls.worker_context`."""
    worker_uid: str
    """The uid that the worker's certificate must have."""


class ControlConnection:
    """An open connection; `channel` makes calls on it."""

    def __init__(self, endpoint: str, channel: Channel, protocol: _ControlProtocol) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self._protocol = protocol

    @property
    def peer_pid(self) -> int:
        """The process behind a Unix socket, as this process sees it (SO_PEERCRED of unix(7))."""
        sock: socket.socket = self._protocol.transport.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        return int(_PEERCRED.unpack(credentials)[0])

    def check_worker(self, worker_uid: str) -> None:
        """Checks that the certificate, whose chain TLS has verified, is this worker's.

        Raises:
            WorkerFailed: It is not; the code is WrongWorker.
        """
        tls: ssl.SSLObject = self._protocol.transport.get_extra_info("ssl_object")
        check_worker(tls.getpeercert(binary_form=True), worker_uid)

    @property
    def violation(self) -> ProtocolError | None:
        """The breach of HTTP/2 that ended the connection."""
        return self._protocol.violation

    @property
    def lost_because(self) -> str:
        """Why the connection was lost, as far as the system or TLS says; empty: nothing is known, or it is open."""
        error = self._protocol.error
        return describe(error) if isinstance(error, OSError) else ""

    async def close(self) -> None:
        """Ends the connection at once, without TLS's closing handshake: a peer that hangs would delay it by 30 s."""
        self.channel.close()
        self._protocol.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._protocol.closed.wait()


@asynccontextmanager
async def open_connection(endpoint: str, tls: WorkerTls | None, seconds: float) -> AsyncIterator[ControlConnection]:
    """Connects, and checks who answers before a call can be made.

    Args:
        endpoint: `unix:///path`, or `tcp://address:port` with TLS.
        tls: For a `tcp` endpoint.
        seconds: To connect and shake hands.

    Raises:
        Unavailable: Nobody listens there, or the handshake failed or took too long.
        WorkerFailed: Another worker answers.
        ValueError: The endpoint is neither of the two.
    """
    channel = _channel(endpoint, tls)
    try:
        async with asyncio.timeout(seconds):
            protocol = cast("_ControlProtocol", await channel.__connect__())
    except TimeoutError:
        raise Unavailable(f"{endpoint} did not accept a connection within {seconds:g} s") from None
    except OSError as error:
        raise Unavailable(f"{endpoint} cannot be reached: {describe(error)}") from error
    connection = ControlConnection(endpoint, channel, protocol)
    try:
        if tls is not None:
            connection.check_worker(tls.worker_uid)
        yield connection
    finally:
        await connection.close()


def describe(error: OSError) -> str:
    """Returns the system's text for an error, without the error number."""
    return error.strerror or str(error) or type(error).__name__


def _channel(endpoint: str, tls: WorkerTls | None) -> _Channel:
    config = Configuration(http2_connection_window_size=_WINDOW, http2_stream_window_size=_WINDOW)
    if endpoint.startswith("unix://") and tls is None:
        return _Channel(path=endpoint.removeprefix("unix://"), config=config)
    url = urlsplit(endpoint)
    if url.scheme == "tcp" and tls is not None and url.hostname and url.port:
        return _Channel(url.hostname, url.port, ssl=tls.context, config=config)
    raise ValueError(f"{endpoint}: not unix:///path without TLS, nor tcp://address:port with it")


class _Channel(Channel):
    """A channel that connects once."""

    _used = False

    def _protocol_factory(self) -> H2Protocol:
        return _ControlProtocol(Handler(), self._config, self._h2_config)

    async def _create_connection(self) -> H2Protocol:
        if self._used:
            raise ConnectionResetError("the connection was lost")
        self._used = True
        if self._ssl is None:
            return await super()._create_connection()
        _, protocol = await connect_tls(self._protocol_factory, self._host, self._port, self._ssl)
        return protocol


class _ControlProtocol(H2Protocol):
    """Adds what grpclib has no setting for: bounded messages, probes of a silent peer, an event at the end."""

    transport: asyncio.Transport
    error: BaseException | None = None
    """The error that ended the connection."""
    violation: ProtocolError | None = None
    """The breach of HTTP/2 that ended it. grpclib does not keep it, so a later call cannot report it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport = cast("asyncio.Transport", transport)
        self.closed = asyncio.Event()
        self._h2_connection = self.connection._connection  # noqa: SLF001 - for the two methods that are replaced
        _probe_silent_peer(transport.get_extra_info("socket"))
        self.connection.create_stream = self._bounded_stream  # type: ignore[method-assign]
        self.connection.feed = self._feed  # type: ignore[method-assign]

    def connection_lost(self, exc: BaseException | None) -> None:
        self.error = exc
        super().connection_lost(exc)
        self.closed.set()

    def _feed(self, data: bytes) -> list[Event]:
        try:
            return self._h2_connection.receive_data(data)
        except ProtocolError as error:
            self.violation = error
            raise

    def _bounded_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> Stream:
        parts = (self.connection, self._h2_connection, self.transport)
        return _BoundedStream(*parts, stream_id=stream_id, wrapper=wrapper)


class _BoundedStream(Stream):
    """One call. grpclib asks it for a message's 5-byte header, then for as many bytes as that announces."""

    async def recv_data(self, size: int) -> bytes:
        if size > MAX_MESSAGE:
            raise WorkerFailed(f"buildkitd announced a message of {size} bytes; at most {MAX_MESSAGE} are accepted")
        return await super().recv_data(size)


def _probe_silent_peer(sock: socket.socket) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(_VANISHED / 3))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(_VANISHED / 3))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_VANISHED * 1000))
