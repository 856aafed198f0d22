"""One end of many streams, as a process: sends so many bytes on each, reads as many, and prints their digests.

What it is to do comes as JSON on stdin. It decides nothing about what is right; the test compares both ends.
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
AT_ONCE = 32  # reads or writes of a stream before the next one has its turn


class Stream:
    """One connection: what is still to be sent and heard on it, and the digests of what was."""

    def __init__(self, sock: socket.socket, length: int) -> None:
        self.sock = sock
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self._to_send, self._to_hear = length, length
        self._block = bytearray(os.urandom(BLOCK))
        self._rest = memoryview(b"")
        self._into = memoryview(bytearray(BLOCK))
        sock.setblocking(False)

    @property
    def done(self) -> bool:
        return not (self._to_send or self._to_hear or self._rest)

    def step(self) -> bool:
        """Sends and reads what can be; True if there may be more at once."""
        return self._send() | self._hear()

    def _send(self) -> bool:
        try:
            for _ in range(AT_ONCE):
                if not self._rest and not self._next():
                    return False
                self._rest = self._rest[self.sock.send(self._rest) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True

    def _next(self) -> bool:
        length = min(BLOCK, self._to_send)
        self._block[:8] = self._to_send.to_bytes(8, "big")  # no block is like another
        self._rest = memoryview(self._block)[:length]
        self.sent.update(self._rest)
        self._to_send -= length
        return bool(length)

    def _hear(self) -> bool:
        try:
            for _ in range(AT_ONCE):
                if not self._to_hear:
                    return False
                count = self.sock.recv_into(self._into[: self._to_hear])
                if not count:
                    sys.exit(f"the stream ended {self._to_hear} bytes early")
                self.received.update(self._into[:count])
                self._to_hear -= count
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        return True


def context(given: dict[str, str], *, server: bool) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.load_cert_chain(given["cert"], given["key"])
    made.set_alpn_protocols(["h2"])
    if not server:
        made.load_verify_locations(given["ca"])
    return made


def opened(given: dict[str, Any]) -> socket.socket:
    """The next connection: accepted from a listener that was passed on, or made."""
    tls, number = given.get("tls"), given.get("listener")
    if number is not None:
        sock, _ = socket.socket(fileno=os.dup(number)).accept()
        return context(tls, server=True).wrap_socket(sock, server_side=True) if tls else sock
    sock = socket.create_connection(given["connect"])
    return context(tls, server=False).wrap_socket(sock, server_hostname="localhost") if tls else sock


def main() -> None:
    given = json.load(sys.stdin)
    streams = [Stream(opened(given), given["length"]) for _ in range(given["count"])]
    selector = selectors.DefaultSelector()
    for stream in streams:
        selector.register(stream.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, stream)
    open_ones, more = len(streams), True
    while open_ones:
        ready = [key.data for key, _ in selector.select(0 if more else None)]
        more = False
        for stream in ready:
            more |= stream.step()
            if stream.done:
                selector.unregister(stream.sock)
                open_ones -= 1
    print(json.dumps({end: sorted(getattr(s, end).hexdigest() for s in streams) for end in ("sent", "received")}))


main()
