"""Blocking peers that can end each direction of a connection in every possible way, and a relay between two of them.

A blocking peer is used in a thread of its own, so that the relay's loop can run meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.relay import SocketRelay
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.net.tls_stream import TlsStream
from support.certificates import CertificateFactory

_SOCKET_TIMEOUT = 60.0
"""Seconds that a blocking call may take before the test fails."""
_RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER of 0 s: close() sends RST


class Peer:
    """A blocking peer, with TLS or without.

    Args:
        sock: Its socket.
        tls: Its TLS; None without.
    """

    def __init__(self, sock: socket.socket, tls: TlsStream | None = None) -> None:
        self.sock = sock
        self.tls = tls
        self.eof_received = self.close_notify_received = False
        self._plaintext = memoryview(bytearray(256 * 1024))
        self._received = bytearray()
        self._lock = threading.Lock()  # one thread may send while another receives
        sock.settimeout(_SOCKET_TIMEOUT)

    def handshake(self) -> None:
        """Does the TLS handshake. Blocks until the other side has done its part."""
        assert self.tls is not None
        data = memoryview(b"")
        while not self.tls.handshake(data):
            self.sock.sendall(self.tls.take())
            data = memoryview(self.sock.recv(16384))
            assert data, "closed during the handshake"
        # Decrypts the bytes that came together with the last handshake message.
        length, self.eof_received = self.tls.decrypt(memoryview(b""), self._plaintext)
        self.close_notify_received = self.eof_received
        self._received += self._plaintext[:length]
        self.sock.sendall(self.tls.take())

    def send(self, data: bytes) -> None:
        if self.tls:
            with self._lock:
                self.tls.encrypt(memoryview(data))
                data = self.tls.take()
        self.sock.sendall(data)

    def receive(self, count: int = 0) -> bytes:
        """Returns this many bytes; by default all bytes until the end of the stream."""
        while not self.eof_received and not (count and len(self._received) >= count):
            data = memoryview(self.sock.recv(16384))
            if not data:
                self.eof_received = True
            elif self.tls:
                with self._lock:
                    length, self.eof_received = self.tls.decrypt(data, self._plaintext)
                self.close_notify_received = self.eof_received
                self._received += self._plaintext[:length]
            else:
                self._received += data
        count = count or len(self._received)
        received, self._received = bytes(self._received[:count]), self._received[count:]
        return received

    def close_notify(self) -> None:
        """Sends close_notify, if it has TLS."""
        if self.tls:
            self.tls.close_notify()
            self.sock.sendall(self.tls.take())

    def fin(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


def client_tls(context: ssl.SSLContext) -> TlsStream:
    """Returns the client's side of TLS with a server called localhost."""
    return TlsStream(context, server_side=False, server_hostname="localhost")


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Returns two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return near, far


def sees_hangup(peer: Peer) -> bool:
    """Waits until this peer learns, without a read, that the other side is gone. Returns whether it did."""
    poll = select.poll()
    poll.register(peer.sock, 0)  # POLLERR and POLLHUP are reported unrequested
    return bool(poll.poll(_SOCKET_TIMEOUT * 1000))


def send_until_closed(peer: Peer) -> None:
    """Sends until the other side is gone."""
    with contextlib.suppress(OSError):
        while True:
            peer.send(bytes(64 * 1024))


def read_to_end(peer: Peer) -> bool:
    """Reads to the end of the stream, and returns whether that was a reset."""
    try:
        peer.receive()
    except ConnectionResetError:
        return True
    return False


async def in_threads(*calls: tuple[Any, ...]) -> list[Any]:
    """Makes blocking calls, each a function with its arguments, all at the same time."""
    return await asyncio.gather(*(asyncio.to_thread(*call) for call in calls))


@dataclass(frozen=True)
class RelayedPeers:
    """A relay in this loop, and the two peers that talk through it."""

    client: Peer
    worker: Peer
    relay: SocketRelay
    endpoints: tuple[SocketEndpoint, SocketEndpoint]
    """The relay's sockets, to the client and to the worker."""
    closed: asyncio.Future[str]
    """The reason that the relay gives at its end."""


class NewRelay(Protocol):
    """Connects a client with TLS to a worker through a relay."""

    async def __call__(self, *, half_open_timeout: float = 60.0, first_bytes: bytes = b"") -> RelayedPeers: ...


@contextlib.asynccontextmanager
async def relays(ca: CertificateFactory, worker_family: str) -> AsyncIterator[NewRelay]:
    """Makes relays. Afterwards, all their sockets must be closed.

    Args:
        ca: Issues the certificate of both servers.
        worker_family: "unix" for a worker on a Unix socket without TLS, "tls" for one on TCP with TLS.
    """
    made: list[RelayedPeers] = []
    loop = asyncio.get_running_loop()
    error_watcher = SocketErrorWatcher(loop)
    certificate = ca.server()
    server_side = server_context(certificate.cert, certificate.key, ca.pem)
    client_side = ca.client_context()

    async def make(*, half_open_timeout: float = 60.0, first_bytes: bytes = b"") -> RelayedPeers:
        near_client, far_client = tcp_pair()
        near_worker, far_worker = socket.socketpair() if worker_family == "unix" else tcp_pair()
        client, server = Peer(far_client, client_tls(client_side)), Peer(near_client, TlsStream(server_side))
        await in_threads((client.handshake,), (server.handshake,))
        worker, dialler = Peer(far_worker), Peer(near_worker)
        if worker_family == "tls":
            worker.tls, dialler.tls = TlsStream(server_side), client_tls(client_side)
            await in_threads((worker.handshake,), (dialler.handshake,))
        closed: asyncio.Future[str] = loop.create_future()
        near_client.setblocking(False)
        near_worker.setblocking(False)
        worker_timeout = None if worker_family == "unix" else 5
        endpoints = (
            SocketEndpoint(loop, near_client, PeerStream(server.tls), peer_timeout=30),
            SocketEndpoint(loop, near_worker, PeerStream(dialler.tls), peer_timeout=worker_timeout),
        )
        relay = SocketRelay(
            loop,
            LoopBuffers(),
            error_watcher,
            *endpoints,
            half_open_timeout=half_open_timeout,
            on_closed=closed.set_result,
        )
        made.append(RelayedPeers(client, worker, relay, endpoints, closed))
        relay.start(first_bytes)
        return made[-1]

    yield make
    for relayed in made:
        relayed.client.close()
        relayed.worker.close()
        relayed.relay.stop("the test is over")
        assert relayed.closed.done()
        assert all(endpoint.sock.fileno() < 0 for endpoint in relayed.endpoints)
    error_watcher.close()


def bound_socket(address: str | tuple[str, int]) -> socket.socket:
    """Returns a socket bound to the path of a Unix socket, or to a host and port."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    return sock
