"""The client's socket until it is relayed or refused: the TLS handshake, and the first bytes of a held client.

It reports what happens on the socket and decides nothing. It does not know what a certificate or a byte means.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Protocol

from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.gateway.session.limits import GatewayLimits

_EMPTY = memoryview(b"")


class SocketHost(Protocol):
    """The parts of a loop that a client's socket uses."""

    loop: asyncio.AbstractEventLoop
    context: ssl.SSLContext
    buffers: LoopBuffers
    error_watcher: SocketErrorWatcher
    limits: GatewayLimits


class ClientSocketEvents(Protocol):
    """What a client's socket reports."""

    def first_bytes_received(self) -> None:
        """The client has sent bytes of its handshake."""

    def handshake_complete(self) -> None:
        """The TLS handshake is complete."""

    def certificate_received(self, der: bytes | None) -> None:
        """The client's certificate, or None if it sent none. Called after `handshake_complete`."""

    def client_sent_eof(self) -> None:
        """The client sends nothing more."""

    def tls_failed(self, reason: str) -> None:
        """The client broke the TLS protocol."""

    def socket_failed(self, reason: str) -> None:
        """The socket has failed."""

    def internal_error(self) -> None:
        """A callback raised an exception that is a fault in bkpool. The loop's handler logs it."""


class _Nobody:
    """Gets the events of a closed socket. So its connection and its TLS are freed without the garbage collector."""

    def first_bytes_received(self) -> None: ...

    def handshake_complete(self) -> None: ...

    def certificate_received(self, der: bytes | None) -> None: ...

    def client_sent_eof(self) -> None: ...

    def tls_failed(self, reason: str) -> None: ...

    def socket_failed(self, reason: str) -> None: ...

    def internal_error(self) -> None: ...


_NOBODY = _Nobody()


class ClientSocket:
    """One accepted socket, until `release` hands it to a relay or a refusal.

    Args:
        host: The socket's loop.
        sock: Accepted and non-blocking.
        events: Called in the socket's loop.

    Raises:
        OSError: The client has closed the connection already.
    """

    def __init__(self, host: SocketHost, sock: socket.socket, events: ClientSocketEvents) -> None:
        self._host = host
        self._events: ClientSocketEvents = events
        self._tls = TlsStream(host.context)
        peer_timeout = host.limits.client_peer_timeout
        self.endpoint = SocketEndpoint(host.loop, sock, PeerStream(self._tls), peer_timeout=peer_timeout)
        self._handshake_complete = False
        self._held_bytes = bytearray()
        self._released = False
        self._watch()

    @property
    def server_name(self) -> str | None:
        """The name that the client asked for (SNI)."""
        return self._tls.server_name

    @property
    def eof_received(self) -> bool:
        """Whether the client sends nothing more."""
        return self.endpoint.stream.eof_received

    def leave_loop(self, host: SocketHost) -> None:
        """Leaves the loop for another one. No event is reported until `enter_loop` is called in the other loop."""
        self.endpoint.watch(read=False, write=False)
        self.endpoint.move_to_loop(host.loop)
        self._host = host

    def enter_loop(self) -> None:
        """Reports events in the new loop from now on."""
        self._watch()

    def flush(self) -> None:
        """Sends what can be sent now, and watches for the next events."""
        try:
            self._flush()
        except OSError as error:
            self._events.socket_failed(error.strerror or str(error))

    def release(self) -> bytes:
        """Hands `endpoint` to another owner.

        From now on only `socket_failed` is reported, for as long as the new owner does not watch for errors itself.

        Returns:
            The plaintext that the client has sent.
        """
        self._released = True
        held, self._held_bytes = bytes(self._held_bytes), bytearray()
        return held

    def close(self) -> None:
        """Closes the socket, and reports nothing any more. Does nothing if it is closed."""
        self._released = True
        self.endpoint.close()
        self._events = _NOBODY

    def _watch(self) -> None:
        self.endpoint.set_callbacks(self._readable, self.flush)
        self.endpoint.watch(read=True, write=False)
        self.endpoint.watch_errors(self._host.error_watcher, self._failed)

    def _readable(self) -> None:
        try:
            data = self.endpoint.receive(self._host.buffers.received[: self._room()])
            if data is None:
                return
            if self._handshake_complete:
                self._hold(data)
            else:
                self._handshake(data)
        except ssl.SSLError as error:
            self._events.tls_failed(error.reason or "")
        except OSError as error:
            self._events.socket_failed(error.strerror or str(error))
        except Exception:
            self._events.internal_error()
            raise

    def _failed(self, error: bool) -> None:
        """Handles a reset by the client. It may have sent bytes before, which nobody needs any more."""
        if error:  # a hang-up alone follows an end or an error that is known
            self._events.socket_failed(self.endpoint.take_error())

    def _handshake(self, data: memoryview) -> None:
        if not data:
            self._events.client_sent_eof()
            return
        self._events.first_bytes_received()
        try:
            complete = self._tls.handshake(data)
        finally:
            self.endpoint.stream.queue(self._tls.take())
        if complete:
            self._handshake_complete = True
            self._events.handshake_complete()
            self._keep(_EMPTY)  # the bytes that came together with the end of the handshake
            self._events.certificate_received(self._tls.peer_certificate())
        else:
            self._flush()

    def _hold(self, data: memoryview) -> None:
        if data:
            self._keep(data)
        else:
            self.endpoint.stream.eof_received = True
        if self.eof_received:
            self._events.client_sent_eof()
        self._flush()

    def _keep(self, data: memoryview) -> None:
        self._held_bytes += self.endpoint.stream.decode(data, self._host.buffers.plaintext)

    def _flush(self) -> None:
        if self._released:
            return
        stream = self.endpoint.stream
        self.endpoint.flush()
        self.endpoint.watch(read=not stream.eof_received and self._room() > 0, write=bool(stream.unsent))

    def _room(self) -> int:
        """Returns how many bytes may be read now."""
        return self._host.limits.max_held_bytes - len(self._held_bytes)
