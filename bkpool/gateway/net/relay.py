"""Carries bytes between two non-blocking sockets on an event loop's readiness callbacks, without transports.

It moves what `exchange` decides and closes both sockets at the end. It knows nothing of tokens, leases or
certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final

from bkpool.gateway.net.duplex import AT_ONCE, CHUNK, RESEALED, DuplexRelay, LoopBuffers, PeerStream
from bkpool.gateway.net.socket_errors import SocketErrorWatcher

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends RST
_UNIX_SEND_BUFFER = 1024 * 1024
"""Asked for, and cut down by net.core.wmem_max: what one turn has for the worker should fit. With the system's 208
KiB it does not, and every turn costs two more calls and four changes of what is watched (docs/benchmarks.md)."""
_UNREAD_AT_ONCE = 16  # chunks


def _nobody() -> None:
    """Is told of the events of a closed leg, of which there are none."""


class SocketEndpoint:
    """A socket and the peer behind it.

    Args:
        loop: Watches the socket; only its add_reader, add_writer and their opposites are used.
        sock: Non-blocking; closed by `close`.
        end: The peer.
        vanished: Seconds after which a peer that does not answer at all, not even as a system, is given up; None for
            a Unix socket, whose system is ours.
    """

    __slots__ = (
        *("_alarm", "_finished", "_loop", "_on_readable", "_on_writable", "_reading", "_writing"),
        *("end", "failed", "local", "sock"),
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, end: PeerStream, *, vanished: float | None
    ) -> None:
        self.sock: Final = sock
        self.end: Final = end
        self._loop = loop
        self._reading = self._writing = self._finished = False
        self._alarm: SocketErrorWatcher | None = None
        self.failed = False
        """Its last words are there, and its end behind them; an event loop may tell of them no more."""
        self.local: Final = vanished is None
        if vanished is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Probes find out about a silent peer, the user timeout about one that is being sent to (tcp(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(vanished / 3)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(vanished / 3)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(vanished * 1000))

    def move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Goes over to another loop; nothing of it may be watched in the old one."""
        self._ignore()
        self._loop = loop

    def attach(self, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        """Sets who is told of the socket's events, those that are watched already and those that will be."""
        self._on_readable = on_readable
        self._on_writable = on_writable

    def watch(self, *, read: bool, write: bool) -> None:
        """Chooses the events of the socket that are told from now on."""
        if read != self._reading:
            self._reading = read
            if read:
                self._loop.add_reader(self.sock, self._readable)
            else:
                self._loop.remove_reader(self.sock)
        if write != self._writing:
            self._writing = write
            if write:
                self._loop.add_writer(self.sock, self._writable)
            else:
                self._loop.remove_writer(self.sock)

    def _readable(self) -> None:
        """What is watched stays so while the socket goes from hand to hand, without two changes of epoll."""
        self._on_readable()

    def _writable(self) -> None:
        self._on_writable()

    def heed(self, alarm: SocketErrorWatcher, told: Callable[[], None]) -> None:
        """Sets who is told, from now on and whether it is read or not, that the socket has failed."""
        self._alarm = alarm
        alarm.watch(self.sock, told)

    def fault(self) -> str:
        """What the socket has failed of. Asked once, the system forgets it."""
        return os.strerror(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET)

    def receive(self, into: memoryview) -> memoryview | None:
        """What the socket has, empty at its end, None if there is nothing now. Raises OSError."""
        try:
            return into[: self.sock.recv_into(into)]
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            if not self.local:
                raise
            self.end.deafen()  # it has ended with words of ours unread: its own were all before this
            return into[:0]

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
        self.watch(read=False, write=False)
        self.attach(_nobody, _nobody)  # whoever was told of events need not wait for the garbage collector
        if reset and not self.local:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        elif not reset:
            self._drop_unread()
        self._ignore()
        self.sock.close()

    def _drop_unread(self) -> None:
        """What lies unread would make of close() a reset, which overtakes what was sent."""
        with contextlib.suppress(OSError):
            for _ in range(_UNREAD_AT_ONCE):
                if not self.sock.recv(CHUNK):
                    return

    def _ignore(self) -> None:
        if self._alarm is not None:
            self._alarm.forget(self.sock)
            self._alarm = None


class SocketRelay:
    """Two legs joined until both directions have ended, one breaks, or it is stopped.

    Args:
        loop: The loop of this thread.
        scratch: The loop's shared memory.
        alarm: Hears that a leg has failed.
        client: The leg that was accepted.
        worker: The leg that was dialled.
        half_open: Seconds that one direction may outlive the other.
        over: Called once, after both sockets are closed, with the reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        scratch: LoopBuffers,
        alarm: SocketErrorWatcher,
        client: SocketEndpoint,
        worker: SocketEndpoint,
        *,
        half_open: float,
        over: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._scratch = scratch
        self._alarm = alarm
        self._client = client
        self._worker = worker
        self._half_open = half_open
        self._over = over
        self._exchange = DuplexRelay(client.end, worker.end, scratch.plain)
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self.active_at = loop.time()
        """When bytes last moved, by the loop's clock."""
        self.bereaved = False
        """The worker has ended, and its client had not."""

    def start(self, first: bytes) -> None:
        """Begins, with what the client has said already."""
        client, worker = self._client, self._worker
        client.attach(lambda: self._readable(client), self._settle)
        worker.attach(lambda: self._readable(worker), self._settle)
        client.heed(self._alarm, lambda: self._failed(client))
        worker.heed(self._alarm, lambda: self._failed(worker))
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

    def _readable(self, leg: SocketEndpoint) -> None:
        received = self._scratch.received
        if leg.end.tls is None:
            received = received[:CHUNK]
        elif self._other(leg).end.tls is not None:
            received = received[:RESEALED]
        for _ in range(0, AT_ONCE, len(received)):  # then the loop turns to others
            if not self._pass_on(leg, received):
                return
        while leg.failed and self._pass_on(leg, received):
            pass  # nobody tells of the rest

    def _failed(self, leg: SocketEndpoint) -> None:
        """A reset or a peer that has vanished; on this machine, a peer that has died with words of ours unread."""
        if not leg.local:
            self._close(f"{self._name(leg)}: {leg.fault()}", broken=leg)
            return
        leg.failed = True
        if self._exchange.may_read(leg.end):
            self._readable(leg)

    def _pass_on(self, leg: SocketEndpoint, received: memoryview) -> bool:
        """Passes on what a leg has; True if there may be more, and all of this was taken."""
        try:
            data = leg.receive(received)
            if data is None:
                return False
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
            if data and self._passed(leg):
                self.active_at = self._loop.time()
                return leg.failed or len(data) == len(received)
            self._settle()
        return False

    def _passed(self, leg: SocketEndpoint) -> bool:
        """Sends on what was received; True if that was all there was to it, as for nearly every chunk of a build."""
        other, end = self._other(leg), leg.end
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
        # Before both are seen to have ended: a worker that dies with words of its client's unread ends both at once.
        self.bereaved |= not client.end.heard_end and (worker.end.heard_end or worker.end.deaf)
        if exchange.over:
            self._close("ended", broken=None)
            return
        for leg in (client, worker):
            leg.watch(read=exchange.may_read(leg.end), write=bool(leg.end.unsent))
        if exchange.half_open and self._timer is None:
            self._timer = self._loop.call_later(self._half_open, self.stop, "half-open for too long")

    def _close(self, reason: str, *, broken: SocketEndpoint | None) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.bereaved |= broken is self._worker and not self._client.end.heard_end
        if self._timer is not None:
            self._timer.cancel()
        self._client.close(reset=broken is self._worker)
        self._worker.close(reset=broken is self._client)
        self._over(reason)

    def _other(self, leg: SocketEndpoint) -> SocketEndpoint:
        return self._worker if leg is self._client else self._client

    def _name(self, leg: SocketEndpoint) -> str:
        return "client" if leg is self._client else "worker"
