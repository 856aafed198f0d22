"""A certificate authority, peers that can do everything a peer can do wrong, and a gateway in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from bkpool.core import tokens
from bkpool.core.errors import BkpoolError
from bkpool.core.names import Key
from bkpool.core.worker import EndReason, Lease
from bkpool.gateway.control.registration import Registrar
from bkpool.gateway.control.server import Gateway, new_loop
from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.dial import Dialler, PlainDial
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.relay import SocketRelay
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.gateway.session.lease_table import LeaseRoute, LeaseTable, PastLease
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.machine import State
from bkpool.gateway.session.metrics import GatewayMetrics

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
PEM = serialization.Encoding.PEM


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
def allocation() -> Lease:
    return Lease(
        id="allocation-1",
        token_sha256="digest",
        requested_by="me",
        owner="owner",
        allocated_at=NOW,
        expires_at=NOW + HOUR,
        not_after=NOW + 24 * HOUR,
    )


# --- certificates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, in PEM and in files."""

    cert: bytes
    key: bytes
    der: bytes
    directory: Path

    @property
    def files(self) -> tuple[str, str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        cert, key = self.directory / "client.crt", self.directory / "client.key"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


class Authority:
    """Issues whatever a test asks for, right or wrong."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA of the tests")])
        certificate = (
            x509.CertificateBuilder(self._name, self._name, self._key.public_key())
            .serial_number(1)
            .not_valid_before(NOW - 24 * HOUR)
            .not_valid_after(NOW + 24 * 3650 * HOUR)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(PEM)
        self.file = directory / "ca.crt"
        self.file.write_bytes(self.pem)

    def issue(
        self,
        *names: str,
        usage: x509.ObjectIdentifier | None = Usage.CLIENT_AUTH,
        alternative: tuple[x509.GeneralName, ...] = (),
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + 24 * 3650 * HOUR,
    ) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
        builder = (
            x509.CertificateBuilder(self._name, subject, key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        private = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return Identity(
            certificate.public_bytes(PEM),
            private,
            certificate.public_bytes(serialization.Encoding.DER),
            self._directory / os.urandom(4).hex(),
        )

    def stored(self, cert: bytes, key: bytes) -> Identity:
        """A certificate that somebody else has issued."""
        return Identity(cert, key, ssl.PEM_cert_to_DER_cert(cert.decode()), self._directory / os.urandom(4).hex())

    def server(self) -> Identity:
        return self.issue("gateway", usage=Usage.SERVER_AUTH, alternative=(x509.DNSName("localhost"),))

    def client(self, token: str, **variations: Any) -> Identity:
        return self.issue(f"alloc:{token}", **variations)

    def client_context(self, identity: Identity | None = None, *, alpn: bool = True) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.pem.decode())
        context.verify_flags |= ssl.VerifyFlags(0x200000)  # the tests live at NOW
        if identity is not None:
            context.load_cert_chain(*identity.files)
        if alpn:
            context.set_alpn_protocols(["h2"])
        return context


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def foreign_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("foreign-ca"))


# --- peers ----------------------------------------------------------------------------------------------------------


class Peer:
    """A blocking peer, with TLS or without, that can end each direction in every way there is."""

    def __init__(self, sock: socket.socket, tls: TlsStream | None = None) -> None:
        self.sock = sock
        self.tls = tls
        self.ended = self.ended_well = False
        self._plain = memoryview(bytearray(256 * 1024))
        self._heard = bytearray()
        self._lock = threading.Lock()  # one thread may send while another receives
        sock.settimeout(20)

    def shake(self) -> None:
        """The TLS handshake; blocks until the other side has had its part in it."""
        data = memoryview(b"")
        while not self.tls.handshake(data):
            self.sock.sendall(self.tls.take())
            data = memoryview(self.sock.recv(16384))
            assert data, "closed during the handshake"
        length, self.ended = self.tls.decrypt(memoryview(b""), self._plain)  # what came with the last of it
        self.ended_well = self.ended
        self._heard += self._plain[:length]
        self.sock.sendall(self.tls.take())

    def send(self, data: bytes) -> None:
        if self.tls:
            with self._lock:
                self.tls.encrypt(memoryview(data))
                data = self.tls.take()
        self.sock.sendall(data)

    def receive(self, count: int = 0) -> bytes:
        """So many bytes, or all to the end."""
        while not self.ended and not (count and len(self._heard) >= count):
            data = memoryview(self.sock.recv(16384))
            if not data:
                self.ended = True
            elif self.tls:
                with self._lock:
                    length, self.ended = self.tls.decrypt(data, self._plain)
                self.ended_well = self.ended
                self._heard += self._plain[:length]
            else:
                self._heard += data
        count = count or len(self._heard)
        heard, self._heard = bytes(self._heard[:count]), self._heard[count:]
        return heard

    def say_end(self) -> None:
        if self.tls:
            self.tls.close_notify()
            self.sock.sendall(self.tls.take())

    def fin(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Joined:
    """A relay in this loop, and the two peers that talk through it, to be used in threads of their own."""

    def __init__(
        self,
        client: Peer,
        worker: Peer,
        relay: SocketRelay,
        legs: tuple[SocketEndpoint, SocketEndpoint],
        over: asyncio.Future[str],
    ) -> None:
        self.client = client
        self.worker = worker
        self.relay = relay
        self.legs = legs
        self.over = over


@pytest.fixture(params=["unix", "tls"])
def worker_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def new_joined(ca: Authority, worker_family: str) -> AsyncIterator[Callable[..., Any]]:
    """Joins a client over TLS to a worker, in the clear or over TLS too."""
    made: list[Joined] = []
    loop = asyncio.get_running_loop()
    alarm = SocketErrorWatcher(loop)
    server = ca.server()
    server_side = server_context(server.cert, server.key, ca.pem)
    client_side = ca.client_context()

    async def make(half_open: float = 60.0, first: bytes = b"") -> Joined:
        near_client, far_client = _tcp_pair()
        near_worker, far_worker = socket.socketpair() if worker_family == "unix" else _tcp_pair()
        client, server = Peer(far_client, dialled(client_side)), Peer(near_client, TlsStream(server_side))
        await asyncio.gather(asyncio.to_thread(client.shake), asyncio.to_thread(server.shake))
        worker, dialler = Peer(far_worker), Peer(near_worker)
        if worker_family == "tls":
            worker.tls, dialler.tls = TlsStream(server_side), dialled(client_side)
            await asyncio.gather(asyncio.to_thread(worker.shake), asyncio.to_thread(dialler.shake))
        over = loop.create_future()
        near_client.setblocking(False)
        near_worker.setblocking(False)
        legs = (
            SocketEndpoint(loop, near_client, PeerStream(server.tls), peer_timeout=30),
            SocketEndpoint(
                loop, near_worker, PeerStream(dialler.tls), peer_timeout=None if worker_family == "unix" else 5
            ),
        )
        relay = SocketRelay(loop, LoopBuffers(), alarm, *legs, half_open_timeout=half_open, on_closed=over.set_result)
        made.append(Joined(client, worker, relay, legs, over))
        relay.start(first)
        return made[-1]

    yield make
    for joined in made:
        joined.client.close()
        joined.worker.close()
        joined.relay.stop("the test is over")
        assert joined.over.done()
        assert all(leg.sock.fileno() < 0 for leg in joined.legs)
    alarm.close()


def dialled(context: ssl.SSLContext) -> TlsStream:
    return TlsStream(context, server_side=False, server_hostname="localhost")


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = socket.create_connection(listener.getsockname())
        near, _ = listener.accept()
    return near, far


# --- a gateway in virtual time --------------------------------------------------------------------------------------


class SkewedLoop(asyncio.SelectorEventLoop):
    """A real event loop whose clock can be put forward."""

    skew = 0.0

    def time(self) -> float:
        return super().time() + self.skew

    def put_forward(self, seconds: float) -> None:
        self.skew += seconds


class Book:
    """A registrar that notes what it is asked, and answers as it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.connections: list[int] = []
        self.sought: list[str] = []
        self.finds: Callable[[], None] = lambda: None
        self.refuses: BkpoolError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.changed = asyncio.Condition()

    async def _note(self, what: str, route: LeaseRoute) -> None:
        await self.answers.wait()
        async with self.changed:
            self.entries.append((what, route.allocation_id))
            self.changed.notify_all()
        if self.refuses is not None:
            raise self.refuses

    async def register(self, route: LeaseRoute, connections: int) -> None:
        self.connections.append(connections)
        await self._note("register", route)

    async def renew(self, route: LeaseRoute, connections: int) -> None:
        self.connections.append(connections)
        await self._note("renew", route)

    async def withdraw(self, route: LeaseRoute) -> None:
        await self._note("withdraw", route)

    async def find(self, token_sha256: str) -> None:
        self.sought.append(token_sha256)
        await self.answers.wait()
        self.finds()
        if self.refuses is not None:
            raise self.refuses

    async def seen(self, what: str, count: int = 1) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: [e[0] for e in self.entries].count(what) >= count)


class Streams:
    """One connection of a client to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.goaway = False

    async def echo(self, data: bytes) -> None:
        self.writer.write(data)
        assert await self.reader.readexactly(len(data)) == data

    async def call(self) -> tuple[int, str]:
        """One gRPC call to its end: code and message."""
        self.begin()
        return await self.outcome()

    def begin(self) -> None:
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._http.initiate_connection()
        request = [(":method", "POST"), (":scheme", "https"), (":path", "/moby.buildkit.v1.Control/Info")]
        self._http.send_headers(1, [*request, (":authority", "localhost"), ("content-type", "application/grpc")])
        self._http.send_data(1, b"\0\0\0\0\0", end_stream=True)
        self.writer.write(self._http.data_to_send())

    async def outcome(self) -> tuple[int, str]:
        told: dict[str, str] = {}
        async with asyncio.timeout(10):
            while data := await self.reader.read(65536):
                for event in self._http.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        told = dict(event.headers)
                    self.goaway |= isinstance(event, h2.events.ConnectionTerminated)
        assert told[":status"] == "200"
        assert told["content-type"] == "application/grpc"
        return int(told["grpc-status"]), unquote(told["grpc-message"])

    async def ended(self) -> bytes:
        """What still comes, to the end, however that looks."""
        heard = bytearray()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(65536):
                    heard += data
        return bytes(heard)


class World:
    """A gateway, the leases it knows, a worker that echoes, and the clock of both."""

    def __init__(self, ca: Authority, directory: Path) -> None:
        self.ca = ca
        self.book = Book()
        self.metrics = GatewayMetrics()
        self.skew = timedelta(0)
        self.endpoint = f"unix://{directory}/w"
        self.dialled = 0
        self.faults: list[dict[str, Any]] = []
        """What went wrong in the gateway's own loop."""
        self.workers: list[asyncio.StreamWriter] = []
        self.pods: list[asyncio.Server] = []
        self._changed = asyncio.Condition()
        self._directory = directory
        self._loops: list[Any] = []
        self.pools = {Key("default", "p"), Key("team", "q")}
        self._routes: dict[str, LeaseRoute] = {}
        self._past: dict[str, PastLease] = {}
        self._streams: list[Streams] = []
        self._identities: dict[str, Identity] = {}
        self._contexts: dict[tuple[Identity | None, bool], ssl.SSLContext] = {}

    def now(self) -> datetime:
        return NOW + self.skew

    async def start(
        self,
        make_loop: Callable[[], asyncio.AbstractEventLoop] = SkewedLoop,
        *,
        dial: Dialler = PlainDial,
        registrar: Registrar | None = None,
        pool: Key | None = None,
        threads: int = 1,
        **limits: Any,
    ) -> None:
        def loop() -> asyncio.AbstractEventLoop:
            self._loops.append(make_loop())
            self._loops[-1].set_exception_handler(lambda _, context: self.faults.append(context))
            return self._loops[-1]

        self.server = await asyncio.start_unix_server(self._work, f"{self._directory}/w")
        self.gateway = Gateway(
            registrar or self.book,
            now=self.now,
            metrics=self.metrics,
            limits=replace(GatewayLimits(), **limits),
            dial=dial,
            pool=pool,
            threads=threads,
            loop_factory=loop,
        )
        server = self.ca.server()
        self.gateway.set_server_certificate(server.cert, server.key, self.ca.pem)
        [(_, self.port)] = await self.gateway.start([("127.0.0.1", 0)])

    async def stop(self) -> None:
        for streams in self._streams:
            streams.writer.transport.abort()
        async with asyncio.timeout(20):  # it waits for whoever it takes to be inside still
            await self.gateway.close()
        for worker in self.workers:
            worker.transport.abort()
        for server in (self.server, *self.pods):
            server.close()
        await asyncio.sleep(0)

    async def pod(self, context: ssl.SSLContext) -> str:
        """Another worker that echoes, over TLS; returns its endpoint."""
        self.pods.append(await asyncio.start_server(self._work, "127.0.0.1", 0, ssl=context))
        return f"tcp://127.0.0.1:{self.pods[-1].sockets[0].getsockname()[1]}"

    async def _work(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._changed:
            self.dialled += 1
            self.workers.append(writer)
            self._changed.notify_all()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def advance(self, seconds: float) -> None:
        """Puts both clocks forward, and lets the gateway's loop see it."""
        self.skew += timedelta(seconds=seconds)
        for loop in self._loops:
            loop.call_soon_threadsafe(loop.put_forward, seconds)
        await self.settled()

    async def settled(self) -> None:
        """Every event so far has been seen in the gateway's loop, and what follows from it in both."""
        main = asyncio.get_running_loop()
        for _ in range(4):
            for loop in self._loops:
                seen = asyncio.Event()
                loop.call_soon_threadsafe(main.call_soon_threadsafe, seen.set)
                await seen.wait()

    def lease(self, name: str = "a", **changes: Any) -> str:
        """A lease; again with the same name: changed."""
        token = self.token(name)
        digest = tokens.digest(token)
        route = self._routes.get(digest) or LeaseRoute(
            token_sha256=digest,
            allocation_id=f"allocation-{name}",
            worker=Key("default", "p-worker-0"),
            worker_uid="uid",
            pool=Key("default", "p"),
            endpoint=self.endpoint,
            waiting="",
            expires_at=(NOW + HOUR).timestamp(),
            not_after=(NOW + 24 * HOUR).timestamp(),
            drain_timeout=HOUR.total_seconds(),
        )
        self._routes[digest] = replace(route, **changes)
        self._update()
        return token

    def over(self, name: str, reason: EndReason, message: str = "") -> None:
        """The lease is off its worker."""
        digest = tokens.digest(self.token(name))
        self._routes.pop(digest, None)
        self._past[digest] = PastLease(Key("default", "p"), reason, message)
        self._update()

    def token(self, name: str) -> str:
        return tokens.derive(b"key", "uid", name)

    def identity(self, token: str) -> Identity:
        if token not in self._identities:
            self._identities[token] = self.ca.client(token)
        return self._identities[token]

    async def connect(
        self,
        token: str | None = None,
        identity: Identity | None = None,
        *,
        alpn: bool = True,
        name: str = "localhost",
    ) -> Streams:
        """Connects with a lease's certificate, or another; under a name (SNI) that is not compared."""
        identity = self.identity(token) if token else identity
        context = self._contexts.get((identity, alpn))
        if context is None:
            context = self._contexts[identity, alpn] = self.ca.client_context(identity, alpn=alpn)
            context.check_hostname = False
        streams = Streams(*await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name))
        self._streams.append(streams)
        return streams

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that the gateway's thread does."""
        async with asyncio.timeout(10):
            while not condition():
                await self.settled()

    def waiting(self) -> bool:
        """Whether a client is held until its worker is dialled again."""
        gates = [thread.gate for thread in self.gateway._running]
        return any(tenant.state is State.WAITING for gate in gates for tenant in list(gate._tenants))

    def _update(self) -> None:
        routes, past = MappingProxyType(dict(self._routes)), MappingProxyType(dict(self._past))
        self.gateway.update(LeaseTable(routes, past, frozenset(self.pools)))

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"buildkit_gateway_{name}", {"pool": "p"} | labels) or 0.0


@pytest.fixture(scope="session")
def _libuv() -> None:
    """The first loop of libuv in a process opens a pipe that stays."""
    loop = new_loop()
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()


@pytest.fixture
async def new_world(ca: Authority, tmp_path: Path, _libuv: None) -> AsyncIterator[Callable[..., Any]]:
    """Makes a world with these limits; afterwards nothing of it may be left."""
    descriptors = _descriptors()
    gc.freeze()  # what the test leaves is not among what was there, which takes a third of a second to look through
    worlds: list[World] = []

    async def make(**limits: Any) -> World:
        worlds.append(World(ca, tmp_path))
        await worlds[-1].start(**limits)
        return worlds[-1]

    yield make
    for world in worlds:
        await world.stop()
        gauge = world.count("active_connections")
        assert gauge == 0, "a relayed connection was never counted out"
        assert world.faults == []
    assert not any(thread.name.startswith("gateway") for thread in threading.enumerate())
    gc.collect()
    gc.unfreeze()
    await asyncio.sleep(0)  # asyncio closes the sockets of aborted transports in its next turn
    assert _descriptors() <= descriptors


@pytest.fixture
async def world(new_world: Callable[..., Any]) -> World:
    return await new_world()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
