"""Reports that a socket has failed (reset, timed out) or hung up while nobody reads it. An event loop does not.

A reader that is removed from its loop for back-pressure is not in the loop's epoll at all. uvloop reports a failed
socket once and never again, though bytes may lie before the error. Nothing here reads from a socket, or knows what it
is used for.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable

OnError = Callable[[bool], None]
"""Called with whether the socket has an error. Without one it has hung up."""


class SocketErrorWatcher:
    """One epoll for the errors and hang-ups of all sockets of a loop. The loop watches the epoll itself.

    A hang-up means that both directions have ended. A send that fails takes the error from its socket, so a reset
    may be reported as a hang-up only.

    Args:
        loop: The loop of this thread, or one that does not run yet.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, OnError] = {}
        loop.add_reader(self._epoll.fileno(), self._report_errors)

    def watch(self, sock: socket.socket, on_error: OnError) -> None:
        """Calls `on_error` when the socket gets an error or hangs up. It may be called more than once.

        A second `watch` of one socket replaces the callback.
        """
        number = sock.fileno()
        known = number in self._callbacks
        self._callbacks[number] = on_error
        # No event is requested: epoll always reports EPOLLERR and EPOLLHUP (epoll_ctl(2)), with EPOLLET not for ever.
        (self._epoll.modify if known else self._epoll.register)(number, select.EPOLLET)

    def forget(self, sock: socket.socket) -> None:
        """Watches this socket no longer. Call it before the socket is closed. Does nothing for an unknown socket."""
        if self._callbacks.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def close(self) -> None:
        """Watches nothing any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _report_errors(self) -> None:
        for number, events in self._epoll.poll(0):
            on_error = self._callbacks.get(number)
            if on_error is not None:
                on_error(bool(events & select.EPOLLERR))
