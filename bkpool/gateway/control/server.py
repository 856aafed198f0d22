"""The gateway as the rest of bkpool sees it: its threads, each with an event loop, and the bridges to them.

Every method is called in the main loop. Only immutable objects cross between loops: changes of the table of leases,
TLS contexts, routes and errors.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime

import structlog

from bkpool.core.errors import HostFault, Unavailable
from bkpool.core.names import Key
from bkpool.gateway.control.lease_registry import LeaseRegistry
from bkpool.gateway.control.loop_bridge import LoopBridge
from bkpool.gateway.net.dial import Dialler, PlainDial
from bkpool.gateway.net.listen import Address, listen
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.lease_table import TableChange
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.loop_shard import LoopShard
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.ports.acceptor import Acceptor
from bkpool.telemetry.loop_watchdog import LoopWatchdog

log = structlog.get_logger(__name__)

MAX_THREADS = 4
"""With more threads each waits for the others: everything except TLS and system calls holds Python's one lock
(docs/benchmarks.md)."""


def default_threads(*, cores_each: int = 1) -> int:
    """Returns a number of threads for this process: one for every `cores_each` usable cores, at most MAX_THREADS."""
    return min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // cores_each))


def new_loop() -> asyncio.AbstractEventLoop:
    """Returns a uvloop if it is installed, otherwise an asyncio loop.

    The relay is as fast on asyncio, but the timers and polls of asyncio are slower.
    """
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class Gateway:
    """The gateway of one replica.

    Args:
        registry: Registers leases at their workers. It runs in the main loop.
        now: Returns the time against which leases and certificates are checked. It is called in all threads.
        metrics: Counts what happens.
        limits: The gateway's limits.
        dial: Dials a worker.
        pool: The only pool that is served; None serves all.
        threads: How many threads there are. Each lease is owned by one of them.
        watchdog: Watches the loops; None if nothing does.
        loop_factory: Makes the event loop of a thread.
    """

    def __init__(
        self,
        registry: LeaseRegistry,
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
        self._registry = registry
        self._now = now
        self._metrics = metrics
        self._limits = limits
        self._dial = dial
        self._pool = pool
        self._thread_count = threads
        self._watchdog = watchdog
        self._loop_factory = loop_factory
        self._context: ssl.SSLContext | None = None
        self._threads: list[_GatewayThread] = []
        self._acceptor: Acceptor | None = None

    def set_server_certificate(self, cert_pem: bytes, key_pem: bytes, ca_pem: bytes) -> None:
        """Sets the certificate for new connections. Open connections stay.

        Must be called before `start`, and again after each renewal.

        Args:
            cert_pem: The gateway's certificate, with its chain if it has one.
            key_pem: The certificate's key.
            ca_pem: The CA of the clients' certificates.

        Raises:
            HostFault: One of them is unreadable, or they do not belong together.
        """
        try:
            self._context = server_context(cert_pem, key_pem, ca_pem)
        except (ssl.SSLError, ValueError) as error:
            raise HostFault(
                f"the gateway's certificate cannot be used: {error}",
                hint="Restore the certificate and its key from the same backup.",
                code="Unreadable",
            ) from None
        for thread in self._threads:
            thread.call(thread.shard.set_tls_context, self._context)

    async def start(self, addresses: Sequence[Address]) -> list[Address]:
        """Listens on these addresses.

        Args:
            addresses: Hosts and ports. Port 0 takes a free port.

        Returns:
            The addresses with the real ports.

        Raises:
            HostFault: An address is in use (code PortTaken), forbidden (code Permission) or not of this machine (code
                HostFault).
        """
        if self._context is None:
            raise RuntimeError("call set_server_certificate before start")
        listeners = listen(addresses)
        bound: list[Address] = [listener.getsockname()[:2] for listener in listeners]
        capacity = Capacity(self._limits)
        self._threads = threads = [
            self._start_thread(number, capacity, self._context) for number in range(self._thread_count)
        ]
        shards = tuple(thread.shard for thread in threads)
        for thread in threads:
            thread.shard.shards = shards  # before any of them has a client
        first = threads[0]
        self._acceptor = Acceptor(
            first.loop,
            listeners,
            paused_event="gateway.accept_paused",
            pause=self._limits.accept_pause,
            on_accept=_distribute(threads),
        )
        first.call(self._acceptor.start)
        self._metrics.set_draining(False)
        log.info("gateway.listening", addresses=[f"{host}:{port}" for host, port in bound], threads=len(threads))
        return bound

    @property
    def loops(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        """For each loop, by its name, a function that returns when the loop has run something."""
        return {thread.name: thread.answers for thread in self._threads}

    def update(self, change: TableChange) -> None:
        """Gives each loop a change of its table of leases. They get it before the registry's answers that come later.

        Changes are applied in the order of the calls, each once. They begin after `start`, because only loops that
        run get them. The first ones together have everything that there is (`TableFeeder`).
        """
        for thread in self._threads:
            thread.call(thread.shard.leases.update, change)

    async def drain(self, seconds: float) -> None:
        """Closes the ports and returns when no connection is left, after this many seconds at most.

        A second call while the first waits sets a new deadline for both. 0 cuts all connections now.
        """
        if not self._threads or self._acceptor is None:
            return
        self._metrics.set_draining(True)
        self._threads[0].call(self._acceptor.stop)
        await asyncio.gather(*(thread.drain(seconds) for thread in self._threads))

    async def close(self) -> None:
        """Cuts all connections, withdraws their registrations and ends the threads. Does nothing if it is closed."""
        await self.drain(0)
        threads, self._threads = self._threads, []
        for thread in threads:
            await thread.bridge.settle()
        for thread in threads:
            thread.stop()

    def _start_thread(self, number: int, capacity: Capacity, context: ssl.SSLContext) -> _GatewayThread:
        loop = self._loop_factory()
        bridge = LoopBridge(asyncio.get_running_loop(), loop, self._registry, self._limits.register_timeout)
        shard = LoopShard(
            loop,
            context,
            registry=bridge,
            now=self._now,
            limits=self._limits,
            capacity=capacity,
            metrics=self._metrics,
            dial=self._dial,
            pool=self._pool,
            loops=self._thread_count,
        )
        thread = _GatewayThread(f"gateway-{number}", loop, shard, bridge)
        if self._watchdog is not None:
            self._watchdog.watch(thread.name, loop, thread.ident)
        return thread


def _distribute(threads: list[_GatewayThread]) -> Callable[[socket.socket, Address], None]:
    """Returns a function that gives accepted sockets to the threads in turn. It is called in the first thread."""
    turn = itertools.cycle(threads)

    def distribute(sock: socket.socket, address: Address) -> None:
        thread, peer = next(turn), f"{address[0]}:{address[1]}"
        if thread is threads[0]:
            thread.shard.accept(sock, peer)
        else:
            thread.call(thread.shard.accept, sock, peer)

    return distribute


class _GatewayThread:
    """One of the gateway's threads with its event loop."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, shard: LoopShard, bridge: LoopBridge) -> None:
        self.name = name
        self.loop = loop
        self.shard = shard
        self.bridge = bridge
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int:
        """The thread's number, as threading.get_ident() returns it."""
        return self._thread.ident or 0

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        self.loop.call_soon_threadsafe(function, *arguments)

    async def drain(self, seconds: float) -> None:
        main = asyncio.get_running_loop()
        empty = asyncio.Event()
        self.call(self.shard.drain, seconds, lambda: main.call_soon_threadsafe(empty.set))
        await empty.wait()

    async def answers(self) -> None:
        main, answered = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.loop.call_soon_threadsafe(main.call_soon_threadsafe, answered.set)
        except RuntimeError:
            raise Unavailable(f"{self.name}, a loop of the gateway, has ended") from None
        await answered.wait()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()  # the loop is empty, so this takes no time

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.shard.error_watcher.close()
            self.loop.close()
