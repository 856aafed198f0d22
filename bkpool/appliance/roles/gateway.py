"""Opens the gateway role: the gateway's threads, its certificate, and the leases that it is told of."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from bkpool.appliance.roles.context import RoleContext
from bkpool.appliance.run_options import Address
from bkpool.appliance.shutdown import Shutdown
from bkpool.appliance.tuning import gateway_limits
from bkpool.core.errors import HostFault
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key
from bkpool.gateway.control.heartbeat_writer import HeartbeatWriter, heartbeat_name
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.gateway.net.dial import Dialler
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class CertificateSource(Protocol):
    """Where a gateway gets its server certificate from."""

    def install(self, gateway: Gateway) -> None:
        """Hands the gateway the current certificate."""

    async def run(self, gateway: Gateway) -> None:
        """Hands the gateway every later certificate, until cancelled."""


@dataclass(frozen=True, slots=True)
class GatewayRole:
    """The open gateway."""

    gateway: Gateway
    metrics: GatewayMetrics
    port: int

    async def drain(self, seconds: float, shutdown: Shutdown) -> None:
        """Accepts nothing new and lets open builds finish.

        Returns after this many seconds at most. If the end is forced meanwhile, the connections are cut at once.
        """
        draining = asyncio.create_task(self.gateway.drain(seconds))
        forced = asyncio.create_task(shutdown.forced.wait())
        await asyncio.wait({draining, forced}, return_when=asyncio.FIRST_COMPLETED)
        if shutdown.forced.is_set():
            log.warning("gateway.drain_forced")
            await self.gateway.drain(0)
        forced.cancel()
        await draining


async def open_gateway(
    stack: AsyncExitStack,
    context: RoleContext,
    store: Store,
    mirror: Mirror,
    *,
    name: str,
    certificate: CertificateSource,
    dial: Dialler,
    address: Address,
    threads: int,
    pool: Key | None = None,
    followed: Callable[[], bool] = lambda: True,
) -> GatewayRole:
    """Serves connections until the stack is closed, which cuts those that are open. `GatewayRole.drain` goes before.

    It returns when the gateway knows all leases. A client that comes earlier is served, too: its lease is looked for.

    Args:
        stack: Closes it.
        context: Of this process.
        store: Where the gateway registers itself on workers.
        mirror: The copy of the store.
        name: The name that it registers under, unique among gateways.
        certificate: Provides its server certificate.
        dial: How it reaches workers.
        address: Where it listens.
        threads: The number of event loops.
        pool: The only pool that it serves; None serves all.
        followed: Whether the controller that leads is known to follow the gateway's heartbeat. Where its rights say
            that, this need not.

    Raises:
        HostFault: `PortTaken`, or the certificate cannot be used.
    """
    worker_series = context.options.settings.metrics.worker_series
    metrics = GatewayMetrics(context.registry, worker_series=worker_series)
    limits = gateway_limits(context.options.settings, context.shares)
    feeder = TableFeeder(mirror)
    gateway = Gateway(
        _registry(store, mirror, context, name, pool, feeder=feeder, followed=followed),
        now=context.now,
        metrics=metrics,
        limits=replace(limits, heartbeat_phase=limits.heartbeat_interval * random.random()),  # noqa: S311
        dial=dial,
        pool=pool,
        threads=threads,
        watchdog=context.watchdog,
    )
    certificate.install(gateway)
    port = await _start(gateway, context, address)
    stack.push_async_callback(gateway.close)
    for loop, answers in gateway.loops.items():
        stack.callback(context.checks.add(f"{loop}, a loop of the gateway,", answers))
    stack.callback(feeder.start(gateway.update))
    await context.run_in_background(stack, certificate.run(gateway))
    await feeder.complete.wait()
    return GatewayRole(gateway, metrics, port)


async def _start(gateway: Gateway, context: RoleContext, address: Address) -> int:
    try:
        [(_, port)] = await gateway.start([address])
    except HostFault as fault:
        where = context.options.where("gateway.address")  # the gateway knows no settings
        raise HostFault(f"{where}: {fault.message}", hint=fault.hint, code=fault.code) from None
    return port


def _registry(
    store: Store,
    mirror: Mirror,
    context: RoleContext,
    name: str,
    pool: Key | None,
    *,
    feeder: TableFeeder,
    followed: Callable[[], bool],
) -> StoreLeaseRegistry:
    """What the gateway needs from the store. The other arguments are as for `open_gateway`."""
    place = _heartbeat_place(store, context, name, pool)
    return StoreLeaseRegistry(
        store,
        name,
        context.now,
        mirror.apply,
        hand_on=feeder.hand_on,
        known=mirror.workers.get,
        heartbeat=HeartbeatWriter(store, place, context.now, pool=pool, allowed=followed),
    )


def _heartbeat_place(store: Store, context: RoleContext, gateway: str, pool: Key | None) -> Key:
    """The name of a gateway's heartbeat: with its pool, else in a namespace that the store has."""
    namespace = pool.namespace if pool else store.scopes(GatewayHeartbeat)[0]
    return Key(namespace or context.options.settings.kubernetes.namespace, heartbeat_name(gateway))
