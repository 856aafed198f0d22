"""A whole gateway in this process, with leases that a test makes, a worker that echoes, and a clock that it advances.

Nothing here is a fixture: tests/gateway/conftest.py and e2e make their fixtures of `gateway_worlds`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from bkpool.core import tokens
from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.control.lease_registry import LeaseRegistry
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.net.dial import Dialler, PlainDial
from bkpool.gateway.net.listen import Address
from bkpool.gateway.session.lease_table import LeaseRoute, PastLease, TableChange, WorkerLeases
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.machine import State
from bkpool.gateway.session.metrics import GatewayMetrics
from support.certificates import HOUR, NOW, CertificateFactory, IssuedCertificate
from support.gateway_client import GatewayClient
from support.loops import SkewedLoop
from support.recording_registry import RecordingRegistry

_WAIT = 60.0
"""Seconds that `wait_until` waits before the test fails."""
_CLOSE_TIMEOUT = 60.0
"""Seconds that the gateway may take to close."""


class GatewayWorld:
    """A gateway, the leases it knows, a worker that echoes, and the clock of both.

    Args:
        ca: Issues the certificates of the gateway and of its clients.
        directory: For the worker's socket.
    """

    def __init__(self, ca: CertificateFactory, directory: Path) -> None:
        self.ca = ca
        self.registry = RecordingRegistry()
        self.metrics = GatewayMetrics()
        self.skew = timedelta(0)
        self.endpoint = f"unix://{directory}/w"
        self.worker_connections = 0
        """Connections that the worker has accepted."""
        self.loop_errors: list[dict[str, Any]] = []
        """Exceptions that reached the gateway's loops."""
        self.worker_writers: list[asyncio.StreamWriter] = []
        self.pools = {Key("default", "p"), Key("team", "q")}
        self.loops: list[asyncio.AbstractEventLoop] = []
        """The gateway's loops."""
        self.tls_workers: list[asyncio.Server] = []
        self._changed = asyncio.Condition()
        self._directory = directory
        self._routes: dict[str, LeaseRoute] = {}
        self._past: dict[str, PastLease] = {}
        self._workers: dict[str, Key] = {}  # by the digest of the lease: each lease has a worker of its own
        self._numbers = itertools.count()
        self._clients: list[GatewayClient] = []
        self._certificates: dict[str, IssuedCertificate] = {}
        self._contexts: dict[tuple[IssuedCertificate | None, bool], ssl.SSLContext] = {}

    def now(self) -> datetime:
        return NOW + self.skew

    async def start(
        self,
        make_loop: Callable[[], asyncio.AbstractEventLoop] = SkewedLoop,
        *,
        address: Address = ("127.0.0.1", 0),
        dial: Dialler = PlainDial,
        registry: LeaseRegistry | None = None,
        pool: Key | None = None,
        threads: int = 1,
        **limits: Any,
    ) -> None:
        """Starts the worker and the gateway.

        Args:
            make_loop: Makes each of the gateway's loops.
            address: Where the gateway listens.
            dial: How it connects to a worker.
            registry: Takes its registrations; by default `self.registry`.
            pool: The only pool that it serves.
            threads: How many loops it has.
            limits: Fields of GatewayLimits.
        """

        def loop() -> asyncio.AbstractEventLoop:
            self.loops.append(make_loop())
            self.loops[-1].set_exception_handler(lambda _, context: self.loop_errors.append(context))
            return self.loops[-1]

        self.server = await asyncio.start_unix_server(self._echo, f"{self._directory}/w")
        self.gateway = Gateway(
            registry or self.registry,
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
        [(_, self.port)] = await self.gateway.start([address])

    async def stop(self) -> None:
        for client in self._clients:
            client.writer.transport.abort()
        async with asyncio.timeout(_CLOSE_TIMEOUT):  # the gateway waits for every connection that it counts as open
            await self.gateway.close()
        for writer in self.worker_writers:
            writer.transport.abort()
        for server in (self.server, *self.tls_workers):
            server.close()
        await asyncio.sleep(0)

    async def start_tls_worker(self, context: ssl.SSLContext) -> str:
        """Starts another worker that echoes, with TLS, and returns its endpoint."""
        server = await asyncio.start_server(self._echo, "127.0.0.1", 0, ssl=context)
        self.tls_workers.append(server)
        return f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._changed:
            self.worker_connections += 1
            self.worker_writers.append(writer)
            self._changed.notify_all()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    # --- time -------------------------------------------------------------------------------------------------------

    async def advance(self, seconds: float) -> None:
        """Advances the wall clock and the clock of each loop, and lets the loops handle that."""
        self.skew += timedelta(seconds=seconds)
        for loop in self.loops:
            assert isinstance(loop, SkewedLoop), "the clock of this loop cannot be advanced"
            loop.call_soon_threadsafe(loop.advance, seconds)
        await self.settle()

    async def settle(self) -> None:
        """Waits until the gateway's loops have handled all events so far, and both sides have handled the
        consequences."""
        main = asyncio.get_running_loop()
        for _ in range(4):
            for loop in self.loops:
                done = asyncio.Event()
                loop.call_soon_threadsafe(main.call_soon_threadsafe, done.set)
                await done.wait()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that the gateway's threads make true."""
        async with asyncio.timeout(_WAIT):
            while not condition():
                await self.settle()

    # --- leases -----------------------------------------------------------------------------------------------------

    def lease(self, name: str = "a", **changes: Any) -> str:
        """Makes a lease on a worker of its own, or changes the one of this name, and returns its token.

        Args:
            name: The lease's name in this test.
            changes: Fields of LeaseRoute.
        """
        token = self.token(name)
        digest = tokens.digest(token)
        route = self._routes.get(digest) or LeaseRoute(
            token_sha256=digest,
            lease_id=f"allocation-{name}",
            worker=self._worker(digest),
            worker_uid="uid",
            pool=Key("default", "p"),
            endpoint=self.endpoint,
            wait_reason="",
            expires_at=(NOW + HOUR).timestamp(),
            not_after=(NOW + 24 * HOUR).timestamp(),
            drain_timeout=HOUR.total_seconds(),
        )
        self._routes[digest] = replace(route, **changes)
        self._workers[digest] = self._routes[digest].worker
        self._send(digest)
        return token

    def end_lease(self, name: str, reason: EndReason, message: str = "") -> None:
        """Takes the lease off its worker. The gateway remembers why it ended."""
        digest = tokens.digest(self.token(name))
        self._routes.pop(digest, None)
        self._past[digest] = PastLease(Key("default", "p"), reason, message)
        self._send(digest)

    def forget_lease(self, name: str) -> None:
        """Takes the lease off its worker, and lets the gateway forget it and every other ended lease."""
        token = self.token(name)
        digest = tokens.digest(token)
        self._routes.pop(digest, None)
        forgotten = {*self._past, digest}
        self._past.clear()
        self._send(*forgotten)
        for one in forgotten:
            self._workers.pop(one, None)
        self._certificates.pop(token, None)

    def send_worker(self, worker: Key, leases: WorkerLeases) -> None:
        """Lets the gateway have this of a worker, until one of the worker's leases is changed again."""
        self.gateway.update(TableChange({worker: leases}, frozenset(self.pools)))

    def token(self, name: str) -> str:
        return tokens.derive(b"key", "uid", name)

    def _worker(self, digest: str) -> Key:
        if digest not in self._workers:
            self._workers[digest] = Key("default", f"p-worker-{next(self._numbers)}")
        return self._workers[digest]

    def _send(self, *digests: str) -> None:
        """Lets the gateway have what the workers of these leases have now."""
        workers = {}
        for digest in digests:
            past = {digest: self._past[digest]} if digest in self._past else {}
            workers[self._worker(digest)] = WorkerLeases(self._routes.get(digest), past)
        self.gateway.update(TableChange(workers, frozenset(self.pools)))

    # --- clients ----------------------------------------------------------------------------------------------------

    def certificate(self, token: str) -> IssuedCertificate:
        """Returns the client certificate of the lease with this token."""
        if token not in self._certificates:
            self._certificates[token] = self.ca.client(token)
        return self._certificates[token]

    async def connect(
        self,
        token: str | None = None,
        certificate: IssuedCertificate | None = None,
        *,
        alpn: bool = True,
        name: str = "localhost",
    ) -> GatewayClient:
        """Connects to the gateway.

        Args:
            token: The token of the lease whose certificate is used.
            certificate: Another certificate to use.
            alpn: Whether HTTP/2 is offered.
            name: The server name to send (SNI). It is not compared with the gateway's certificate.
        """
        certificate = self.certificate(token) if token else certificate
        context = self._contexts.get((certificate, alpn))
        if context is None:
            context = self._contexts[certificate, alpn] = self.ca.client_context(certificate, alpn=alpn)
            context.check_hostname = False
        return await self.connect_with(context, name)

    async def connect_with(self, context: ssl.SSLContext, name: str = "localhost") -> GatewayClient:
        """Connects to the gateway with other TLS settings."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name)
        client = GatewayClient(reader, writer)
        self._clients.append(client)
        return client

    # --- what the gateway counts ------------------------------------------------------------------------------------

    def holds_client(self) -> bool:
        """Returns whether a client is held until its worker is dialled again."""
        shards = [thread.shard for thread in self.gateway._threads]
        return any(connection.state is State.WAITING for shard in shards for connection in list(shard._admitted))

    def metric(self, name: str, **labels: str) -> float:
        """Returns a metric of the gateway, by default of pool p."""
        pool = {"pool": "p"} | labels
        namespaces = {key.name: key.namespace for key in self.pools}
        pool.setdefault("pool_namespace", namespaces.get(pool["pool"], ""))
        return self.metrics.registry.get_sample_value(f"buildkit_gateway_{name}", pool) or 0.0


class NewWorld(Protocol):
    """Makes a world with these arguments of `GatewayWorld.start`."""

    async def __call__(self, **settings: Any) -> GatewayWorld: ...


@contextlib.asynccontextmanager
async def gateway_worlds(ca: CertificateFactory, directory: Path) -> AsyncIterator[NewWorld]:
    """Makes worlds. Afterwards, no connection, error, thread or file descriptor of them may be left.

    Call `support.loops.open_libuv_pipe` once before.
    """
    descriptors = open_descriptors()
    worlds: list[GatewayWorld] = []

    async def make(**settings: Any) -> GatewayWorld:
        worlds.append(GatewayWorld(ca, directory))
        await worlds[-1].start(**settings)
        return worlds[-1]

    yield make
    for world in worlds:
        await world.stop()
        assert world.metric("active_connections") == 0, "the gateway still counts a relayed connection as open"
        assert world.loop_errors == []
    assert not any(thread.name.startswith("gateway") for thread in threading.enumerate())
    gc.collect()
    await asyncio.sleep(0)  # asyncio closes the sockets of aborted transports in its next iteration
    assert open_descriptors() <= descriptors


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
