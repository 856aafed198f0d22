"""A whole gateway between a client and a worker that a test holds in its hands, on every kind of leg and loop.

The worker is only a listener: nothing it does is done by itself. Peers block, and are used in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import select
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bkpool.gateway.control.server import new_loop
from bkpool.gateway.net.dial import PlainDial, TlsDialler
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.pki.worker_tls import worker_context
from tests.gateway.conftest import Peer, SkewedLoop, World, dialled

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
YEAR = timedelta(days=365)
A_SECOND = 1.0
"""Within which the issue wants a reset and a dead worker to be passed on."""

MOST_UNREAD = 64 * 1024 * 1024
"""Bytes: more than the buffers of four sockets and a relay can hold of what nobody reads (tcp_rmem, tcp_wmem)."""

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": SkewedLoop, "uvloop": new_loop}
WAYS = [f"{worker}-{loop}" for worker in ("unix", "tls") for loop in LOOPS]
"""Every kind of worker's leg, on every loop. The client's leg is TLS in all of them."""
BOTH = ["unix-asyncio", "tls-uvloop"]
"""Every kind of leg and every loop once, for what does not hang on the pair of them."""


class Backend:
    """The authority of workers' certificates, and what a gateway and a worker of it need."""

    def __init__(self) -> None:
        self.authority = Authority.create(NOW)

    def dialler(self) -> TlsDialler:
        leaf = self.authority.issue_dialler("one", NOW, NOW + 10 * YEAR)
        return TlsDialler(worker_context(leaf.cert_pem, leaf.key_pem, self.authority.cert_pem))

    def serving(self, uid: str = "uid") -> ssl.SSLContext:
        leaf = self.authority.issue_worker(uid, NOW)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        context.load_verify_locations(cadata=self.authority.cert_pem.decode())
        load_chain(context, leaf.cert_pem, leaf.key_pem)
        return context


class Flood:
    """What a peer has written without being read, and what of it its socket has not taken yet."""

    def __init__(self, writer: Peer) -> None:
        self._said = hashlib.sha256()
        self.length = 0
        self._writer = writer
        self._chunk = os.urandom(64 * 1024)
        self._rest = b""

    def pour(self) -> bool:
        """Whether the socket took any more."""
        if not self._rest:
            self._rest = self._chunk
            self._said.update(self._chunk)
            self.length += len(self._chunk)
            if self._writer.tls:
                self._writer.tls.encrypt(memoryview(self._chunk))
                self._rest = self._writer.tls.take()
        try:
            self._rest = self._rest[self._writer.sock.send(self._rest) :]
        except BlockingIOError:
            return False
        return True

    def is_all(self, heard: bytes) -> bool:
        """Whether this is what was written, every byte of it."""
        return hashlib.sha256(heard).digest() == self._said.digest()

    def finish(self) -> None:
        """Sends the rest, to somebody who reads now."""
        self._writer.sock.sendall(self._rest)


@dataclass(frozen=True)
class Where:
    """At which addresses gateway and worker are, and what makes the sockets of client and worker where those are."""

    gateway: str = "127.0.0.1"
    worker: str = "127.0.0.1"
    do: Callable[..., Any] = lambda function, *arguments: function(*arguments)


class Way:
    """A client, the gateway and a worker, and the hand that leads each.

    Args:
        world: The gateway and its leases.
        directory: For the worker's socket.
        backend: Whose certificate the worker has, None in the clear.
        where: Where everybody is.
    """

    def __init__(self, world: World, directory: Path, backend: Backend | None, where: Where) -> None:
        self.world = world
        self._where = where
        self.backend = backend
        self.tls = backend.serving() if backend else None
        self._peers: list[Peer] = []
        if backend is None:
            self._address: Any = str(directory / "worker")
            self.endpoint = f"unix://{self._address}"
        else:
            self._place = where.do(_bound, (where.worker, 0))  # keeps the port while nobody listens
            self._address = self._place.getsockname()
            self.endpoint = "tcp://{}:{}".format(*self._address)
        self.up()

    async def client(self, name: str = "a", **route: Any) -> Peer:
        """A client of a lease, after its handshake; nobody has answered for the worker yet."""
        identity = self.world.identity(self.world.lease(name, **{"endpoint": self.endpoint, **route}))

        def connect() -> Peer:
            sock = self._where.do(socket.create_connection, (self._where.gateway, self.world.port))
            self._peers.append(peer := Peer(sock, dialled(self.world.ca.client_context(identity))))
            peer.shake()
            return peer

        return await asyncio.to_thread(connect)

    async def accept(self) -> Peer:
        """The worker takes the next connection, and shakes hands where it speaks TLS."""

        def take() -> Peer:
            self._peers.append(peer := Peer(self.listener.accept()[0], self.tls and TlsStream(self.tls)))
            if peer.tls:
                peer.shake()
            return peer

        return await asyncio.to_thread(take)

    async def joined(self, name: str = "a") -> tuple[Peer, Peer]:
        """A client and the worker, known to be connected through the gateway."""
        client, worker = await asyncio.gather(self.client(name), self.accept())
        client.send(b"?")
        assert await asyncio.to_thread(worker.receive, 1) == b"?"
        return client, worker

    async def fill(self, writer: Peer) -> Flood:
        """Writes until nothing more is taken: nobody reads at the other end. It must be, or somebody hoards.

        Then the gateway has this peer's reader off its loop: turns of it pass, and nothing moves.
        """
        flood, turns = Flood(writer), 0
        writer.sock.setblocking(False)
        while turns < 3:
            assert flood.length < MOST_UNREAD, "nothing holds this writer back"
            if flood.pour():
                turns = 0
            else:
                turns += 1
                await self.world.settled()
        writer.sock.settimeout(5)
        return flood

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """The gateway's loop stands still, and sees at once, afterwards, all that has happened meanwhile."""
        falls, wakes = threading.Event(), threading.Event()
        self.world._loops[-1].call_soon_threadsafe(lambda: (falls.set(), wakes.wait(5)))
        falls.wait(5)
        yield
        wakes.set()

    async def over(self) -> None:
        """Nothing is relayed any more."""
        await self.world.until(lambda: self.world.count("active_connections") == 0)

    def up(self) -> None:
        """The worker listens; it accepts when a test calls `accept`."""
        self.listener = self._where.do(_bound, self._address)
        self.listener.listen(128)
        self.listener.settimeout(5)

    def down(self) -> None:
        """Nobody listens at the worker's address any more, and nobody else can take it."""
        self.listener.close()
        if self.backend is None:
            Path(self._address).unlink()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.listener.close()
        if self.backend is not None:
            self._place.close()


def _bound(address: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    return sock


@contextlib.asynccontextmanager
async def running_way(
    kind: str, new_world: Callable[..., Any], backend: Backend, directory: Path, where: Where = Where(), **limits: Any
) -> AsyncIterator[Way]:
    """A gateway whose way (one of WAYS) leads to a worker of the test's own."""
    worker, loop = kind.split("-")
    tls = backend if worker == "tls" else None
    world = await new_world(make_loop=LOOPS[loop], dial=tls.dialler() if tls else PlainDial, **limits)
    way = Way(world, directory, tls, where)
    try:
        yield way
    finally:
        way.close()


def hangs_up(peer: Peer, within: float = A_SECOND) -> bool:
    """Whether this peer, without reading a byte, sees within so many seconds that the other side is gone."""
    poll = select.poll()
    poll.register(peer.sock, 0)  # POLLERR and POLLHUP are told unasked
    return bool(poll.poll(within * 1000))


def flood(peer: Peer) -> None:
    """Sends until the other side is gone."""
    with contextlib.suppress(OSError):
        while True:
            peer.send(bytes(64 * 1024))


def drink(peer: Peer) -> bool:
    """Reads to the end; whether it was a reset."""
    try:
        peer.receive()
    except ConnectionResetError:
        return True
    return False


async def in_threads(*calls: Any) -> list[Any]:
    """Blocking calls, all at once."""
    return await asyncio.gather(*(asyncio.to_thread(*call) for call in calls))
