"""The appliance on its embedded backend: opens the rooms in order, serves, and closes them in the opposite order.

Each room is entered into one exit stack as soon as it is open, so that a failed start closes what was opened.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from bkpool import __version__
from bkpool.allocation import Claims, Leases
from bkpool.api import Service, make_app
from bkpool.appliance.certifier import Certifier
from bkpool.appliance.parts import apply_pools, feed, in_url, metrics_app, running, serve, withdraw_leftovers
from bkpool.appliance.settings import Address, Settings, Tell
from bkpool.controller import Controller
from bkpool.core.errors import Unavailable
from bkpool.core.names import GATEWAY_PORT
from bkpool.core.objects import Pool
from bkpool.gateway.metrics import Metrics
from bkpool.gateway.registration import StoreRegistrar
from bkpool.gateway.server import Gateway
from bkpool.home.files import write_private
from bkpool.identity.local import AdminToken, load_or_create
from bkpool.pki import keep
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.workers.process import ProcessRuntime
from bkpool.workers.sandbox import Binaries

log = structlog.get_logger(__name__)

GATEWAY = "local"
"""The name under which this gateway registers: one home has one gateway, over all its lives."""
GRACE = timedelta(seconds=1)
"""After the last build of a drain: so long the API goes on answering, so that the lease can still be released."""


class ProcessAppliance:
    """One run of the appliance."""

    def __init__(self, settings: Settings, pools: list[Pool], binaries: Binaries) -> None:
        self._settings = settings
        self._pools = pools
        self._binaries = binaries
        self._stopping = asyncio.Event()
        self._forced = asyncio.Event()
        self._death: BaseException | None = None

    async def run(self, tell: Tell) -> None:
        """Starts everything, serves until told to stop, and ends it in the opposite order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        async with AsyncExitStack() as stack:
            await self._start(stack, tell)
            await self._stopping.wait()
            log.info("appliance.stopping")

        if self._death is not None:
            raise self._death

    def _on_death(self, error: BaseException) -> None:
        """Half an appliance helps nobody: without waiting for builds, it ends with the error."""
        self._death = error
        self._stopping.set()
        self._forced.set()

    def _on_signal(self) -> None:
        (self._forced if self._stopping.is_set() else self._stopping).set()

    async def _start(self, stack: AsyncExitStack, tell: Tell) -> None:
        home = self._settings.home
        secrets = keep.load_or_create(home / "pki", _now())
        admin = AdminToken(load_or_create(home))
        metrics = Metrics()

        tell({"progress": "opening the store"})
        store, mirror = await self._open_store(stack)
        tell({"progress": "looking for workers of an earlier run"})
        runtime = ProcessRuntime(home, self._binaries)
        stack.push_async_callback(runtime.close, stop_workers=True)
        await runtime.adopt()
        tell({"progress": "starting gateway, controller and API"})
        gateway, endpoint = await self._open_gateway(stack, store, mirror, secrets, metrics)

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
        await stack.enter_async_context(running(controller.run(), self._on_death))
        service = Service(
            claims=claims,
            leases=leases,
            mirror=mirror,
            authenticators=(admin,),
            gateway_endpoint=endpoint,
            connections=lambda pool: metrics.active(pool.name),
            trouble=lambda: "the appliance is stopping" if self._stopping.is_set() else None,
        )
        described = await self._open_api(stack, service, metrics)
        stack.push_async_callback(self._drain, gateway, lambda: any(metrics.active(key.name) for key in mirror.pools))
        stack.callback(claims.turn_away, Unavailable("the appliance is stopping", hint="Try again once it is up."))
        write_private(home / "appliance.json", json.dumps(described).encode())
        log.info("appliance.ready", **described)
        tell(described)

    async def _open_store(self, stack: AsyncExitStack) -> tuple[SqliteStore, Mirror]:
        store = await SqliteStore.open(self._settings.home / "state.db")
        stack.push_async_callback(store.close)
        await apply_pools(store, self._pools)
        await withdraw_leftovers(store, GATEWAY)
        mirror = Mirror(store)
        await stack.enter_async_context(running(mirror.run(), self._on_death))
        await mirror.ready.wait()
        return store, mirror

    async def _open_gateway(
        self, stack: AsyncExitStack, store: SqliteStore, mirror: Mirror, secrets: keep.Secrets, metrics: Metrics
    ) -> tuple[Gateway, str]:
        """The gateway, and the endpoint that clients are told."""
        settings = self._settings
        gateway = Gateway(StoreRegistrar(store, GATEWAY, _now, mirror.apply), now=_now, metrics=metrics)
        certify = Certifier(
            gateway,
            directory=settings.home / "pki",
            authority=secrets.authority,
            mirror=mirror,
            hosts=settings.gateway_hosts,
            now=_now,
        )
        certify.renew()
        [(_, port)] = await gateway.start([_gateway_address(settings)])
        stack.push_async_callback(gateway.close)
        stack.callback(feed(gateway, mirror))
        await stack.enter_async_context(running(certify.run(), self._on_death))
        host = settings.gateway_hosts[0] if settings.gateway_hosts else "localhost"
        return gateway, f"tcp://{in_url(host)}:{port}"

    async def _open_api(self, stack: AsyncExitStack, service: Service, metrics: Metrics) -> dict[str, Any]:
        """Opens the API and the metrics; returns what `appliance.json` says while they are open."""
        settings = self._settings
        stack.callback((settings.home / "appliance.json").unlink, missing_ok=True)
        api = await serve(stack, make_app(service), settings.api_address, "--api-address")
        scrape = await serve(stack, metrics_app(metrics), settings.metrics_address, "--metrics-address")
        return {
            "pid": os.getpid(),
            "backend": "process",
            "version": __version__,
            "apiEndpoint": f"http://{api}",
            "gatewayEndpoint": service.gateway_endpoint,
            "metricsEndpoint": f"http://{scrape}/metrics",
            "startedAt": _now().isoformat(timespec="seconds"),
        }

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


def _gateway_address(settings: Settings) -> Address:
    if settings.gateway_address is not None:
        return settings.gateway_address
    return ("0.0.0.0" if settings.gateway_hosts else "127.0.0.1", GATEWAY_PORT)  # noqa: S104 - mTLS, and asked for


def _now() -> datetime:
    return datetime.now(UTC)
