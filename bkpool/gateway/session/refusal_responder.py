"""Sees a refused client off: answers its first call, lets it read the answer, and only then closes.

A socket closed with unread bytes in it sends a reset, which overtakes the answer; so they are read and dropped. Time
and bytes are bounded. What the answer says is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.limits import GatewayLimits


class RefusalResponder:
    """The last part of a refused connection.

    Args:
        loop: The loop of this thread.
        buffers: The loop's shared memory.
        client: The leg that was accepted.
        limits: The bounds.
        over: Called once, after the socket is closed, with the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffers: LoopBuffers,
        client: SocketEndpoint,
        limits: GatewayLimits,
        over: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._buffers = buffers
        self._client = client
        self._limits = limits
        self._over = over
        self._answer: GrpcAnswer | None = None
        self._heard = 0
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, answer: GrpcAnswer | None, first: bytes) -> None:
        """Begins, with what the client has said already. Without an answer only what is unsent (an alert) is sent."""
        self._client.set_callbacks(self._readable, self._settle)
        if answer is None:
            self._client.stream.eof_queued = True
            self._linger()
        else:
            self._answer = answer
            self._await(self._limits.refusal, self._part)
            self._say(answer.receive(first))
        self._settle()

    def stop(self, reason: str) -> None:
        """Closes the socket now."""
        if self._stopped:
            return
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._client.close()
        self._over(reason)

    def _readable(self) -> None:
        stream, limits = self._client.stream, self._limits
        try:
            data = self._client.receive(self._buffers.received[: limits.first_bytes])
            if data is None:
                return
            self._heard += len(data)
            if not data or self._heard > limits.refusal_bytes:
                self.stop("refused")
                return
            if self._answer is not None:
                self._say(self._answer.receive(bytes(stream.decode(data, self._buffers.plaintext))))
        except OSError as error:  # also TLS's own errors
            self.stop(f"refused; client: {error.strerror}")
        else:
            self._settle()

    def _say(self, data: bytes) -> None:
        if data:
            self._client.stream.encode(memoryview(data))
        if self._answer is not None and self._answer.finished:
            self._answer = None
            self._client.stream.write_eof()
            self._linger()

    def _part(self) -> None:
        """The client calls nothing."""
        if self._answer is not None:
            self._say(self._answer.goodbye())
            self._settle()

    def _linger(self) -> None:
        self._await(self._limits.linger, lambda: self.stop("refused"))

    def _settle(self) -> None:
        if self._stopped:
            return
        try:
            self._client.flush()
        except OSError as error:
            self.stop(f"refused; client: {error.strerror}")
        else:
            self._client.watch(read=True, write=bool(self._client.stream.unsent))

    def _await(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, then)
