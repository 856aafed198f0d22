"""One end of many streams, as a process: sends a number of bytes on each, reads as many, and prints their digests.

It reads its task as JSON from standard input. It judges nothing: the test compares both ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import selectors
import socket
import ssl
import sys
from typing import Any

BLOCK = 1024 * 1024
MAX_STEPS = 32  # reads or writes of one stream before the next stream's turn


class Stream:
    """One connection: what must still be sent and received on it, and the digests of what was."""

    def __init__(self, sock: socket.socket, length: int) -> None:
        self.sock = sock
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self._to_send, self._to_receive = length, length
        self._block = bytearray(os.urandom(BLOCK))
        self._rest = memoryview(b"")
        self._into = memoryview(bytearray(BLOCK))
        sock.setblocking(False)

    @property
    def done(self) -> bool:
        return not (self._to_send or self._to_receive or self._rest)

    def step(self) -> bool:
        """Sends and reads as much as possible. Returns True if there may be more at once."""
        return self._send() | self._receive()

    def _send(self) -> bool:
        try:
            for _ in range(MAX_STEPS):
                if not self._rest and not self._next():
                    return False
                self._rest = self._rest[self.sock.send(self._rest) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True

    def _next(self) -> bool:
        length = min(BLOCK, self._to_send)
        self._block[:8] = self._to_send.to_bytes(8, "big")  # makes every block different
        self._rest = memoryview(self._block)[:length]
        self.sent.update(self._rest)
        self._to_send -= length
        return bool(length)

    def _receive(self) -> bool:
        try:
            for _ in range(MAX_STEPS):
                if not self._to_receive:
                    return False
                count = self.sock.recv_into(self._into[: self._to_receive])
                if not count:
                    sys.exit(f"the stream ended {self._to_receive} bytes early")
                self.received.update(self._into[:count])
                self._to_receive -= count
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True


def context(task: dict[str, str], *, server: bool) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.load_cert_chain(task["cert"], task["key"])
    made.set_alpn_protocols(["h2"])
    if not server:
        made.load_verify_locations(task["ca"])
    return made


def open_connection(task: dict[str, Any]) -> socket.socket:
    """Returns the next connection: accepted from an inherited listener, or made."""
    tls, number = task.get("tls"), task.get("listener")
    if number is not None:
        sock, _ = socket.socket(fileno=os.dup(number)).accept()
        return context(tls, server=True).wrap_socket(sock, server_side=True) if tls else sock
    sock = socket.create_connection(task["connect"])
    return context(tls, server=False).wrap_socket(sock, server_hostname="localhost") if tls else sock


def main() -> None:
    task = json.load(sys.stdin)
    streams = [Stream(open_connection(task), task["length"]) for _ in range(task["count"])]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, stream)
    open_streams, more = len(streams), True
    while open_streams:
        ready = [key.data for key, _ in selector.select(0 if more else None)]
        more = False
        for stream in ready:
            more |= stream.step()
            if stream.done:
                selector.unregister(stream.sock)
                open_streams -= 1
    print(json.dumps({end: sorted(getattr(s, end).hexdigest() for s in streams) for end in ("sent", "received")}))


main()
