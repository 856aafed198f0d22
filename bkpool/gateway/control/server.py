"""The gateway as the rest of bkpool sees it: threads with an event loop each, and the doors to them.

Every method is called in the main loop. What crosses over is immutable: tables, TLS contexts, routes, errors.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from datetime import datetime

import structlog

from bkpool.core.errors import HostFault
from bkpool.core.names import Key
from bkpool.gateway.control.loop_bridge import LoopBridge
from bkpool.gateway.control.registration import Registrar
from bkpool.gateway.net.accept import Acceptor, Address, listen
from bkpool.gateway.net.dial import Dialler, PlainDial
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.lease_table import LeaseTable
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.loop_shard import LoopShard
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.telemetry.loop_watchdog import LoopWatchdog

log = structlog.get_logger(__name__)

MOST_THREADS = 4
"""More wait for each other: what is not TLS or the kernel's is done under Python's one lock (docs/benchmarks.md)."""


def default_threads(*, cores_each: int = 1) -> int:
    """One for every so many cores that we may use, up to MOST_THREADS."""
    return min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // cores_each))


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop where it is installed; the relay is as fast on asyncio, but its timers and polls are not."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Gateway:
    """The gateway of one replica.

    Args:
        registrar: Registers leases; lives in the main loop.
        now: The time by which leases and certificates are judged; called in all threads.
        metrics: What is counted.
        limits: The bounds.
        dial: How a worker is reached.
        pool: The only pool that is served; None serves all.
        threads: How many loops there are; a lease lives in one of them.
        watchdog: Is told of the loops; it says when one does not turn.
        loop_factory: Makes the event loop of a thread.
    """

    def __init__(
        self,
        registrar: Registrar,
        *,
        now: Callable[[], datetime],
        metrics: GatewayMetrics,
        limits: GatewayLimits = GatewayLimits(),  # noqa: B008 - immutable
        dial: Dialler = PlainDial,
        pool: Key | None = None,
        threads: int = 1,
        watchdog: LoopWatchdog | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_loop,
    ) -> None:
        self._registrar = registrar
        self._now = now
        self._metrics = metrics
        self._limits = limits
        self._dial = dial
        self._pool = pool
        self._threads = threads
        self._watchdog = watchdog
        self._loop_factory = loop_factory
        self._context: ssl.SSLContext | None = None
        self._running: list[_Thread] = []
        self._porter: Acceptor | None = None

    def set_server_certificate(self, cert_pem: bytes, key_pem: bytes, ca_pem: bytes) -> None:
        """Sets what new connections see; open ones go on. To be called before `start`, and whenever it is renewed.

        Raises:
            HostFault: The certificate, its key and the CA do not make sense together.
        """
        try:
            self._context = server_context(cert_pem, key_pem, ca_pem)
        except (ssl.SSLError, ValueError) as error:
            raise HostFault(
                f"the gateway's certificate cannot be used: {error}",
                hint="Restore its certificate and key from a backup; they belong together.",
                code="Unreadable",
            ) from None
        for thread in self._running:
            thread.call(thread.gate.swap, self._context)

    async def start(self, addresses: Sequence[Address]) -> list[Address]:
        """Listens on these addresses (port 0 takes a free one) and returns those that it got.

        Raises:
            HostFault: An address is taken (code PortTaken), or not allowed or not there (code Permission, HostFault).
        """
        if self._context is None:
            raise RuntimeError("set_server_certificate comes before start")
        listeners = listen(addresses)
        bound: list[Address] = [listener.getsockname()[:2] for listener in listeners]
        capacity = Capacity(self._limits)
        self._running = threads = [self._thread(number, capacity, self._context) for number in range(self._threads)]
        homes = tuple(thread.gate for thread in threads)
        for thread in threads:
            thread.gate.homes = homes  # before any of them has a client
        first = threads[0]
        self._porter = Acceptor(first.loop, listeners, self._limits.accept_pause, _dealer(threads))
        first.call(self._porter.start)
        self._metrics.draining(False)
        log.info("gateway.listening", addresses=[f"{host}:{port}" for host, port in bound], threads=len(threads))
        return bound

    def update(self, table: LeaseTable) -> None:
        """Hands over a newer table of leases; what is asked of the registrar is answered behind it."""
        for thread in self._running:
            thread.call(thread.gate.leases.update, table)

    async def drain(self, seconds: float) -> None:
        """Accepts nothing more and returns when no connection is left, after so many seconds at most.

        Another call while one is waiting sets a new deadline for both: 0 cuts everything now.
        """
        if not self._running or self._porter is None:
            return
        self._metrics.draining(True)
        self._running[0].call(self._porter.stop)
        await asyncio.gather(*(thread.drained(seconds) for thread in self._running))

    async def close(self) -> None:
        """Cuts what is open, withdraws its registrations and ends the threads. Closed already: does nothing."""
        await self.drain(0)
        running, self._running = self._running, []
        for thread in running:
            await thread.door.settle()
        for thread in running:
            thread.end()

    def _thread(self, number: int, capacity: Capacity, context: ssl.SSLContext) -> _Thread:
        loop = self._loop_factory()
        door = LoopBridge(asyncio.get_running_loop(), loop, self._registrar, self._limits.register)
        gate = LoopShard(
            loop,
            context,
            registry=door,
            now=self._now,
            limits=self._limits,
            capacity=capacity,
            metrics=self._metrics,
            dial=self._dial,
            pool=self._pool,
        )
        thread = _Thread(f"gateway-{number}", loop, gate, door)
        if self._watchdog is not None:
            self._watchdog.watch(thread.name, loop, thread.ident)
        return thread


def _dealer(threads: list[_Thread]) -> Callable[[socket.socket, str], None]:
    """Deals accepted sockets out in turn; called in the first thread."""
    if len(threads) == 1:
        return threads[0].gate.receive
    turn = itertools.cycle(threads)

    def deal(sock: socket.socket, peer: str) -> None:
        thread = next(turn)
        thread.call(thread.gate.receive, sock, peer)

    return deal


class _Thread:
    """One of the gateway's threads, and what lives in its loop."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, gate: LoopShard, door: LoopBridge) -> None:
        self.name = name
        self.loop = loop
        self.gate = gate
        self.door = door
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        """As threading.get_ident() has it."""
        return self._thread.ident or 0

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        self.loop.call_soon_threadsafe(function, *arguments)

    async def drained(self, seconds: float) -> None:
        main = asyncio.get_running_loop()
        empty = asyncio.Event()
        self.call(self.gate.drain, seconds, lambda: main.call_soon_threadsafe(empty.set))
        await empty.wait()

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()  # nothing is left in it that could take time

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.gate.error_watcher.close()
            self.loop.close()
