"""A whole gateway between a client and a worker that the test controls, over every kind of worker and loop.

The worker is only a listening socket: it accepts, reads and sends only when the test says so. Its peers
block, and are used in threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkpool.gateway.net.dial import PlainDial, TlsDialler
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.pki.worker_tls import worker_context
from support.certificates import NOW, YEAR
from support.gateway_world import GatewayWorld, NewWorld
from support.loops import LOOPS
from support.peers import Peer, bound_socket, client_tls, in_threads

NO_DEADLINES = dict.fromkeys(("half_open_timeout", "client_peer_timeout", "worker_peer_timeout", "first_wait"), 600.0)
"""Limits of a gateway, for tests of what it does at once: no deadline can end a connection before the test fails."""

DATA_PATHS = [f"{worker}-{loop}" for worker in ("unix", "tls") for loop in LOOPS]
"""Every kind of connection to a worker, on every loop. The client's connection has TLS in all of them."""
FEWEST_DATA_PATHS = ["unix-asyncio", "tls-uvloop"]
"""Every kind of connection and every loop once, for tests where the combination does not matter."""

_MAX_UNREAD = 64 * 1024 * 1024
"""Bytes: more than the buffers of four sockets and of a relay hold of what nobody reads (tcp_rmem, tcp_wmem)."""
_WAIT = 60.0
"""Seconds that a blocking call may take before the test fails."""


class WorkerCertificates:
    """The CA of workers' certificates, and the TLS settings of a gateway and of a worker."""

    def __init__(self) -> None:
        self.authority = Authority.create(NOW)

    def dialler(self) -> TlsDialler:
        """Returns a gateway's dialler."""
        leaf = self.authority.issue_dialler("one", NOW, NOW + 10 * YEAR)
        assert leaf.key_pem is not None
        context = worker_context(leaf.cert_pem, leaf.key_pem, self.authority.cert_pem)
        return TlsDialler(lambda _pool: [context])

    def server_context(self, uid: str = "uid") -> ssl.SSLContext:
        """Returns the TLS settings of the worker with this uid."""
        leaf = self.authority.issue_worker(uid, NOW)
        assert leaf.key_pem is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        context.load_verify_locations(cadata=self.authority.cert_pem.decode())
        load_chain(context, leaf.cert_pem, leaf.key_pem)
        return context


class UnreadData:
    """What a peer has written while nobody reads it, and the part that its socket has not accepted yet.

    Args:
        writer: The peer, with a non-blocking socket.
    """

    def __init__(self, writer: Peer) -> None:
        self._digest = hashlib.sha256()
        self.length = 0
        """Bytes of plaintext."""
        self._writer = writer
        self._chunk = os.urandom(64 * 1024)
        self._rest = b""

    def write(self) -> bool:
        """Writes some more, and returns whether the socket accepted any of it."""
        if not self._rest:
            self._rest = self._chunk
            self._digest.update(self._chunk)
            self.length += len(self._chunk)
            if self._writer.tls:
                self._writer.tls.encrypt(memoryview(self._chunk))
                self._rest = self._writer.tls.take()
        try:
            self._rest = self._rest[self._writer.sock.send(self._rest) :]
        except BlockingIOError:
            return False
        return True

    def matches(self, received: bytes) -> bool:
        """Returns whether these are exactly the bytes that were written."""
        return hashlib.sha256(received).digest() == self._digest.digest()

    def write_rest(self) -> None:
        """Sends the part that the socket has not accepted yet. The other side must read meanwhile."""
        self._writer.sock.sendall(self._rest)


def _call_here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Hosts:
    """The addresses of gateway and worker."""

    gateway: str = "127.0.0.1"
    worker: str = "127.0.0.1"
    call: Callable[..., Any] = _call_here
    """Calls a function in the network namespace of client and worker."""


class DataPath:
    """A client, the gateway and a worker.

    Args:
        world: The gateway and its leases.
        directory: For the worker's socket.
        worker_certificates: Issues the worker's certificate; None for a worker on a Unix socket without TLS.
        hosts: The addresses.
    """

    def __init__(
        self, world: GatewayWorld, directory: Path, worker_certificates: WorkerCertificates | None, hosts: Hosts
    ) -> None:
        self.world = world
        self._hosts = hosts
        self.worker_certificates = worker_certificates
        self.tls = worker_certificates.server_context() if worker_certificates else None
        self._peers: list[Peer] = []
        self._address: Any
        self._reserved: socket.socket | None = None
        if worker_certificates is None:
            self._address = str(directory / "worker")
            self.endpoint = f"unix://{self._address}"
        else:
            self._reserved = hosts.call(bound_socket, (hosts.worker, 0))  # keeps the port while nobody listens
            self._address = self._reserved.getsockname()
            self.endpoint = "tcp://{}:{}".format(*self._address)
        self.start_worker()

    async def client(self, name: str = "a", **route: Any) -> Peer:
        """Connects a client and does its handshake. The gateway may not have reached the worker yet.

        Args:
            name: The name of its lease.
            route: Fields of LeaseRoute.
        """
        certificate = self.world.certificate(self.world.lease(name, **{"endpoint": self.endpoint, **route}))

        def connect() -> Peer:
            sock = self._hosts.call(socket.create_connection, (self._hosts.gateway, self.world.port))
            self._peers.append(peer := Peer(sock, client_tls(self.world.ca.client_context(certificate))))
            peer.handshake()
            return peer

        return await asyncio.to_thread(connect)

    async def accept(self) -> Peer:
        """Lets the worker accept the next connection, and do its handshake if it has TLS."""

        def accept() -> Peer:
            sock, _ = self.listener.accept()
            self._peers.append(peer := Peer(sock, TlsStream(self.tls) if self.tls else None))
            if peer.tls:
                peer.handshake()
            return peer

        return await asyncio.to_thread(accept)

    async def connected_pair(self, name: str = "a") -> tuple[Peer, Peer]:
        """Returns a client and the worker after a first byte has gone from one to the other."""
        client, worker = await asyncio.gather(self.client(name), self.accept())
        client.send(b"?")
        [received] = await in_threads((worker.receive, 1))
        assert received == b"?"
        return client, worker

    async def fill(self, writer: Peer) -> UnreadData:
        """Writes until nothing more is accepted. Nobody must read at the other end.

        Afterwards the gateway does not watch this peer's socket for reading: some iterations of its loop have passed
        without a change. Fails if the gateway buffers without a limit.
        """
        data, iterations = UnreadData(writer), 0
        writer.sock.setblocking(False)
        while iterations < 3:
            assert data.length < _MAX_UNREAD, "nothing stops this writer"
            if data.write():
                iterations = 0
            else:
                iterations += 1
                await self.world.settle()
        writer.sock.settimeout(_WAIT)
        return data

    @contextlib.contextmanager
    def loop_blocked(self) -> Iterator[None]:
        """Blocks the gateway's loop. Afterwards, the loop sees everything that happened meanwhile at once."""
        blocked, unblock = threading.Event(), threading.Event()

        def block() -> None:
            blocked.set()
            unblock.wait(_WAIT)

        self.world.loops[-1].call_soon_threadsafe(block)
        blocked.wait(_WAIT)
        yield
        unblock.set()

    async def wait_idle(self) -> None:
        """Waits until nothing is relayed."""
        await self.world.wait_until(lambda: self.world.metric("active_connections") == 0)

    def start_worker(self) -> None:
        """Lets the worker listen. It accepts when a test calls `accept`."""
        self.listener: socket.socket = self._hosts.call(bound_socket, self._address)
        self.listener.listen(128)
        self.listener.settimeout(_WAIT)

    def stop_worker(self) -> None:
        """Lets nobody listen at the worker's address. Nobody else can take the address."""
        self.listener.close()
        if self._reserved is None:
            Path(self._address).unlink()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.listener.close()
        if self._reserved is not None:
            self._reserved.close()


@contextlib.asynccontextmanager
async def running_data_path(
    kind: str,
    new_world: NewWorld,
    worker_certificates: WorkerCertificates,
    directory: Path,
    hosts: Hosts = Hosts(),
    **settings: Any,
) -> AsyncIterator[DataPath]:
    """Starts a gateway that leads to a worker of the test.

    Args:
        kind: One of DATA_PATHS.
        new_world: The fixture.
        worker_certificates: Issues the worker's certificate, if it has TLS.
        directory: For the worker's socket.
        hosts: The addresses.
        settings: Arguments of `GatewayWorld.start`.
    """
    worker, loop = kind.split("-")
    with_tls = worker_certificates if worker == "tls" else None
    world = await new_world(
        make_loop=LOOPS[loop],
        address=(hosts.gateway, 0),
        dial=with_tls.dialler() if with_tls else PlainDial,
        **settings,
    )
    path = DataPath(world, directory, with_tls, hosts)
    try:
        yield path
    finally:
        path.close()
