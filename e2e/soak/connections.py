"""Makes ten thousand connections through a real gateway, which end in every possible way, and counts what is left.

The gateway runs in a separate process (stub_world.py), so that only its own resources are counted. Speed is not
judged.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
from soak.growth import Row, compare
from soak.stub_world import HANDSHAKE

CONNECTIONS = 10_000
"""docs/testing.md promises this number."""
WARM = 1_000
"""Connections before the first count. Afterwards, everything that a process makes only once exists."""
THREADS = 4
FRESH = 200
"""Connections of one lease. Then a new lease follows, and the gateway must forget the old one."""
KEPT = 32
"""Unfinished handshakes that a thread keeps open at the same time."""
SETTLED = HANDSHAKE + 20.0
"""Seconds for the gateway to become idle. The last unfinished handshake takes the first two of them."""
TOLERANCES = {"rss": 6 * 1024.0}
"""In KiB. If each of 10,000 connections leaves 1 KiB, memory grows by 10,000. What the allocator keeps varies by
2,000."""
_RESET = struct.pack("ii", 1, 0)


class Gateway:
    """The gateway's process and its leases."""

    def __init__(self, directory: Path) -> None:
        program = Path(__file__).parent / "stub_world.py"
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        ready = self._answer()
        self.port: int = ready["port"]
        self._ca = Path(ready["ca"]).read_text()

    def lease(self, name: str, *, is_open: bool = True, over: bool = False) -> ssl.SSLContext:
        """Makes a lease, and returns the TLS settings of its holder."""
        files = self.ask(do="lease", name=name, open=is_open, over=over)
        context = ssl.create_default_context(cadata=self._ca)
        context.verify_flags |= ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME: the gateway has another time
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(files["cert"], files["key"])
        return context

    def ask(self, **command: Any) -> dict[str, Any]:
        with self._lock:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def end(self) -> None:
        """Ends the process. Raises AssertionError if its exit code is not 0."""
        self._process.stdin.close()
        assert self._process.wait(30) == 0, "the gateway failed at its end"
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, "the gateway's process has died"
        return json.loads(line)


class ClientThread:
    """The clients of one thread: one connection after the other, each with the next kind of ending."""

    def __init__(self, gateway: Gateway, name: str) -> None:
        self._gateway = gateway
        self._name = name
        self._held = gateway.lease(f"{name}-held", is_open=False)
        self._over = gateway.lease(f"{name}-over", over=True)
        self._unfinished: deque[socket.socket] = deque()
        self._lease = ""
        self._done = 0
        self.ends: Counter[str] = Counter()

    def run(self, count: int, on_done: Callable[[], None]) -> None:
        """Makes this number of connections, and calls `on_done` after each.

        Raises:
            AssertionError, OSError: A connection did not behave as expected.
        """
        endings = (self.clean, self.reset, self.refused, self.unfinished, self.half_closed, self.held)
        for _ in range(count):
            if self._done % FRESH == 0:
                self._take_a_fresh_lease()
            ending = endings[self._done % len(endings)]
            ending()
            self.ends[ending.__name__] += 1
            self._done += 1
            on_done()
        while self._unfinished:
            self._close_oldest_unfinished()

    def clean(self) -> None:
        """Sends data, ends TLS in order, and waits until the gateway does the same."""
        with self._echoed() as sock:
            sock.unwrap().close()

    def reset(self) -> None:
        """Sends data, and resets the connection."""
        sock = self._echoed()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.close()

    def refused(self) -> None:
        """Connects with an ended lease, and gets a refusal."""
        with self._handshaken(self._over) as sock:
            sock.sendall(_first_call())
            assert len(_read_to_end(sock)) > 40, "the refusal has no message"

    def unfinished(self) -> None:
        """Begins a handshake and sends nothing more.

        Every second client leaves before the gateway closes the connection.
        """
        sock = self._connected()
        sock.sendall(_client_hello()[:100])
        self._unfinished.append(sock)
        if len(self._unfinished) > KEPT:
            self._close_oldest_unfinished()

    def half_closed(self) -> None:
        """Sends data, and closes its direction of the socket without close_notify."""
        with self._echoed() as sock:
            sock.shutdown(socket.SHUT_WR)
            _read_to_end(sock)

    def held(self) -> None:
        """Waits for a worker that is starting, and leaves."""
        with self._handshaken(self._held) as sock:
            sock.sendall(_first_call()[:33])

    def _take_a_fresh_lease(self) -> None:
        if self._lease:
            self._gateway.ask(do="forget", name=self._lease)
        self._lease = f"{self._name}-{self._done}"
        self._open = self._gateway.lease(self._lease)

    def _close_oldest_unfinished(self) -> None:
        sock = self._unfinished.popleft()
        with sock:
            if self._done % 2:
                _read_to_end(sock)

    def _echoed(self) -> ssl.SSLSocket:
        sock = self._handshaken(self._open)
        sock.sendall(b"hello")
        assert (answer := sock.recv(5)) == b"hello", f"the worker's echo was {answer + _read_to_end(sock)!r}"
        return sock

    def _handshaken(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(self._connected(), server_hostname="localhost")

    def _connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._gateway.port), timeout=20)


def soak(directory: Path, connections: int, report: Callable[[str], None]) -> list[Row]:
    """Makes this number of connections. Returns the counts before and after them."""
    gateway = Gateway(directory)
    clients = [ClientThread(gateway, f"t{number}") for number in range(THREADS)]
    _connect(clients, WARM, report, "warming up")
    before = _count_at_rest(gateway)
    _connect(clients, connections, report, "connections")
    deadline = time.monotonic() + SETTLED
    while True:
        rows = compare(before, gateway.ask(do="count"), TOLERANCES)
        if all(row.well for row in rows) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    gateway.end()
    ends = sum((client.ends for client in clients), Counter())
    report(", ".join(f"{count} {end.replace('_', ' ')}" for end, count in ends.items()))
    return rows


def _connect(clients: list[ClientThread], count: int, report: Callable[[str], None], what: str) -> None:
    done = Counter()
    failed: list[BaseException] = []

    def run(client: ClientThread) -> None:
        try:
            client.run(count // len(clients), lambda: done.update([what]))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(3)
        for thread in threads[1:]:
            thread.join(0.1)
        report(f"{what}: {done[what]} of {count}")
    if failed:
        raise failed[0]


def _count_at_rest(gateway: Gateway) -> dict[str, Any]:
    """Returns a count of the gateway when it no longer changes."""
    deadline = time.monotonic() + SETTLED
    count = gateway.ask(do="count")
    while time.monotonic() < deadline:
        time.sleep(1)
        last, count = count, gateway.ask(do="count")
        if all(count[name] == last[name] for name in ("descriptors", "objects")):
            break
    return count


def _read_to_end(sock: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionError, ssl.SSLError):
        while data := sock.recv(16384):
            received += data
    return received


@cache
def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@cache
def _first_call() -> bytes:
    """Returns what a gRPC client sends first: preface, settings, and one call."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    path = (":path", "/moby.buildkit.v1.Control/Info")
    request = [(":method", "POST"), (":scheme", "https"), path, (":authority", "localhost")]
    http.send_headers(1, [*request, ("content-type", "application/grpc")])
    http.send_data(1, b"\0\0\0\0\0", end_stream=True)
    return http.data_to_send()
