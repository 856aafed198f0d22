"""The small joints between rooms: pools into the store, tables to the gateway, applications onto ports.

Each does one thing for process.py, and none keeps anything.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from bkpool.api import open_runner
from bkpool.appliance.settings import Address
from bkpool.core.auth import OIDCConfig, OIDCConfigStatus
from bkpool.core.documents import Documents
from bkpool.core.errors import BkpoolError, Conflict, HostFault, NotFound
from bkpool.core.names import DEFAULT_POOL, Key
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.resource import Metadata, Resource
from bkpool.core.worker import Worker
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.session.lease_table import build
from bkpool.kube.leader import LeaderElection
from bkpool.store import Store
from bkpool.store.mirror import Mirror
from bkpool.telemetry.loop_metrics import LoopMetrics
from bkpool.telemetry.loop_watchdog import LoopWatchdog

log = structlog.get_logger(__name__)

P = TypeVar("P", Pool, OIDCConfig)


def feed(gateway: Gateway, mirror: Mirror) -> Callable[[], None]:
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


async def apply(store: Store, wanted: Documents, *, only_source: bool) -> None:
    """Makes the objects of the files so; without any pool at all there is one called `default`.

    Args:
        store: Where they go.
        wanted: What the files say.
        only_source: Issuers come from files and nowhere else: one that the files no longer have is believed no more.
    """
    pools = wanted.pools
    if not pools and not (await store.list(Pool)).items:
        pools = (Pool(metadata=Metadata(name=DEFAULT_POOL)),)
    for pool in pools:
        await _apply(store, pool, pool.but(status=PoolStatus()))
    for config in wanted.configs:
        await _apply(store, config, config.but(status=OIDCConfigStatus()))
    if only_source:
        kept = {config.key for config in wanted.configs}
        for config in (await store.list(OIDCConfig)).items:
            if config.key not in kept:
                with suppress(NotFound):
                    await store.delete(OIDCConfig, *config.key)


async def _apply(store: Store, wanted: P, new: P) -> None:
    while not await _applied(store, wanted, new):
        pass  # somebody else was faster: it is looked at again


async def _applied(store: Store, wanted: P, new: P) -> bool:
    """One try to make an object so; False if another writer was faster."""
    try:
        try:
            current = await store.get(type(wanted), *wanted.key)
        except NotFound:
            await store.create(new.but(metadata=Metadata(**_given(wanted))))
            return True
        metadata = current.metadata.but(labels=wanted.metadata.labels, annotations=wanted.metadata.annotations)
        await store.replace(current.but(metadata=metadata, spec=wanted.spec))
    except (Conflict, NotFound):
        return False
    return True


async def withdraw_leftovers(store: Store, gateway: str) -> None:
    """Takes out the registrations of this gateway's former life. It holds the home's lock: that life is over."""
    for worker in (await store.list(Worker)).items:
        others = tuple(entry for entry in worker.status.gateways if entry.gateway != gateway)
        if others != worker.status.gateways:
            with suppress(Conflict, NotFound):  # it then runs out by itself, in a minute
                await store.replace_status(worker.with_status(gateways=others))


def _given(obj: Resource) -> dict[str, Any]:
    """What of an object's metadata is the user's to give."""
    return obj.metadata.model_dump(include={"name", "namespace", "labels", "annotations"})


async def led(leadership: LeaderElection, work: Callable[[], Awaitable[None]]) -> None:
    """Does the work while this replica holds the Lease; when cancelled, gives it back at once."""
    try:
        await leadership.lead(work)
    finally:
        with suppress(BkpoolError):  # it then runs out by itself
            await leadership.release()


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None], died: Callable[[BaseException], None]) -> AsyncIterator[None]:
    """Runs a room's loop beside the rest; `died` is told if it ends by itself, which none ever should."""
    task = asyncio.create_task(work)

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("appliance.room_died", exc_info=error)
            died(error)

    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def serve(
    stack: AsyncExitStack,
    app: web.Application,
    address: Address,
    option: str,
    ssl_context: ssl.SSLContext | None = None,
) -> str:
    """Serves an application and returns its host:port. A caller who hangs up cancels his request."""
    runner = await open_runner(stack, app, shutdown_timeout=2)
    host, port = address
    try:
        await web.TCPSite(runner, host, port, backlog=512, ssl_context=ssl_context).start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise HostFault(
                f"port {port} on {host} is taken",
                hint=f"Stop what `ss -ltnp 'sport = :{port}'` shows, or give another {option}.",
                code="PortTaken",
            ) from None
        raise HostFault(f"{option}: cannot listen on {host}:{port}: {error.strerror}") from None
    bound = runner.addresses[0]
    return f"{in_url(bound[0])}:{bound[1]}"


def watched(stack: AsyncExitStack, registry: CollectorRegistry) -> LoopWatchdog:
    """Watches the loop that this runs in until the stack is left. A caller that starts other loops adds them."""
    watchdog = LoopWatchdog(LoopMetrics(registry))
    watchdog.watch("main", asyncio.get_running_loop(), threading.get_ident())
    watchdog.start()
    stack.callback(watchdog.stop)
    return watchdog


def metrics_app(registry: CollectorRegistry) -> web.Application:
    """What Prometheus scrapes."""

    async def scrape(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    return app


def in_url(host: str) -> str:
    """The host as a URL has it: an IPv6 address stands in brackets."""
    return f"[{host}]" if ":" in host else host


def probes(app: web.Application, trouble: Callable[[], str | None]) -> web.Application:
    """Adds what the kubelet asks."""

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_request: web.Request) -> web.Response:
        why = trouble()
        return web.json_response({"status": why or "ready"}, status=503 if why else 200)

    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    return app


def replica_name() -> str:
    """The pod's name, which no other pod has at the same time."""
    return os.environ.get("POD_NAME") or socket.gethostname()
