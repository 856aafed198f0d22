"""Ten thousand connections through a real gateway, ended in every way that connections end; then it is counted.

The gateway is a process of its own (stub_world.py), so that what is counted is its alone. No speed is judged.
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
"""By issue 6."""
WARM = 1_000
"""Connections before the first count: what is made once in a process has been made by then."""
THREADS = 4
FRESH = 200
"""Connections of one lease; then a new lease takes over, and the tables are to forget the old one."""
KEPT = 32
"""Unfinished handshakes that a thread keeps open at once."""
SETTLED = HANDSHAKE + 20.0
"""Seconds for the gateway to come to rest; the last handshake that never ends takes the first two of them."""
TOLERANCES = {"rss": 6 * 1024.0}
"""KiB. 10,000 connections that leave 1 KiB each grow by 10,000; what the allocator keeps varies by 2,000."""
_RESET = struct.pack("ii", 1, 0)


class Gateway:
    """The gateway's process, and the leases that it was told of."""

    def __init__(self, directory: Path) -> None:
        program = Path(__file__).parent / "stub_world.py"
        self._process = subprocess.Popen(
            [sys.executable, str(program), str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        told = self._answer()
        self.port: int = told["port"]
        self._ca = Path(told["ca"]).read_text()

    def lease(self, name: str, *, is_open: bool = True, over: bool = False) -> ssl.SSLContext:
        """A lease, as the TLS settings of its holder."""
        files = self.ask(do="lease", name=name, open=is_open, over=over)
        context = ssl.create_default_context(cadata=self._ca)
        context.verify_flags |= ssl.VerifyFlags(0x200000)  # the gateway's tests live at a time of their own
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(files["cert"], files["key"])
        return context

    def ask(self, **command: Any) -> dict[str, Any]:
        with self._lock:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def end(self) -> None:
        """Raises AssertionError if it does not end well."""
        self._process.stdin.close()
        assert self._process.wait(30) == 0, "the gateway did not end well"
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        assert line, "the gateway's process has died"
        return json.loads(line)


class ClientThread:
    """One thread's clients: connection after connection, each ended in the next of the ways."""

    def __init__(self, gateway: Gateway, name: str) -> None:
        self._gateway = gateway
        self._name = name
        self._held = gateway.lease(f"{name}-held", is_open=False)
        self._over = gateway.lease(f"{name}-over", over=True)
        self._unfinished: deque[socket.socket] = deque()
        self._lease = ""
        self._done = 0
        self.ends: Counter[str] = Counter()

    def run(self, count: int, told: Callable[[], None]) -> None:
        """So many connections.

        Raises:
            AssertionError, OSError: One did not go as it should.
        """
        ways = (self.clean, self.reset, self.refused, self.unfinished, self.half_closed, self.held)
        for _ in range(count):
            if self._done % FRESH == 0:
                self._take_a_fresh_lease()
            way = ways[self._done % len(ways)]
            way()
            self.ends[way.__name__] += 1
            self._done += 1
            told()
        while self._unfinished:
            self._part()

    def clean(self) -> None:
        """Talks, says that it ends, and hears the same."""
        with self._echoed() as sock:
            sock.unwrap().close()

    def reset(self) -> None:
        """Talks, and is gone."""
        sock = self._echoed()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        sock.close()

    def refused(self) -> None:
        """Has a lease that is over, and is told so."""
        with self._handshaken(self._over) as sock:
            sock.sendall(_first_call())
            assert len(_to_the_end(sock)) > 40, "refused without a sentence"

    def unfinished(self) -> None:
        """Begins a handshake and says no more; every second one leaves before the gateway ends it."""
        sock = self._connected()
        sock.sendall(_client_hello()[:100])
        self._unfinished.append(sock)
        if len(self._unfinished) > KEPT:
            self._part()

    def half_closed(self) -> None:
        """Talks, and ends its direction without a word of TLS."""
        with self._echoed() as sock:
            sock.shutdown(socket.SHUT_WR)
            _to_the_end(sock)

    def held(self) -> None:
        """Waits for a worker that is on its way, and leaves."""
        with self._handshaken(self._held) as sock:
            sock.sendall(_first_call()[:33])

    def _take_a_fresh_lease(self) -> None:
        if self._lease:
            self._gateway.ask(do="forget", name=self._lease)
        self._lease = f"{self._name}-{self._done}"
        self._open = self._gateway.lease(self._lease)

    def _part(self) -> None:
        sock = self._unfinished.popleft()
        with sock:
            if self._done % 2:
                _to_the_end(sock)

    def _echoed(self) -> ssl.SSLSocket:
        sock = self._handshaken(self._open)
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello", "the worker's echo"
        return sock

    def _handshaken(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        return context.wrap_socket(self._connected(), server_hostname="localhost")

    def _connected(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._gateway.port), timeout=20)


def soak(directory: Path, connections: int, tell: Callable[[str], None]) -> list[Row]:
    """So many connections; returns what there was before and after them."""
    gateway = Gateway(directory)
    clients = [ClientThread(gateway, f"t{number}") for number in range(THREADS)]
    _connect(clients, WARM, tell, "warming up")
    before = _rested(gateway)
    _connect(clients, connections, tell, "connections")
    deadline = time.monotonic() + SETTLED
    while True:
        rows = compare(before, gateway.ask(do="count"), TOLERANCES)
        if all(row.well for row in rows) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    gateway.end()
    ends = sum((client.ends for client in clients), Counter())
    tell(", ".join(f"{count} {end.replace('_', ' ')}" for end, count in ends.items()))
    return rows


def _connect(clients: list[ClientThread], count: int, tell: Callable[[str], None], what: str) -> None:
    done = Counter()
    failed: list[BaseException] = []

    def run(client: ClientThread) -> None:
        try:
            client.run(count // len(clients), lambda: done.update([what]))
        except BaseException as error:  # noqa: BLE001 - told by whoever waits
            failed.append(error)

    threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(3)
        for thread in threads[1:]:
            thread.join(0.1)
        tell(f"{what}: {done[what]} of {count}")
    if failed:
        raise failed[0]


def _rested(gateway: Gateway) -> dict[str, Any]:
    """A count of a gateway in which nothing changes any more."""
    deadline = time.monotonic() + SETTLED
    count = gateway.ask(do="count")
    while time.monotonic() < deadline:
        time.sleep(1)
        last, count = count, gateway.ask(do="count")
        if all(count[name] == last[name] for name in ("descriptors", "objects")):
            break
    return count


def _to_the_end(sock: socket.socket) -> bytes:
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
    """What a gRPC client sends first: preface, settings, and one call."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    path = (":path", "/moby.buildkit.v1.Control/Info")
    request = [(":method", "POST"), (":scheme", "https"), path, (":authority", "localhost")]
    http.send_headers(1, [*request, ("content-type", "application/grpc")])
    http.send_data(1, b"\0\0\0\0\0", end_stream=True)
    return http.data_to_send()
