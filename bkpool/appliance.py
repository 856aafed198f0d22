"""The composition root: what starts in which order, and what drains in which order.

One process holds all three roles (controller, api, gateway) on the process backend. It wires the rooms together; it
decides nothing about leases or workers.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from bkpool import __version__
from bkpool.allocation import Claims, Leases
from bkpool.api import Service, make_app
from bkpool.controller import Controller
from bkpool.core.documents import read_pools
from bkpool.core.errors import EXIT, Conflict, HostFault, NotFound, Unavailable
from bkpool.core.names import API_PORT, DEFAULT_POOL, GATEWAY_PORT, METRICS_PORT, Key
from bkpool.core.objects import Metadata, Pool, PoolStatus
from bkpool.gateway.metrics import Metrics
from bkpool.gateway.registration import StoreRegistrar
from bkpool.gateway.server import Gateway, new_loop
from bkpool.gateway.table import build
from bkpool.home.files import write_private
from bkpool.home.lock import HomeLock
from bkpool.identity.local import AdminToken, load_or_create
from bkpool.pki import keep
from bkpool.pki.authority import Authority
from bkpool.pki.names import gateway_names
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.toolchain import Tool, Toolchain
from bkpool.workers.process import ProcessRuntime
from bkpool.workers.sandbox import Binaries

log = structlog.get_logger(__name__)

GRACE = timedelta(seconds=1)
"""After the last build of a drain: so long the API goes on answering, so that the lease can still be released."""

Tell = Callable[[dict[str, Any]], None]
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Settings:
    """How an appliance runs. Port 0 takes a free one."""

    home: Path
    cache: Path
    backend: str = "auto"
    api_address: Address = ("127.0.0.1", API_PORT)
    gateway_address: Address | None = None
    """None: loopback, or every interface once `gateway_hosts` name this machine to others."""
    metrics_address: Address = ("127.0.0.1", METRICS_PORT)
    gateway_hosts: tuple[str, ...] = ()
    """Further names and addresses of the gateway; the first one is told to clients."""
    pool_files: tuple[Path, ...] = ()
    drain_timeout: timedelta = timedelta(minutes=10)
    """How long open builds may go on after SIGTERM."""


def run(settings: Settings, tell: Tell) -> int:
    """Runs an appliance until SIGTERM or SIGINT.

    Args:
        settings: How.
        tell: Called with {"progress": text} while it starts, then once with what `appliance.json` says.

    Returns:
        The exit code: 0 after a drain, forced or not.

    Raises:
        BkpoolError: It can't start; nothing is left half-started.
    """
    _configure_logging()
    pools = [
        pool
        for path in settings.pool_files
        for pool in read_pools(path.read_text("utf-8", "replace"), source=str(path))
    ]
    with HomeLock(settings.home), _host_faults(settings.home):
        backend = _backend(settings)
        tell({"progress": f"backend: {backend} ({_WHY[settings.backend]})"})
        binaries = _binaries(settings, tell)
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_Appliance(settings, pools, binaries).run(tell))
    return 0


def purge(home: Path, cache: Path) -> None:
    """Removes everything an appliance keeps: caches, leases, certificates and keys. Only what bkpool made goes.

    Raises:
        HostFault: An appliance still runs from this home, or something can't be removed.
    """
    if not home.is_dir():
        return
    with HomeLock(home), _host_faults(home):
        asyncio.run(_purge_workers(home, Toolchain(cache)))
        for name in ("slots", "logs", "pki"):
            shutil.rmtree(home / name, ignore_errors=not (home / name).exists())
        for name in ("state.db", "state.db-wal", "state.db-shm", "admin.token", "appliance.json", "backend"):
            (home / name).unlink(missing_ok=True)


async def _purge_workers(home: Path, tools: Toolchain) -> None:
    nowhere = Path("/nonexistent")  # nothing is started any more; rootlesskit alone is needed, to remove what it made
    runtime = ProcessRuntime(home, Binaries(nowhere, nowhere, tools.find(Tool.ROOTLESSKIT)))
    await runtime.adopt()
    await runtime.purge()


# --- before the loop runs -------------------------------------------------------------------------------------------

_WHY = {"auto": "the default here: it needs no container engine and no cluster", "process": "as asked"}


def _backend(settings: Settings) -> str:
    """The backend of this home: the first `up` decides, and later ones never silently change worlds.

    Raises:
        HostFault: This home was made with another backend.
    """
    wanted = "process" if settings.backend == "auto" else settings.backend
    record = settings.home / "backend"
    kept = record.read_text("utf-8").strip() if record.exists() else wanted
    if kept != wanted:
        raise HostFault(
            f"--backend: {settings.home} holds a world of backend {kept!r}, not {wanted!r}",
            hint=f"Use --backend {kept}, another BKPOOL_HOME, or `bkpool down --purge` to begin anew.",
            code="OtherBackend",
        )
    if not record.exists():
        write_private(record, f"{wanted}\n".encode())
    return wanted


def _check_complete(home: Path) -> None:
    """A home with leases but without their CA was damaged: a new CA would void every certificate without a word.

    Raises:
        HostFault: `pki/` is missing although there is a store.
    """
    if (home / "state.db").exists() and not (home / "pki").exists():
        raise HostFault(
            f"{home / 'pki'} is missing, and {home / 'state.db'} has leases that were signed with it",
            hint="Restore pki/ from a backup. If it is lost: `bkpool down --purge` removes the leases too.",
            code="Unreadable",
            exit_code=EXIT["Unreadable"],
        )


def _binaries(settings: Settings, tell: Tell) -> Binaries:
    """The programs that workers need; as an ordinary user also rootlesskit. Gets what is missing."""

    def progress(tool: Tool, text: str, fraction: float | None) -> None:  # noqa: ARG001 - a line has no bar
        tell({"progress": f"{tool}: {text}"})

    tools = [Tool.BUILDKITD, Tool.RUNC, Tool.BUILDX] + ([] if os.geteuid() == 0 else [Tool.ROOTLESSKIT])
    found = Toolchain(settings.cache, progress=progress).ensure_all(tools)
    return Binaries(found[Tool.BUILDKITD], found[Tool.RUNC], found.get(Tool.ROOTLESSKIT))


def _configure_logging() -> None:
    human = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if human else structlog.processors.JSONRenderer(default=str),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


@contextmanager
def _host_faults(home: Path) -> Iterator[None]:
    """A full disk or a forbidden file, wherever it is met, is one sentence with the fix."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise HostFault(
                f"the disk of {home} is full",
                hint="Free some space, or set BKPOOL_HOME to another disk.",
                code="DiskFull",
                exit_code=EXIT["DiskFull"],
            ) from error
        if isinstance(error, PermissionError):
            raise HostFault(
                f"{error.filename or home}: permission denied",
                hint="Run as the user who owns it, or set BKPOOL_HOME.",
                code="Permission",
                exit_code=EXIT["Permission"],
            ) from error
        raise


# --- the running appliance ------------------------------------------------------------------------------------------


class _Appliance:
    def __init__(self, settings: Settings, pools: list[Pool], binaries: Binaries) -> None:
        self._settings = settings
        self._pools = pools
        self._binaries = binaries
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()

    async def run(self, tell: Tell) -> None:
        """Starts everything, serves until told to stop, and ends it in the opposite order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        async with AsyncExitStack() as stack:
            await self._start(stack, tell)
            await self._stopping.wait()
            log.info("appliance.stopping")

    def _on_signal(self) -> None:
        (self._forced if self._stopping.is_set() else self._stopping).set()

    async def _start(self, stack: AsyncExitStack, tell: Tell) -> None:
        settings, home = self._settings, self._settings.home
        _check_complete(home)
        secrets = keep.load_or_create(home / "pki", _now())
        admin = AdminToken(load_or_create(home))

        tell({"progress": "opening the store"})
        store = await SqliteStore.open(home / "state.db")
        stack.push_async_callback(store.close)
        await _apply_pools(store, self._pools)
        mirror = Mirror(store)
        await stack.enter_async_context(_running(mirror.run()))
        await mirror.ready.wait()

        tell({"progress": "looking for workers of an earlier run"})
        runtime = ProcessRuntime(home, self._binaries)
        stack.push_async_callback(runtime.close, stop_workers=True)
        await runtime.adopt()

        tell({"progress": "starting gateway, controller and API"})
        metrics = Metrics()
        gateway = Gateway(StoreRegistrar(store, "local", _now, mirror.apply), now=_now, metrics=metrics)
        certify = _Certifier(gateway, home / "pki", secrets.authority, mirror, settings.gateway_hosts)
        certify.renew()
        [(_, port), *_] = await gateway.start([_gateway_address(settings)])
        stack.push_async_callback(gateway.close)
        stack.callback(_feed(gateway, mirror))
        await stack.enter_async_context(_running(certify.run()))
        endpoint = f"tcp://{_in_url(settings.gateway_hosts[0] if settings.gateway_hosts else 'localhost')}:{port}"

        leases = Leases(store=store, mirror=mirror, now=_now)
        claims = Claims(
            store=store,
            mirror=mirror,
            leases=leases,
            authority=secrets.authority,
            token_key=secrets.token_key,
            caches=runtime.caches,
            now=_now,
        )
        stack.push_async_callback(claims.close)
        controller = Controller(store=store, mirror=mirror, runtime=runtime, now=_now, endpoint=endpoint)
        await stack.enter_async_context(_running(controller.run()))

        service = Service(
            claims=claims,
            leases=leases,
            mirror=mirror,
            authenticators=(admin,),
            gateway_endpoint=endpoint,
            connections=lambda pool: metrics.active(pool.name),
            trouble=lambda: "the appliance is stopping" if self._stopping.is_set() else None,
        )
        record = home / "appliance.json"
        stack.callback(record.unlink, missing_ok=True)
        api = await _serve(stack, make_app(service), settings.api_address, "--api-address")
        scrape = await _serve(stack, _metrics_app(metrics), settings.metrics_address, "--metrics-address")
        stack.push_async_callback(self._drain, gateway, lambda: any(metrics.active(key.name) for key in mirror.pools))
        stack.callback(claims.turn_away, Unavailable("the appliance is stopping", hint="Try again once it is up."))
        described = {
            "pid": os.getpid(),
            "backend": "process",
            "version": __version__,
            "apiEndpoint": f"http://{api}",
            "gatewayEndpoint": endpoint,
            "metricsEndpoint": f"http://{scrape}/metrics",
            "startedAt": _now().isoformat(timespec="seconds"),
        }
        write_private(record, json.dumps(described).encode())
        log.info("appliance.ready", **described)
        tell(described)

    async def _drain(self, gateway: Gateway, busy: Callable[[], bool]) -> None:
        """Nothing new comes in; open builds finish, or meet the deadline, or a second signal."""
        was_busy = busy()
        log.info("appliance.draining", seconds=self._settings.drain_timeout.total_seconds(), busy=was_busy)
        draining = asyncio.create_task(gateway.drain(self._settings.drain_timeout.total_seconds()))
        forced = asyncio.create_task(self._forced.wait())
        await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
        if self._forced.is_set():
            log.warning("appliance.forced")
            await gateway.drain(0)
        elif was_busy:
            await asyncio.wait({forced}, timeout=GRACE.total_seconds())
        forced.cancel()
        await draining


class _Certifier:
    """Keeps the gateway's server certificate valid, and right for the pools that there are."""

    def __init__(
        self, gateway: Gateway, directory: Path, authority: Authority, mirror: Mirror, hosts: tuple[str, ...]
    ) -> None:
        self._gateway = gateway
        self._directory = directory
        self._authority = authority
        self._mirror = mirror
        self._hosts = hosts
        self._certified: tuple[Key, ...] | None = None
        self._due = _now()

    def renew(self) -> None:
        """Issues the certificate if that is due, and hands it to the gateway: open connections go on."""
        self._certified = tuple(sorted(self._mirror.pools))
        names = gateway_names(socket.gethostname(), self._certified, self._hosts)
        kept = keep.server_certificate(self._directory, self._authority, names, _now())
        self._due = kept.renew_at
        self._gateway.set_server_certificate(
            kept.cert_file.read_bytes(), kept.key_file.read_bytes(), self._authority.cert_pem
        )

    async def run(self) -> None:
        """Until cancelled."""
        changed = asyncio.Event()
        unsubscribe = self._mirror.subscribe(lambda _pool: changed.set())
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, (self._due - _now()).total_seconds())):
                        await changed.wait()
                changed.clear()
                if tuple(sorted(self._mirror.pools)) != self._certified or _now() >= self._due:
                    self.renew()
        finally:
            unsubscribe()


def _feed(gateway: Gateway, mirror: Mirror) -> Callable[[], None]:
    """Hands the gateway a new table after each change; a burst of changes is one table."""
    loop = asyncio.get_running_loop()
    scheduled = False

    def hand_over() -> None:
        nonlocal scheduled
        scheduled = False
        gateway.update(build(mirror.pools.values(), mirror.workers.values()))

    def changed(_pool: Key) -> None:
        nonlocal scheduled
        if not scheduled:
            scheduled = True
            loop.call_soon(hand_over)

    hand_over()
    return mirror.subscribe(changed)


async def _apply_pools(store: SqliteStore, pools: list[Pool]) -> None:
    """Makes the pools of the files so; without any there is one called `default`."""
    if not pools and not (await store.list(Pool)).items:
        pools = [Pool(metadata=Metadata(name=DEFAULT_POOL))]
    for wanted in pools:
        while True:
            try:
                current = await store.get(Pool, *wanted.key)
                metadata = current.metadata.but(
                    labels=wanted.metadata.labels, annotations=wanted.metadata.annotations
                )
                await store.replace(current.but(metadata=metadata, spec=wanted.spec))
            except NotFound:
                await store.create(wanted.but(metadata=Metadata(**_given(wanted)), status=PoolStatus()))
            except Conflict:
                continue
            break


def _given(pool: Pool) -> dict[str, Any]:
    """What of a pool's metadata is the user's to give."""
    return pool.metadata.model_dump(include={"name", "namespace", "labels", "annotations"})


@asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs a room's loop beside the rest. If it ends by itself the process ends: half an appliance helps nobody."""
    task = asyncio.create_task(work)
    task.add_done_callback(_must_not_end)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def _must_not_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("appliance.room_died", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


async def _serve(stack: AsyncExitStack, app: web.Application, address: Address, option: str) -> str:
    """Serves an application and returns its host:port. A caller who hangs up cancels his request."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    host, port = address
    try:
        await web.TCPSite(runner, host, port, backlog=512).start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HostFault(
                f"port {port} on {host} is taken",
                hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or give another {option}.",
                code="PortTaken",
                exit_code=EXIT["PortTaken"],
            ) from None
        raise HostFault(f"{option}: cannot listen on {host}:{port}: {error.strerror}") from None
    bound = runner.addresses[0]
    return f"{_in_url(bound[0])}:{bound[1]}"


def _metrics_app(metrics: Metrics) -> web.Application:
    async def scrape(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    return app


def _gateway_address(settings: Settings) -> Address:
    if settings.gateway_address is not None:
        return settings.gateway_address
    return ("0.0.0.0" if settings.gateway_hosts else "127.0.0.1", GATEWAY_PORT)  # noqa: S104 - mTLS, and asked for


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _now() -> datetime:
    return datetime.now(UTC)
