"""One replica of one pool's gateway, in a pod of its own.

It knows only its pool's namespace, and of Secrets only the one that the controller keeps for it. On SIGTERM it
accepts for a moment longer, then lets open builds finish.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import structlog

from bkpool.appliance.lifetime import STILL_ACCEPTING, Lifetime, live
from bkpool.appliance.parts import feed, metrics_app, probes, replica_name, running, serve, watched
from bkpool.appliance.settings import Settings
from bkpool.core.errors import BkpoolError, HostFault
from bkpool.core.names import GATEWAY_PORT, Key
from bkpool.core.pool import PoolGateway
from bkpool.gateway.control.registration import StoreRegistrar
from bkpool.gateway.control.server import Gateway, default_threads
from bkpool.gateway.net.dial import TlsDialler
from bkpool.gateway.net.tls_context import server_context
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.kube import KubeApi, paths
from bkpool.pki import bundle
from bkpool.pki.worker_tls import worker_context
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

_LOOK_AGAIN = 5.0
"""Seconds between tries to read a Secret that is not there yet, or not readable."""


class GatewayReplica:
    """One replica of one pool's gateway."""

    def __init__(self, settings: Settings, pool: Key) -> None:
        self._settings = settings
        self._pool = pool
        self._metrics = GatewayMetrics()

    async def run(self) -> None:
        """Serves connections of this pool's leases."""
        await live(self._start)

    async def _start(self, stack: AsyncExitStack, life: Lifetime) -> None:
        self._life = life
        settings, died = self._settings, life.died
        watchdog = watched(stack, self._metrics.registry)
        api = await KubeApi.connect(settings.access)
        stack.push_async_callback(api.close)
        store = KubernetesStore(api, namespace=self._pool.namespace)
        ready = False

        def trouble() -> str | None:
            if self._life.stopping.is_set():
                return "this replica is stopping"
            return mirror.trouble if ready else "this replica is starting"

        mirror = Mirror(store)
        app = probes(metrics_app(self._metrics.registry), trouble)
        await serve(stack, app, settings.metrics_address, "--metrics-address")
        await stack.enter_async_context(running(mirror.run(), died))
        await mirror.ready.wait()
        found = await self._certificates(api)
        dial = TlsDialler(found.dialling)
        gateway = Gateway(
            StoreRegistrar(store, replica_name(), _now, mirror.apply),
            now=_now,
            metrics=self._metrics,
            dial=dial,
            pool=self._pool,
            threads=default_threads(),
            watchdog=watchdog,
        )
        found.install(gateway)
        address = settings.gateway_address or ("0.0.0.0", GATEWAY_PORT)  # noqa: S104 - mTLS, in a pod of its own
        await gateway.start([address])
        stack.push_async_callback(gateway.close)
        stack.callback(feed(gateway, mirror))
        await stack.enter_async_context(running(self._renew(api, gateway, dial, found), died))
        stack.push_async_callback(self._drain, gateway, mirror)
        ready = True
        log.info("replica.ready", roles=["gateway"], pool=str(self._pool), name=replica_name())

    async def _drain(self, gateway: Gateway, mirror: Mirror) -> None:
        await self._life.pause(STILL_ACCEPTING)
        pool = mirror.pools.get(self._pool)
        bounds = pool.spec.gateway if pool else PoolGateway()  # a deleted pool's builds may finish too
        draining = asyncio.create_task(gateway.drain(bounds.drain_timeout.total_seconds()))
        hurried = asyncio.create_task(self._life.forced.wait())
        await asyncio.wait({draining, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if self._life.forced.is_set():
            await gateway.drain(0)
        hurried.cancel()
        await draining

    async def _certificates(self, api: KubeApi) -> _Certificates:
        """What the controller keeps for this gateway, as soon as it is there."""
        async with aclosing(self._versions(api)) as versions:
            return await anext(versions)

    async def _renew(self, api: KubeApi, gateway: Gateway, dial: TlsDialler, used: _Certificates) -> None:
        """Takes over every new version; open connections go on with theirs."""
        async with aclosing(self._versions(api)) as versions:
            async for found in versions:
                if found.data != used.data:
                    found.install(gateway)
                    dial.swap(found.dialling)
                    used = found
                    log.info("gateway.certificate_renewed")

    async def _versions(self, api: KubeApi) -> AsyncGenerator[_Certificates, None]:
        """Every usable version of this gateway's Secret. With one that is not, the former goes on being used."""
        name = f"{self._pool.name}-gateway"
        async with aclosing(_versions(api, self._pool.namespace, name)) as versions:
            async for data in versions:
                try:
                    yield _Certificates.of(data)
                except (KeyError, ValueError, OSError, HostFault) as error:
                    log.warning("gateway.secret_not_usable", secret=name, reason=str(error))


@dataclass(frozen=True, slots=True)
class _Certificates:
    """A version of a gateway's Secret that makes sense."""

    data: Mapping[str, bytes]
    dialling: ssl.SSLContext

    @classmethod
    def of(cls, data: Mapping[str, bytes]) -> Self:
        """Raises KeyError, ValueError, OSError or HostFault where something is missing or damaged."""
        server_context(data[bundle.TLS_CERT], data[bundle.TLS_KEY], data[bundle.CA_CERT])
        dialler = data[bundle.DIALLER_CERT], data[bundle.DIALLER_KEY], data[bundle.BACKEND_CA_CERT]
        return cls(data, worker_context(*dialler))

    def install(self, gateway: Gateway) -> None:
        """Hands the server's part to the gateway."""
        data = self.data
        gateway.set_server_certificate(data[bundle.TLS_CERT], data[bundle.TLS_KEY], data[bundle.CA_CERT])


async def _versions(api: KubeApi, namespace: str, name: str) -> AsyncGenerator[Mapping[str, bytes], None]:
    """A Secret as it is now and whenever it changes; while it can't be read, it is tried again."""
    path, only = paths.core("secrets", namespace), f"metadata.name={name}"
    while True:
        try:
            items, since = await api.list(path, fieldSelector=only)
            for item in items:
                yield _decoded(item)
            async with aclosing(api.watch(path, since, fieldSelector=only)) as events:
                async for event in events:
                    if event["type"] in {"ADDED", "MODIFIED"}:
                        yield _decoded(event["object"])
        except BkpoolError as error:
            log.warning("gateway.secret_not_read", secret=f"{namespace}/{name}", reason=error.message)
            await asyncio.sleep(_LOOK_AGAIN)


def _decoded(secret: dict[str, object]) -> Mapping[str, bytes]:
    data = secret.get("data")
    return {key: base64.b64decode(value) for key, value in data.items()} if isinstance(data, dict) else {}


def _now() -> datetime:
    return datetime.now(UTC)
