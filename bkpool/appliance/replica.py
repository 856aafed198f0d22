"""The roles of an appliance one by one, as they run in a cluster: API and controller, or the gateway of a pool.

What replicas share is in the custom resources, in Secrets and in one Lease; none keeps anything. On SIGTERM one goes
on accepting for a moment, until no Service leads to it any more (Kubernetes: pod termination), then ends gently.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol, Self

import structlog
from aiohttp import web

from bkpool.allocation import Claims, Leases
from bkpool.api import Service, make_app
from bkpool.appliance import cluster_secrets
from bkpool.appliance.backend import LEASE
from bkpool.appliance.lifetime import Lifetime
from bkpool.appliance.parts import feed, led, metrics_app, running, serve
from bkpool.appliance.settings import Role, Settings, Tell
from bkpool.cluster.leader import Leadership
from bkpool.cluster.pool_gateways import PoolGateways
from bkpool.controller import Controller
from bkpool.core.errors import BkpoolError, HostFault, InvalidInput, Unavailable
from bkpool.core.ignored import CLUSTER_IGNORES, ignored_fields
from bkpool.core.names import GATEWAY_PORT, Key
from bkpool.core.objects import Pool
from bkpool.core.policy import PoolSetting
from bkpool.gateway.context import server_context
from bkpool.gateway.dial import TlsDialler
from bkpool.gateway.metrics import Metrics
from bkpool.gateway.registration import StoreRegistrar
from bkpool.gateway.server import Gateway
from bkpool.identity.local import AdminToken
from bkpool.kube import KubeApi, paths
from bkpool.pki import bundle
from bkpool.pki.backend import worker_context
from bkpool.store.events import KubernetesRecorder
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror
from bkpool.workers.pods import PodRuntime

log = structlog.get_logger(__name__)

STILL_ACCEPTING = 5.0
"""Seconds after SIGTERM: endpoints take as long to leave every kube-proxy of a cluster of some size."""
_LOOK_AGAIN = 5.0
"""Seconds between tries to read a Secret that is not there yet, or not readable."""


class Replica(Protocol):
    """Some roles in one process."""

    async def run(self, tell: Tell) -> None:
        """Until SIGTERM."""


def of_roles(settings: Settings) -> Replica:
    """What runs these roles.

    Raises:
        InvalidInput: They make no sense together, or what they need is not said.
    """
    if settings.backend not in {"auto", "kubernetes"}:
        raise InvalidInput(
            "--roles: only in a cluster can an appliance be split",
            hint="Leave --roles out, or use --backend kubernetes.",
            field="--roles",
        )
    if settings.roles == {Role.GATEWAY}:
        if settings.pool is None:
            raise InvalidInput(
                "--pool: a gateway that runs alone is for one pool",
                hint="Say which: --pool NAMESPACE/NAME.",
                field="--pool",
            )
        return GatewayReplica(settings, settings.pool)
    if Role.GATEWAY in settings.roles:
        raise InvalidInput(
            "--roles: a gateway runs alone, or with both others",
            hint="Use --roles gateway, or --roles api,controller.",
            field="--roles",
        )
    return ControlReplica(settings)


class ControlReplica:
    """API, or controller, or both."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def run(self, tell: Tell) -> None:
        """Serves the API here; the controller runs in whichever replica holds the Lease."""
        self._life = life = Lifetime()
        async with AsyncExitStack() as stack:
            await self._start(stack)
            tell({"progress": "ready"})
            await life.stopping.wait()
            log.info("replica.stopping")
        life.check()

    async def _start(self, stack: AsyncExitStack) -> None:
        settings, died = self._settings, self._life.died
        api = await _connected(stack, settings)
        store = KubernetesStore(api)
        secrets = await cluster_secrets.load_or_create(api, settings.namespace, store, _now())
        name = _replica_name()
        recorder = KubernetesRecorder(api, name)
        await stack.enter_async_context(running(recorder.run(), died))
        mirror = await _mirrored(stack, store, self._life)
        leaf = secrets.backend.issue_dialler(name, _now(), _now() + timedelta(days=3650))
        runtime = PodRuntime(
            api,
            backend=secrets.backend,
            context=worker_context(leaf.cert_pem, leaf.key_pem or b"", secrets.backend.cert_pem),
            image=settings.buildkit_image,
            host_ports=None,
            namespaces=settings.pool_namespaces or None,
        )
        stack.push_async_callback(runtime.close, stop_workers=False)
        await runtime.adopt()

        def leaving() -> str | None:
            return "this replica is stopping" if self._life.stopping.is_set() else mirror.trouble

        if Role.API in settings.roles:
            admin = AdminToken(await cluster_secrets.admin_token(api, settings.namespace))
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
            service = Service(
                claims=claims,
                leases=leases,
                mirror=mirror,
                authenticators=(admin,),
                gateway_endpoint=endpoint_of,
                connections=lambda pool: pool.status.connections,
                trouble=lambda: mirror.trouble,
                leaving=leaving,
            )
            await serve(stack, make_app(service), settings.api_address, "--api-address")
            stack.callback(claims.turn_away, Unavailable("this replica is stopping", hint="Try again: others serve."))
        await serve(stack, _probes(metrics_app(Metrics()), leaving), settings.metrics_address, "--metrics-address")
        stack.push_async_callback(self._life.pause, STILL_ACCEPTING)
        if Role.CONTROLLER in settings.roles:
            gateways = PoolGateways(
                api, mirror, secrets, image=settings.image, namespace=settings.namespace, now=_now
            )
            leadership = Leadership(api, settings.namespace, LEASE, name)

            def setting(pool: Pool) -> PoolSetting:
                return PoolSetting(
                    endpoint=gateways.endpoints.get(pool.key) or endpoint_of(pool),
                    ignored=ignored_fields(pool.spec, CLUSTER_IGNORES),
                    trouble=gateways.trouble.get(pool.key, ""),
                )

            async def control() -> None:
                controller = Controller(
                    store=store, mirror=mirror, runtime=runtime, now=_now, setting=setting, recorder=recorder
                )
                unsubscribe = gateways.on_change(controller.look_again)
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(controller.run())
                        tasks.create_task(gateways.run())
                finally:
                    unsubscribe()

            # Entered last, so that it is the first to end: the Lease is given back before anything else is done.
            await stack.enter_async_context(running(led(leadership, control), died))
        log.info("replica.ready", roles=sorted(settings.roles), name=name)


class GatewayReplica:
    """One replica of one pool's gateway."""

    def __init__(self, settings: Settings, pool: Key) -> None:
        self._settings = settings
        self._pool = pool
        self._metrics = Metrics()

    async def run(self, tell: Tell) -> None:
        """Serves connections of this pool's leases."""
        self._life = life = Lifetime()
        async with AsyncExitStack() as stack:
            await self._start(stack)
            tell({"progress": "ready"})
            await life.stopping.wait()
            log.info("replica.stopping")
        life.check()

    async def _start(self, stack: AsyncExitStack) -> None:
        settings, died = self._settings, self._life.died
        api = await _connected(stack, settings)
        store = KubernetesStore(api, namespace=self._pool.namespace)
        ready = False

        def trouble() -> str | None:
            if self._life.stopping.is_set():
                return "this replica is stopping"
            return mirror.trouble if ready else "this replica is starting"

        mirror = Mirror(store)
        probes = _probes(metrics_app(self._metrics), trouble)
        await serve(stack, probes, settings.metrics_address, "--metrics-address")
        await stack.enter_async_context(running(mirror.run(), died))
        await mirror.ready.wait()
        found = await self._certificates(api)
        dial = TlsDialler(found.dialling)
        gateway = Gateway(
            StoreRegistrar(store, _replica_name(), _now, mirror.apply),
            now=_now,
            metrics=self._metrics,
            dial=dial,
            pool=self._pool,
        )
        found.install(gateway)
        address = settings.gateway_address or ("0.0.0.0", GATEWAY_PORT)  # noqa: S104 - mTLS, in a pod of its own
        await gateway.start([address])
        stack.push_async_callback(gateway.close)
        stack.callback(feed(gateway, mirror))
        await stack.enter_async_context(running(self._renew(api, gateway, dial, found), died))
        stack.push_async_callback(self._drain, gateway, mirror)
        ready = True
        log.info("replica.ready", roles=["gateway"], pool=str(self._pool), name=_replica_name())

    async def _drain(self, gateway: Gateway, mirror: Mirror) -> None:
        await self._life.pause(STILL_ACCEPTING)
        pool = mirror.pools.get(self._pool) or Pool.model_validate({"metadata": {"name": self._pool.name}})
        draining = asyncio.create_task(gateway.drain(pool.spec.gateway.drain_timeout.total_seconds()))
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


def endpoint_of(pool: Pool) -> str:
    """Where a pool's gateway is reached, as its status says; before that, its Service."""
    return pool.status.endpoint or f"tcp://{pool.key.name}.{pool.key.namespace}.svc:{GATEWAY_PORT}"


async def _connected(stack: AsyncExitStack, settings: Settings) -> KubeApi:
    api = await KubeApi.connect(settings.access)
    stack.push_async_callback(api.close)
    return api


async def _mirrored(stack: AsyncExitStack, store: KubernetesStore, life: Lifetime) -> Mirror:
    mirror = Mirror(store)
    await stack.enter_async_context(running(mirror.run(), life.died))
    await mirror.ready.wait()
    return mirror


def _probes(app: web.Application, trouble: Callable[[], str | None]) -> web.Application:
    """Adds what the kubelet asks."""

    async def health(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(_request: web.Request) -> web.Response:
        why = trouble()
        return web.json_response({"status": why or "ready"}, status=503 if why else 200)

    app.router.add_get("/health", health)
    app.router.add_get("/ready", ready)
    return app


def _replica_name() -> str:
    """The pod's name, which no other pod has at the same time."""
    return os.environ.get("POD_NAME") or socket.gethostname()


def _now() -> datetime:
    return datetime.now(UTC)
