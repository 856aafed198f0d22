"""What the kernel knows about the other side of a connection: whether it is there, and whether it has an answer.

Nothing here reads from a socket or writes to it. A side that has only ended its own stream (a half-close) is there.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios

from bkpool.allocation import Delivery

_NUMBER = struct.Struct("i")


def is_broken(sock: socket.socket) -> bool:
    """Whether the other side has reset the connection, or has closed both directions of a Unix socket.

    A TCP socket that the other side has closed looks like a half-close until something is sent to it.
    """
    return bool(_events(sock) & (select.POLLERR | select.POLLHUP))


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that the other side does not have yet: its kernel over TCP, its program over a Unix socket.

    After a reset it is still right. On Linux, SIOCOUTQ has the number of TIOCOUTQ.
    """
    (count,) = _NUMBER.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_NUMBER.size)))
    return int(count)


def _events(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # POLLERR and POLLHUP are reported always
    return next((events for _, events in poll.poll(0)), 0)


class SocketReceipt:
    """Knows what became of the last answer on a connection (`allocation.Receipt`).

    Args:
        transport: The connection, after the answer was given to it.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sock = transport.get_extra_info("socket")
        self._result: Delivery | None = None
        if transport.is_closing():  # the write failed
            self._result = Delivery.LOST

    def delivery(self) -> Delivery:
        """See Receipt."""
        return self._result or self._look(reset=False)

    def stream_ended(self) -> None:
        """Notes that the caller has ended their stream, or has sent another request. Both acknowledge the answer."""
        if self.delivery() is Delivery.TAKEN:
            self._result = Delivery.TAKEN

    def connection_ended(self, error: BaseException | None) -> None:
        """Notes that the connection is over. Its socket is closed after this.

        Args:
            error: What broke it; None if this side or the caller closed it.
        """
        found = self._result or self._look(reset=error is not None)
        # Closed by this side, as the caller asked for: at this moment they were still there.
        self._result = Delivery.TAKEN if found is Delivery.ON_ITS_WAY else found

    def _look(self, *, reset: bool) -> Delivery:
        if self._sock.fileno() < 0:  # with TLS, uvloop closes the socket before it says so
            return Delivery.UNKNOWN if reset else Delivery.TAKEN
        events = _events(self._sock)
        unix = self._sock.family == socket.AF_UNIX
        # A write takes the error from its socket. This side has ended nothing, so over TCP a hang-up is a reset, too.
        reset = reset or bool(events & (select.POLLERR if unix else select.POLLERR | select.POLLHUP))
        missing = self._transport.get_write_buffer_size() > 0 or unacknowledged(self._sock) > 0
        if not reset and not events & select.POLLHUP:
            return Delivery.ON_ITS_WAY if missing else Delivery.TAKEN
        if missing or (reset and unix):  # a Unix socket is reset only if bytes were left
            return Delivery.LOST
        return Delivery.UNKNOWN if reset else Delivery.TAKEN
