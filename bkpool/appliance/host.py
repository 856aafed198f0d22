"""The appliance with all its roles in one process: opens the rooms in order, serves, and closes them in reverse.

Each room is entered into one exit stack as soon as it is open, so that a failed start closes what was opened. Which
backend it stands on it is told; nothing here asks.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from bkpool import __version__
from bkpool.api import Service, make_app
from bkpool.appliance.api_tls import enter_api_tls
from bkpool.appliance.backend import Backend
from bkpool.appliance.certifier import Certifier
from bkpool.appliance.dev_issuer import dev_config, make_dev_issuer
from bkpool.appliance.identities import access, open_issuers
from bkpool.appliance.lifetime import Lifetime, live
from bkpool.appliance.parts import apply, feed, in_url, led, metrics_app, running, serve, watched, withdraw_leftovers
from bkpool.appliance.settings import Address, Settings, Tell
from bkpool.controller.oidc_configs import ConfigKeeper
from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import Documents
from bkpool.core.errors import Unavailable
from bkpool.core.ignored import IgnoredFields
from bkpool.core.names import GATEWAY_PORT
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.gateway.control.registration import StoreRegistrar
from bkpool.gateway.control.server import Gateway, default_threads
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.home.files import private_directory, write_private
from bkpool.identity.admin_token import AdminTokenAuthenticator, load_or_create
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.pki.authority import Authority
from bkpool.store.mirror import Mirror
from bkpool.telemetry.loop_watchdog import LoopWatchdog

log = structlog.get_logger(__name__)

GRACE = timedelta(seconds=1)
"""After the last build of a drain: so long the API goes on answering, so that the lease can still be released."""

Opening = Callable[[AsyncExitStack, Tell], Awaitable[Backend]]


class HostAppliance:
    """One run of the appliance on this machine.

    Args:
        settings: How it runs.
        documents: What the user's files say.
        backend: The name of what it stands on.
        opening: Opens that.
    """

    def __init__(self, settings: Settings, documents: Documents, backend: str, opening: Opening) -> None:
        self._settings = settings
        self._documents = documents
        self._name = backend
        self._opening = opening

    async def run(self, tell: Tell) -> None:
        """Starts everything, serves until told to stop, and ends it in the opposite order."""
        await live(lambda stack, life: self._start(stack, life, tell))

    async def _start(self, stack: AsyncExitStack, life: Lifetime, tell: Tell) -> None:
        self._life = life
        home, died = self._settings.home, life.died
        admin = AdminTokenAuthenticator(load_or_create(home))
        metrics = GatewayMetrics()
        watchdog = watched(stack, metrics.registry)
        backend = await self._opening(stack, tell)
        for loop in backend.loops:
            await stack.enter_async_context(running(loop, died))
        mirror = await self._follow(stack, backend)
        tell({"progress": "looking for workers of an earlier run"})
        await backend.runtime.adopt()
        tell({"progress": "starting gateway, controller and API"})
        gateway, endpoint = await self._open_gateway(stack, backend, mirror, metrics, watchdog=watchdog)

        claims, leases = backend.lease_service(mirror, _now)
        stack.push_async_callback(claims.close)
        issuers = open_issuers(stack)
        await stack.enter_async_context(running(self._control(backend, mirror, issuers, endpoint), died))
        service = Service(
            claims=claims,
            leases=leases,
            mirror=mirror,
            access=access(
                admin,
                backend.methods,
                issuers,
                mirror,
                namespace=self._settings.namespace,
                also=await self._open_dev_issuer(stack),
                now=_now,
            ),
            gateway_endpoint=lambda _pool: endpoint,
            connections=lambda pool: metrics.active(pool.key.name),
            trouble=lambda: "the appliance is stopping" if self._life.stopping.is_set() else mirror.trouble,
        )
        described = await self._open_api(stack, service, metrics, backend.authority, endpoint)
        stack.push_async_callback(self._drain, gateway, lambda: any(metrics.active(key.name) for key in mirror.pools))
        stack.callback(claims.turn_away, Unavailable("the appliance is stopping", hint="Try again once it is up."))
        write_private(home / "appliance.json", json.dumps(described).encode())
        log.info("appliance.ready", **described)
        tell(described)

    async def _follow(self, stack: AsyncExitStack, backend: Backend) -> Mirror:
        """The pools as wanted, and a copy of everything that is kept up to date."""
        given = bool(self._settings.pool_files)
        await apply(backend.store, self._documents, only_source=backend.only_files and given)
        await withdraw_leftovers(backend.store, backend.gateway)
        mirror = Mirror(backend.store, configs=True)
        await stack.enter_async_context(running(mirror.run(), self._life.died))
        await mirror.ready.wait()
        return mirror

    async def _control(self, backend: Backend, mirror: Mirror, issuers: IssuerKeys, endpoint: str) -> None:
        """The controller, for as long as nobody else runs one."""
        ignored = IgnoredFields(backend.runtime.ignored_spec_fields)

        def status_inputs(pool: Pool) -> PoolStatusInputs:
            return PoolStatusInputs(endpoint=endpoint, ignored=ignored.of(pool), capacity=backend.runtime.capacity)

        async def work() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(backend.controller(mirror, status_inputs, _now).run())
                tasks.create_task(ConfigKeeper(backend.store, mirror, issuers.probe, _now).run())

        if backend.leadership is None:
            await work()
        else:
            await led(backend.leadership, work)

    async def _open_gateway(
        self,
        stack: AsyncExitStack,
        backend: Backend,
        mirror: Mirror,
        metrics: GatewayMetrics,
        *,
        watchdog: LoopWatchdog,
    ) -> tuple[Gateway, str]:
        """The gateway, and the endpoint that clients are told."""
        settings = self._settings
        private_directory(settings.home / "pki")
        registrar = StoreRegistrar(backend.store, backend.gateway, _now, mirror.apply)
        gateway = Gateway(
            registrar,
            now=_now,
            metrics=metrics,
            dial=backend.dial,
            threads=default_threads(cores_each=2),  # clients and workers are on this machine, too
            watchdog=watchdog,
        )
        certify = Certifier(
            gateway,
            directory=settings.home / "pki",
            authority=backend.authority,
            mirror=mirror,
            hosts=settings.gateway_hosts,
            now=_now,
            recorder=backend.recorder,
        )
        certify.renew()
        [(_, port)] = await gateway.start([_gateway_address(settings)])
        stack.push_async_callback(gateway.close)
        stack.callback(feed(gateway, mirror))
        await stack.enter_async_context(running(certify.run(), self._life.died))
        host = settings.gateway_hosts[0] if settings.gateway_hosts else "localhost"
        return gateway, f"tcp://{in_url(host)}:{port}"

    async def _open_api(
        self, stack: AsyncExitStack, service: Service, metrics: GatewayMetrics, authority: Authority, endpoint: str
    ) -> dict[str, Any]:
        """Opens the API and the metrics; returns what `appliance.json` says while they are open."""
        settings = self._settings
        stack.callback((settings.home / "appliance.json").unlink, missing_ok=True)
        tls = await enter_api_tls(stack, settings, authority, _now, self._life.died)
        api = await serve(
            stack, make_app(service), settings.api_address, "--api-address", tls.context if tls else None
        )
        scrape = await serve(stack, metrics_app(metrics.registry), settings.metrics_address, "--metrics-address")
        return {
            "pid": os.getpid(),
            "backend": self._name,
            "version": __version__,
            "apiEndpoint": f"{settings.api_scheme}://{api}",
            **(tls.described if tls else {}),
            "gatewayEndpoint": endpoint,
            "metricsEndpoint": f"http://{scrape}/metrics",
            **({"devIssuer": settings.dev_issuer_url} if settings.dev_issuer_url else {}),
            "startedAt": _now().isoformat(timespec="seconds"),
        }

    async def _open_dev_issuer(self, stack: AsyncExitStack) -> tuple[OIDCConfig, ...]:
        """The development issuer, if asked for, and that it is believed: in no object, so only while it runs."""
        settings = self._settings
        if settings.dev_issuer_url is None:
            return ()
        app = make_dev_issuer(settings.dev_issuer_url, _now)
        await serve(stack, app, settings.dev_issuer_address, "--dev-issuer-address")
        return (dev_config(settings.dev_issuer_url, settings.namespace),)

    async def _drain(self, gateway: Gateway, busy: Callable[[], bool]) -> None:
        """Nothing new comes in; open builds finish, or meet the deadline, or a second signal."""
        was_busy = busy()
        seconds = self._settings.drain_timeout.total_seconds()
        log.info("appliance.draining", seconds=seconds, busy=was_busy)
        draining = asyncio.create_task(gateway.drain(seconds))
        forced = asyncio.create_task(self._life.forced.wait())
        await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
        if self._life.forced.is_set():
            log.warning("appliance.forced")
            await gateway.drain(0)
        elif was_busy:
            await self._life.pause(GRACE.total_seconds())
        forced.cancel()
        await draining


def _gateway_address(settings: Settings) -> Address:
    if settings.gateway_address is not None:
        return settings.gateway_address
    return Address("0.0.0.0" if settings.gateway_hosts else "127.0.0.1", GATEWAY_PORT)  # noqa: S104 - mTLS, and asked for


def _now() -> datetime:
    return datetime.now(UTC)
