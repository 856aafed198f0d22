"""The roles of an appliance one by one, as they run in a cluster; here API and controller.

What replicas share is in the custom resources, in Secrets and in one Lease; none keeps anything. On SIGTERM one goes
on accepting for a moment, until no Service leads to it any more (Kubernetes: pod termination), then ends gently.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import structlog

from bkpool.api import Service, make_app
from bkpool.appliance import cluster_secrets
from bkpool.appliance.api_tls import enter_api_tls
from bkpool.appliance.backend import InCluster, open_in_cluster
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.identities import access, open_issuers
from bkpool.appliance.lifetime import STILL_ACCEPTING, Lifetime, live
from bkpool.appliance.parts import led, metrics_app, probes, replica_name, running, serve, watched
from bkpool.appliance.settings import Role, Settings
from bkpool.controller.oidc_configs import ConfigKeeper
from bkpool.controller.pool_gateways import PoolGateways
from bkpool.core.errors import InvalidInput, Unavailable
from bkpool.core.ignored import IgnoredFields
from bkpool.core.names import GATEWAY_PORT
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.identity.admin_token import AdminTokenAuthenticator
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.install.manifests import CONTROLLER, IMAGE
from bkpool.store.mirror import Mirror
from bkpool.telemetry.registry import new_registry

log = structlog.get_logger(__name__)


class Replica(Protocol):
    """Some roles in one process."""

    async def run(self) -> None:
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

    async def run(self) -> None:
        """Serves the API here; the controller runs in whichever replica holds the Lease."""
        await live(self._start)

    async def _start(self, stack: AsyncExitStack, life: Lifetime) -> None:
        self._life = life
        settings, died, name = self._settings, life.died, replica_name()
        registry = new_registry()
        watched(stack, registry)
        opened = await open_in_cluster(stack, settings, name)
        backend = opened.backend
        for loop in backend.loops:
            await stack.enter_async_context(running(loop, died))
        mirror = Mirror(backend.store, configs=True)
        await stack.enter_async_context(running(mirror.run(), died))
        await mirror.ready.wait()
        await backend.runtime.adopt()

        issuers = open_issuers(stack)

        def leaving() -> str | None:
            return "this replica is stopping" if self._life.stopping.is_set() else mirror.trouble

        if Role.API in settings.roles:
            await self._open_api(stack, opened, mirror, issuers, leaving)
        await serve(stack, probes(metrics_app(registry), leaving), settings.metrics_address, "--metrics-address")
        stack.push_async_callback(self._life.pause, STILL_ACCEPTING)
        if Role.CONTROLLER in settings.roles and backend.leadership is not None:
            work = partial(self._control, opened, mirror, issuers)
            # Entered last, so that it is the first to end: the Lease is given back before anything else is done.
            await stack.enter_async_context(running(led(backend.leadership, work), died))
        log.info("replica.ready", roles=sorted(settings.roles), name=name)

    async def _open_api(
        self,
        stack: AsyncExitStack,
        opened: InCluster,
        mirror: Mirror,
        issuers: IssuerKeys,
        leaving: Callable[[], str | None],
    ) -> None:
        backend = opened.backend
        admin = AdminTokenAuthenticator(await cluster_secrets.admin_token(opened.api, self._settings.namespace))
        claims, leases = backend.lease_service(mirror, _now)
        stack.push_async_callback(claims.close)
        service = Service(
            claims=claims,
            leases=leases,
            mirror=mirror,
            access=access(admin, backend.methods, issuers, mirror, namespace=self._settings.namespace, now=_now),
            gateway_endpoint=endpoint_of,
            connections=lambda pool: pool.status.connections,
            trouble=lambda: mirror.trouble,
            leaving=leaving,
        )
        tls = await enter_api_tls(stack, self._settings, backend.authority, _now, self._life.died)
        address = self._settings.api_address
        await serve(stack, make_app(service), address, "--api-address", tls.context if tls else None)
        stack.callback(claims.turn_away, Unavailable("this replica is stopping", hint="Try again: others serve."))

    async def _control(self, opened: InCluster, mirror: Mirror, issuers: IssuerKeys) -> None:
        """The controller, and the gateways that it keeps."""
        backend, settings = opened.backend, self._settings
        gateways = PoolGateways(
            opened.api,
            mirror,
            opened.secrets,
            image=settings.image or IMAGE,
            controller=CONTROLLER,
            namespace=settings.namespace,
            now=_now,
            recorder=backend.recorder,
        )

        ignored = IgnoredFields(backend.runtime.ignored_spec_fields)

        def status_inputs(pool: Pool) -> PoolStatusInputs:
            return PoolStatusInputs(
                endpoint=gateways.endpoints.get(pool.key) or endpoint_of(pool),
                ignored=ignored.of(pool),
                gateway_problem=gateways.trouble.get(pool.key, ""),
            )

        controller = backend.controller(mirror, status_inputs, _now)
        unsubscribe = gateways.on_change(controller.look_again)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(controller.run())
                tasks.create_task(gateways.run())
                tasks.create_task(ConfigKeeper(backend.store, mirror, issuers.probe, _now).run())
        finally:
            unsubscribe()


def endpoint_of(pool: Pool) -> str:
    """Where a pool's gateway is reached, as its status says; before that, its Service."""
    return pool.status.endpoint or f"tcp://{pool.key.name}.{pool.key.namespace}.svc:{GATEWAY_PORT}"


def _now() -> datetime:
    return datetime.now(UTC)
