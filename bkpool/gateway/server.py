"""The gateway as the rest of bkpool sees it: a thread with an event loop of its own, and the doors to it.

Every method is called in the main loop. What crosses over is immutable: tables, TLS contexts, routes, errors.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial

import structlog

from bkpool.core.errors import BkpoolError, Gone, HostFault, Unavailable
from bkpool.core.names import Key
from bkpool.gateway.context import server_context
from bkpool.gateway.dial import Dial, Dialler
from bkpool.gateway.gate import Gate
from bkpool.gateway.leases import Told
from bkpool.gateway.limits import Limits
from bkpool.gateway.metrics import Metrics
from bkpool.gateway.registration import Registrar
from bkpool.gateway.table import LeaseTable, Route

log = structlog.get_logger(__name__)

Address = tuple[str, int]

_BACKLOG = 1024


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
        now: The time by which leases and certificates are judged; called in both threads.
        metrics: What is counted.
        limits: The bounds.
        dial: How a worker is reached.
        pool: The only pool that is served; None serves all.
        loop_factory: Makes the event loop of the gateway's thread.
    """

    def __init__(
        self,
        registrar: Registrar,
        *,
        now: Callable[[], datetime],
        metrics: Metrics,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        dial: Dialler = Dial,
        pool: Key | None = None,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_loop,
    ) -> None:
        self._registrar = registrar
        self._now = now
        self._metrics = metrics
        self._limits = limits
        self._dial = dial
        self._pool = pool
        self._loop_factory = loop_factory
        self._context: ssl.SSLContext | None = None
        self._running: _Running | None = None

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
        if self._running is not None:
            self._running.call(self._running.gate.swap, self._context)

    async def start(self, addresses: Sequence[Address]) -> list[Address]:
        """Listens on these addresses (port 0 takes a free one) and returns those that it got.

        Raises:
            HostFault: An address is taken (code PortTaken), or not allowed or not there (code Permission, HostFault).
        """
        if self._context is None:
            raise RuntimeError("set_server_certificate comes before start")
        listeners = _bind(addresses)
        loop = self._loop_factory()
        door = _Door(asyncio.get_running_loop(), loop, self._registrar, self._limits.register)
        gate = Gate(
            loop,
            self._context,
            registry=door,
            now=self._now,
            limits=self._limits,
            metrics=self._metrics,
            dial=self._dial,
            pool=self._pool,
        )
        self._running = _Running(loop, gate, door)
        self._running.call(gate.listen, listeners)
        bound: list[Address] = [listener.getsockname()[:2] for listener in listeners]
        log.info("gateway.listening", addresses=[f"{host}:{port}" for host, port in bound])
        return bound

    def update(self, table: LeaseTable) -> None:
        """Hands over a newer table of leases; what is asked of the registrar is answered behind it."""
        if self._running is not None:
            self._running.call(self._running.gate.leases.update, table)

    async def drain(self, seconds: float) -> None:
        """Accepts nothing more and returns when no connection is left, after so many seconds at most.

        Another call while one is waiting sets a new deadline for both: 0 cuts everything now.
        """
        if self._running is not None:
            await self._running.drained(seconds)

    async def close(self) -> None:
        """Cuts what is open, withdraws its registrations and ends the thread. Closed already: does nothing."""
        running, self._running = self._running, None
        if running is not None:
            await running.drained(0)
            await running.door.settle()
            running.end()


class _Running:
    """The gateway's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, gate: Gate, door: _Door) -> None:
        self.gate = gate
        self.door = door
        self._loop = loop
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    async def drained(self, seconds: float) -> None:
        main = asyncio.get_running_loop()
        empty = asyncio.Event()
        self.call(self.gate.drain, seconds, lambda: main.call_soon_threadsafe(empty.set))
        await empty.wait()

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()  # nothing is left in it that could take time

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()


class _Door:
    """Takes requests for the registrar from the gateway's loop to the main loop, and the answers back."""

    def __init__(
        self,
        main: asyncio.AbstractEventLoop,
        gateway: asyncio.AbstractEventLoop,
        registrar: Registrar,
        timeout: float,
    ) -> None:
        self._main = main
        self._gateway = gateway
        self._registrar = registrar
        self._timeout = timeout
        self._tasks: set[asyncio.Task[None]] = set()

    def register(self, route: Route, connections: int, told: Told) -> None:
        self._ask(partial(self._registrar.register, route, connections), told)

    def renew(self, route: Route, connections: int, told: Told) -> None:
        self._ask(partial(self._registrar.renew, route, connections), told)

    def withdraw(self, route: Route, told: Told) -> None:
        self._ask(partial(self._registrar.withdraw, route), told)

    def find(self, token_sha256: str, told: Told) -> None:
        self._ask(partial(self._registrar.find, token_sha256), told)

    async def settle(self) -> None:
        """Waits for what has been asked, in the main loop, and for what its answers lead to."""
        while self._tasks:
            await asyncio.wait(self._tasks)
            answered = asyncio.Event()
            self._gateway.call_soon_threadsafe(self._main.call_soon_threadsafe, answered.set)
            await answered.wait()

    def _ask(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        with suppress(RuntimeError):  # the main loop is closed: so is the process
            self._main.call_soon_threadsafe(self._begin, call, told)

    def _begin(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        task = self._main.create_task(self._do(call, told))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, call: Callable[[], Awaitable[None]], told: Told) -> None:
        error: BkpoolError | None = None
        try:
            async with asyncio.timeout(self._timeout):
                await call()
        except (Gone, Unavailable) as raised:
            error = raised
        except BkpoolError as raised:  # what the store holds against us is none of the client's doing
            log.warning("gateway.registrar-refused", reason=raised.message)
            error = _silent_store()
        except TimeoutError:
            error = _silent_store()
        except Exception:
            log.exception("gateway.registrar-failed")
            error = _silent_store()
        with suppress(RuntimeError):  # the gateway's loop is closed: nobody waits for this
            self._gateway.call_soon_threadsafe(told, error)


def _silent_store() -> Unavailable:
    return Unavailable(
        "the gateway cannot confirm this lease, because its store does not answer",
        hint="Try again in a moment; `bkpool status` says more.",
    )


def _bind(addresses: Sequence[Address]) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for host, port in addresses:
            listeners.append(_listen(host, port))
    except HostFault:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    listener.setblocking(False)
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> HostFault:
    if error.errno == errno.EADDRINUSE:
        return HostFault(
            f"port {port} on {host} is taken, and the gateway needs it",
            hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or give another --gateway-address.",
            code="PortTaken",
        )
    if error.errno == errno.EACCES:
        return HostFault(
            f"the gateway may not listen on port {port}",
            hint="Take a port above 1023 with --gateway-address.",
            code="Permission",
        )
    return HostFault(
        f"the gateway cannot listen on {host}:{port}: {error.strerror}",
        hint="Give an address of this machine with --gateway-address.",
    )
