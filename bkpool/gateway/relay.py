"""Carries bytes between two non-blocking sockets on an event loop's readiness callbacks, without transports.

It moves what `exchange` decides and closes both sockets at the end. It knows nothing of tokens, leases or
certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final

from bkpool.gateway.exchange import End, Exchange, Scratch

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends RST
_IDLE_BEFORE_PROBES = 30  # seconds
_BETWEEN_PROBES = 10  # seconds
_PROBES = 3  # unanswered: a vanished peer is noticed within a minute


def _nobody() -> None:
    """Is told of the events of a closed leg, of which there are none."""


class Leg:
    """A socket and the peer behind it.

    Args:
        loop: Watches the socket; only its add_reader, add_writer and their opposites are used.
        sock: Non-blocking; closed by `close`.
        end: The peer.
    """

    __slots__ = ("_finished", "_loop", "_on_readable", "_on_writable", "_reading", "_writing", "end", "sock")

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, end: End) -> None:
        self.sock: Final = sock
        self.end: Final = end
        self._loop = loop
        self._reading = self._writing = self._finished = False
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_BEFORE_PROBES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _BETWEEN_PROBES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)

    def attach(self, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        """Sets who is told of the socket's events; nobody is until `watch`."""
        self.watch(read=False, write=False)
        self._on_readable = on_readable
        self._on_writable = on_writable

    def watch(self, *, read: bool, write: bool) -> None:
        """Chooses the events of the socket that are told from now on."""
        if read != self._reading:
            self._reading = read
            if read:
                self._loop.add_reader(self.sock, self._on_readable)
            else:
                self._loop.remove_reader(self.sock)
        if write != self._writing:
            self._writing = write
            if write:
                self._loop.add_writer(self.sock, self._on_writable)
            else:
                self._loop.remove_writer(self.sock)

    def receive(self, into: memoryview) -> memoryview | None:
        """What the socket has, empty at its end, None if there is nothing now. Raises OSError."""
        try:
            return into[: self.sock.recv_into(into)]
        except (BlockingIOError, InterruptedError):
            return None

    def flush(self) -> None:
        """Sends what the socket takes now, and the end after the last of it. Raises OSError."""
        end = self.end
        if end.unsent:
            try:
                count = self.sock.send(end.unsent)
            except (BlockingIOError, InterruptedError):
                count = 0
            end.sent(count)
        if end.said_end and not self._finished and not end.unsent and not end.deaf:
            self._finished = True
            self.sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        """Closes the socket; with reset the peer learns that it was cut short. Closed already: does nothing."""
        if self.sock.fileno() < 0:
            return
        self.attach(_nobody, _nobody)  # whoever was told of events need not wait for the garbage collector
        if reset and self.sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.sock.close()


class Relay:
    """Two legs joined until both directions have ended, one breaks, or it is stopped.

    Args:
        loop: The loop of this thread.
        scratch: The loop's shared memory.
        client: The leg that was accepted.
        worker: The leg that was dialled.
        half_open: Seconds that one direction may outlive the other.
        over: Called once, after both sockets are closed, with the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        scratch: Scratch,
        client: Leg,
        worker: Leg,
        *,
        half_open: float,
        over: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._scratch = scratch
        self._client = client
        self._worker = worker
        self._half_open = half_open
        self._over = over
        self._exchange = Exchange(client.end, worker.end, scratch.plain)
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.active_at = loop.time()
        """When bytes last moved, by the loop's clock."""

    def start(self, first: bytes) -> None:
        """Begins, with what the client has said already."""
        client, worker = self._client, self._worker
        client.attach(lambda: self._readable(client), self._settle)
        worker.attach(lambda: self._readable(worker), self._settle)
        if first:
            worker.end.encode(memoryview(first))
        if client.end.heard_end:
            worker.end.finish()
        self._settle()

    def stop(self, reason: str) -> None:
        """Ends both legs now, telling their TLS so; `over` is called before this returns."""
        for leg in (self._client, self._worker):
            leg.end.finish()
            with contextlib.suppress(OSError):
                leg.flush()
        self._close(reason, broken=None)

    def _readable(self, leg: Leg) -> None:
        try:
            data = leg.receive(self._scratch.received)
            if data is None:
                return
            self._exchange.received(leg.end, data)
        except ssl.SSLError as error:
            with contextlib.suppress(OSError):
                leg.flush()  # the alert
            self._close(f"{self._name(leg)}: TLS failed: {error.reason}", broken=leg)
        except OSError as error:
            self._close(f"{self._name(leg)}: {error.strerror}", broken=leg)
        except Exception:
            self._close("an internal fault", broken=leg)  # no slot is leaked; the loop's handler logs the rest
            raise
        else:
            if data and self._passed(leg.end):
                self.active_at = self._loop.time()
            else:
                self._settle()

    def _passed(self, end: End) -> bool:
        """Sends on what was received; True if that was all there was to it, as for nearly every chunk of a build."""
        other = self._worker if end is self._client.end else self._client
        try:
            other.flush()
        except OSError:
            return False  # the next flush meets it again
        return not (other.end.unsent or end.unsent or end.heard_end or other.end.said_end)

    def _settle(self) -> None:
        """Sends what can be sent, and watches for what can happen next."""
        exchange, client, worker = self._exchange, self._client, self._worker
        self.active_at = self._loop.time()
        for leg in (client, worker):
            try:
                leg.flush()
            except OSError:
                leg.end.deafen()  # its own last words may still be there to be read
        if exchange.over:
            self._close("ended", broken=None)
            return
        for leg in (client, worker):
            leg.watch(read=exchange.may_read(leg.end), write=bool(leg.end.unsent))
        if exchange.half_open and self._timer is None:
            self._timer = self._loop.call_later(self._half_open, self.stop, "half-open for too long")

    def _close(self, reason: str, *, broken: Leg | None) -> None:
        if self._stopped:
            return
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
        self._client.close(reset=broken is self._worker)
        self._worker.close(reset=broken is self._client)
        self._over(reason)

    def _name(self, leg: Leg) -> str:
        return "client" if leg is self._client else "worker"
