"""One socket of a connection: which of its events are watched, what is read and sent, and how it is closed.

It works on an event loop's readiness callbacks, without transports. It does not decide what is relayed, and it knows
nothing of tokens, leases or certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from bkpool.gateway.net.buffers import PLAINTEXT_CHUNK
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.socket_errors import OnError, SocketErrorWatcher

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends RST
_UNIX_SEND_BUFFER = 1024 * 1024
"""Bytes to ask for; net.core.wmem_max limits them. The bytes for the worker of one loop iteration should fit. With
the system's default of 208 KiB they do not, and each iteration costs two more system calls and four changes of the
watched events (docs/benchmarks.md)."""
_MAX_UNREAD_CHUNKS = 16


def _ignore_event() -> None:
    """Replaces the callbacks of a closed endpoint, which has no events."""


class SocketEndpoint:
    """A socket and the stream of the peer behind it.

    Args:
        loop: Watches the socket. Only its add_reader, remove_reader, add_writer and remove_writer are used.
        sock: Non-blocking; `close` closes it.
        stream: The peer.
        peer_timeout: Seconds after which a peer whose system does not answer at all is given up; None for a Unix
            socket, whose peer is on this machine.

    Raises:
        OSError: The socket has failed already.
    """

    __slots__ = (
        *("_error_watcher", "_loop", "_on_readable", "_on_writable", "_reading", "_shut_down", "_writing"),
        *("failed", "local", "sock", "stream"),
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        stream: PeerStream,
        *,
        peer_timeout: float | None,
    ) -> None:
        self.sock: Final = sock
        self.stream: Final = stream
        self._loop = loop
        self._reading = self._writing = self._shut_down = False
        self._error_watcher: SocketErrorWatcher | None = None
        self.failed = False
        """The peer's last bytes can be read, and its end follows. An event loop may not report them again."""
        self.local: Final = peer_timeout is None
        if peer_timeout is None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Probes detect that a silent peer is gone; the user timeout detects it while bytes are sent (tcp(7)).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(peer_timeout / 3)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(peer_timeout / 3)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(peer_timeout * 1000))

    def move_to_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Moves to another loop. Before the call, `watch` must have removed both events from the old loop."""
        self._forget_errors()
        self._loop = loop

    def set_callbacks(self, on_readable: Callable[[], None], on_writable: Callable[[], None]) -> None:
        """Sets the callbacks for the events that `watch` has chosen or will choose."""
        self._on_readable = on_readable
        self._on_writable = on_writable

    def watch(self, *, read: bool, write: bool) -> None:
        """Chooses the events of the socket that are reported from now on."""
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
        """Lets `set_callbacks` replace the callback without two changes of the loop's epoll."""
        self._on_readable()

    def _writable(self) -> None:
        self._on_writable()

    def watch_errors(self, watcher: SocketErrorWatcher, on_error: OnError) -> None:
        """Sets the callback for an error or the hang-up of the socket, also while the socket is not read."""
        self._error_watcher = watcher
        watcher.watch(self.sock, on_error)

    def take_error(self) -> str:
        """Returns the system's text for the socket's error. The system forgets the error with this call."""
        return os.strerror(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET)

    def receive(self, into: memoryview) -> memoryview | None:
        """Reads once from the socket.

        Returns:
            The part of `into` that was filled; empty at the end of the stream; None if there is nothing now.

        Raises:
            OSError: The socket has failed.
        """
        try:
            return into[: self.sock.recv_into(into)]
        except (BlockingIOError, InterruptedError):
            return None
        except ConnectionResetError:
            if not self.local:
                raise
            self.stream.close_write()  # the peer closed before it read all of our bytes; all of its bytes are read
            return into[:0]

    def flush(self) -> None:
        """Sends as much as the socket accepts now, and ends the direction after the last byte.

        Raises:
            OSError: The socket has failed.
        """
        stream = self.stream
        unsent = stream.unsent
        if unsent:
            try:
                count = self.sock.send(unsent)
            except (BlockingIOError, InterruptedError):
                count = 0
            stream.sent(count)
        if stream.eof_queued and not self._shut_down and not stream.unsent and not stream.write_closed:
            self._shut_down = True
            self.sock.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        """Closes the socket. Does nothing if it is closed.

        Args:
            reset: Whether the peer shall see that the stream was cut, not ended. A Unix socket has no reset.
        """
        if self.sock.fileno() < 0:
            return
        self.watch(read=False, write=False)
        self.set_callbacks(_ignore_event, _ignore_event)  # frees the callbacks without the garbage collector
        if reset and not self.local:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        elif not reset:
            self._drop_unread()
        self._forget_errors()
        self.sock.close()

    def _drop_unread(self) -> None:
        """Reads what is left: with unread bytes, close() would send a reset, which overtakes what was sent."""
        with contextlib.suppress(OSError):
            for _ in range(_MAX_UNREAD_CHUNKS):
                if not self.sock.recv(PLAINTEXT_CHUNK):
                    return

    def _forget_errors(self) -> None:
        if self._error_watcher is not None:
            self._error_watcher.forget(self.sock)
            self._error_watcher = None
