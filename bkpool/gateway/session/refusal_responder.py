"""Answers a refused client: it answers the first call, lets the client read the answer, and only then closes.

If a socket is closed while it has unread bytes, the system sends a reset, which may overtake the answer. So the
client's bytes are read and dropped. Time and bytes are bounded. The text of the answer is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.limits import GatewayLimits


class RefusalResponder:
    """Runs a refused connection until it is closed.

    Args:
        loop: The loop of this thread.
        buffers: The loop's shared memory.
        client: The client's endpoint. It is closed at the end.
        limits: The gateway's limits.
        on_closed: Called once, after the socket is closed, with the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffers: LoopBuffers,
        client: SocketEndpoint,
        limits: GatewayLimits,
        on_closed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._buffers = buffers
        self._client = client
        self._limits = limits
        self._on_closed = on_closed
        self._answer: GrpcAnswer | None = None
        self._bytes_read = 0
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, answer: GrpcAnswer | None, first_bytes: bytes) -> None:
        """Starts to answer.

        Args:
            answer: The answer. If it is None, only the unsent bytes (a TLS alert) are sent.
            first_bytes: The plaintext that the client has sent already.
        """
        self._client.set_callbacks(self._readable, self._flush_and_watch)
        if answer is None:
            self._client.stream.eof_queued = True
            self._linger()
        else:
            self._answer = answer
            self._set_timer(self._limits.refusal_timeout, self._no_call)
            self._send(answer.receive(first_bytes))
        self._flush_and_watch()

    def stop(self, reason: str) -> None:
        """Closes the socket now."""
        if self._stopped:
            return
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._client.close()
        self._on_closed(reason)

    def _readable(self) -> None:
        stream, limits = self._client.stream, self._limits
        try:
            data = self._client.receive(self._buffers.received[: limits.max_held_bytes])
            if data is None:
                return
            self._bytes_read += len(data)
            if not data or self._bytes_read > limits.max_refusal_bytes:
                self.stop("refused")
                return
            if self._answer is not None:
                self._send(self._answer.receive(bytes(stream.decode(data, self._buffers.plaintext))))
        except OSError as error:  # includes the errors of TLS
            self.stop(f"refused; client: {error.strerror}")
        else:
            self._flush_and_watch()

    def _send(self, data: bytes) -> None:
        if data:
            self._client.stream.encode(memoryview(data))
        if self._answer is not None and self._answer.finished:
            self._answer = None
            self._client.stream.write_eof()
            self._linger()

    def _no_call(self) -> None:
        """The client has not made a call in time."""
        if self._answer is not None:
            self._send(self._answer.goaway())
            self._flush_and_watch()

    def _linger(self) -> None:
        self._set_timer(self._limits.linger_timeout, lambda: self.stop("refused"))

    def _flush_and_watch(self) -> None:
        if self._stopped:
            return
        try:
            self._client.flush()
        except OSError as error:
            self.stop(f"refused; client: {error.strerror}")
        else:
            self._client.watch(read=True, write=bool(self._client.stream.unsent))

    def _set_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, callback)
