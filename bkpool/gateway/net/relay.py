"""Relays bytes between two non-blocking sockets on an event loop's readiness callbacks, without transports.

`duplex` decides what is sent where and when. This module calls the sockets and closes both at the end. It knows
nothing of tokens, leases or certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bkpool.gateway.net.buffers import MAX_READ, LoopBuffers
from bkpool.gateway.net.duplex import DuplexRelay
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.socket_errors import SocketErrorWatcher


@dataclass(slots=True)
class WorkerBytes:
    """What a relayed connection knows of its worker. Times are seconds of the loop's clock."""

    began_at: float
    received_at: float | None = None
    """When the last byte came from the worker; None: there was none yet."""


class SocketRelay:
    """Relays between two sockets until both directions have ended, one socket fails, or `stop` is called.

    Args:
        loop: The loop of this thread.
        buffers: The loop's shared memory.
        error_watcher: Reports that a socket has failed.
        client: The socket that was accepted.
        worker: The socket that was dialled.
        half_open_timeout: Seconds for which one direction may go on after the other has ended.
        on_closed: Called once with the reason, after both sockets are closed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffers: LoopBuffers,
        error_watcher: SocketErrorWatcher,
        client: SocketEndpoint,
        worker: SocketEndpoint,
        *,
        half_open_timeout: float,
        on_closed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._buffers = buffers
        self._error_watcher = error_watcher
        self._client = client
        self._worker = worker
        self._half_open_timeout = half_open_timeout
        self._on_closed = on_closed
        self._duplex = DuplexRelay(client.stream, worker.stream, buffers.plaintext)
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.active_at = loop.time()
        """When bytes last moved, in seconds of the loop's clock."""
        self.worker_bytes = WorkerBytes(self.active_at)
        self.worker_closed_first = False
        """The worker has ended the connection before its client did."""

    def start(self, first_bytes: bytes) -> None:
        """Starts to relay.

        Args:
            first_bytes: Plaintext that the client has sent already.
        """
        client, worker = self._client, self._worker
        client.set_callbacks(partial(self._readable, client, worker), self._flush_and_watch)
        worker.set_callbacks(partial(self._readable, worker, client), self._flush_and_watch)
        client.watch_errors(self._error_watcher, partial(self._failed, client, worker))
        worker.watch_errors(self._error_watcher, partial(self._failed, worker, client))
        if first_bytes:
            worker.stream.encode(memoryview(first_bytes))
        if client.stream.eof_received:
            worker.stream.write_eof()
        self._flush_and_watch()

    def stop(self, reason: str) -> None:
        """Ends both connections now, with close_notify where TLS is used. Calls `on_closed` before it returns."""
        for endpoint in (self._client, self._worker):
            endpoint.stream.write_eof()
            with contextlib.suppress(OSError):
                endpoint.flush()
        self._close(reason, broken=None)

    def _readable(self, source: SocketEndpoint, target: SocketEndpoint) -> None:
        buffers, tls = self._buffers, source.stream.tls
        if tls is None:
            received = buffers.received_plaintext
        elif tls.small_records:
            received = buffers.received_small
        elif target.stream.tls is not None:
            received = buffers.received_ciphertext
        else:
            received = buffers.received
        for _ in range(0, MAX_READ, len(received)):  # then the loop turns to other connections
            if not self._forward(source, target, received):
                return
            if tls is not None and tls.small_records:
                break
        while source.failed and self._forward(source, target, received):
            pass  # the loop does not report the remaining bytes

    def _failed(self, endpoint: SocketEndpoint, other: SocketEndpoint, error: bool) -> None:
        """Handles an error or the hang-up of the socket.

        Over TCP an error is a reset, or a peer that does not answer. On a Unix socket the peer was closed with bytes
        of ours unread; what it sent before can still be read. The same is true after a hang-up.
        """
        if error and not endpoint.local:
            self._close(f"{self._name(endpoint)}: {endpoint.take_error()}", broken=endpoint)
            return
        endpoint.failed = True
        if self._duplex.may_read(endpoint.stream):
            self._readable(endpoint, other)

    def _forward(self, source: SocketEndpoint, target: SocketEndpoint, received: memoryview) -> bool:
        """Reads once and sends that; True if there may be more and the target accepted all of this."""
        try:
            data = source.receive(received)
            if data is None:
                return False
            self.active_at = self._loop.time()
            if source is self._worker and data:
                self.worker_bytes.received_at = self.active_at
            self._duplex.received(source.stream, data)
        except ssl.SSLError as error:
            with contextlib.suppress(OSError):
                source.flush()  # the alert
            self._close(f"{self._name(source)}: TLS failed: {error.reason}", broken=source)
        except OSError as error:
            self._close(f"{self._name(source)}: {error.strerror}", broken=source)
        except Exception:
            self._close("an internal fault", broken=source)  # frees the slot; the loop's handler logs the error
            raise
        else:
            if data and self._sent_all(source, target):
                return source.failed or len(data) == len(received)
            self._flush_and_watch()
        return False

    def _sent_all(self, source: SocketEndpoint, target: SocketEndpoint) -> bool:
        """Sends to the target what was received from the source.

        Returns:
            True if nothing else is to be done: all is sent and no direction ends. That is so for almost every chunk
            of a build.
        """
        try:
            target.flush()
        except OSError:
            return False  # the next flush gets the same error and handles it
        ours, theirs = source.stream, target.stream
        return not (theirs.unsent or ours.unsent or ours.eof_received or theirs.eof_queued)

    def _flush_and_watch(self) -> None:
        """Sends what can be sent, and watches for what can happen next."""
        duplex, client, worker = self._duplex, self._client, self._worker
        self.active_at = self._loop.time()
        for endpoint in (client, worker):
            try:
                endpoint.flush()
            except OSError:
                endpoint.stream.close_write()  # the bytes that it sent before may still be read
        # Set before `finished` is asked: a worker that dies with unread bytes of its client ends both directions.
        self.worker_closed_first |= not client.stream.eof_received and (
            worker.stream.eof_received or worker.stream.write_closed
        )
        if duplex.finished:
            self._close("ended", broken=None)
            return
        for endpoint in (client, worker):
            endpoint.watch(read=duplex.may_read(endpoint.stream), write=bool(endpoint.stream.unsent))
        if duplex.half_open and self._timer is None:
            self._timer = self._loop.call_later(self._half_open_timeout, self.stop, "half-open for too long")

    def _close(self, reason: str, *, broken: SocketEndpoint | None) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.worker_closed_first |= broken is self._worker and not self._client.stream.eof_received
        if self._timer is not None:
            self._timer.cancel()
        self._client.close(reset=broken is self._worker)
        self._worker.close(reset=broken is self._client)
        self._on_closed(reason)

    def _name(self, endpoint: SocketEndpoint) -> str:
        return "client" if endpoint is self._client else "worker"
