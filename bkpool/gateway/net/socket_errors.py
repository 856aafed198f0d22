"""Hears that a socket has failed (reset, timed out) while nobody reads it, which an event loop does not tell.

A reader that is off its loop for back-pressure is not in the loop's epoll at all, and uvloop tells of a failed socket
once and never again, though bytes may lie before the error. Nothing here reads, or knows what a socket is for.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable


class SocketErrorWatcher:
    """One epoll for the errors of all sockets of a loop; it is itself watched by the loop.

    Args:
        loop: Not running yet, or the one of this thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._ring)

    def watch(self, sock: socket.socket, told: Callable[[], None]) -> None:
        """Calls back once the socket has an error; again for the same socket: replaces who is called."""
        number = sock.fileno()
        known = number in self._told
        self._told[number] = told
        # No event is asked for: errors are told unasked (epoll_ctl(2), EPOLLERR), and with EPOLLET only once.
        (self._epoll.modify if known else self._epoll.register)(number, select.EPOLLET)

    def forget(self, sock: socket.socket) -> None:
        """To be called before the socket is closed. Not watched: does nothing."""
        if self._told.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def close(self) -> None:
        """Watches nothing any more."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _ring(self) -> None:
        for number, events in self._epoll.poll(0):
            told = self._told.get(number)
            if told is not None and events & select.EPOLLERR:
                told()
