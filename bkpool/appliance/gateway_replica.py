"""A gateway replica: the gateway of one pool, in a pod.

It follows only its pool and the workers of that pool. Of Secrets it reads only the one that the controller keeps for
it. On SIGTERM it accepts for a few more seconds, then lets open builds finish.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

import structlog

from bkpool.appliance.addresses import gateway_address
from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.gateway_secret import GatewaySecret
from bkpool.appliance.http import add_probes, metrics_app, serve
from bkpool.appliance.roles.context import follow, open_context, replica_name
from bkpool.appliance.roles.gateway import GatewayRole, open_gateway
from bkpool.appliance.run_options import RunOptions
from bkpool.appliance.shutdown import Shutdown, run_until_stopped
from bkpool.appliance.tuning import kube_limits
from bkpool.core.names import Key
from bkpool.core.pool import PoolGateway
from bkpool.gateway.control.server import default_threads
from bkpool.kube import KubeApi
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class GatewayReplica:
    """One replica of one pool's gateway.

    Args:
        options: How it runs.
        pool: The pool that it serves.
    """

    def __init__(self, options: RunOptions, pool: Key) -> None:
        self._options = options
        self._pool = pool
        self._not_ready = "this replica is starting"

    async def run(self, deadline: EndDeadline | None = None) -> None:
        """Serves connections of this pool's leases."""
        await run_until_stopped(self._start, deadline)

    async def _start(self, stack: AsyncExitStack, shutdown: Shutdown) -> None:
        options = self._options
        context = open_context(stack, options, shutdown)
        api = await KubeApi.connect(options.access, kube_limits(options.settings))
        stack.push_async_callback(api.close)
        store = KubernetesStore(api, StoreBounds.of_pool(self._pool))
        mirror = Mirror(store)

        async def not_ready_reason() -> str | None:
            trouble = "this replica is stopping" if shutdown.requested.is_set() else self._not_ready or mirror.trouble
            return trouble or await context.checks.trouble()

        # Served first: the kubelet asks while the replica waits for the store and its Secret.
        app = add_probes(metrics_app(context.registry), not_ready_reason)
        await serve(stack, app, options.settings.metrics.address, options.where("metrics.address"))
        await follow(stack, context, store, mirror)
        secret = await GatewaySecret.open(api, self._pool)
        gateway = await open_gateway(
            stack,
            context,
            store,
            mirror,
            name=replica_name(),
            certificate=secret,
            dial=secret.dial,
            address=gateway_address(options),
            threads=default_threads(),
            pool=self._pool,
        )
        # Entered last, so it comes first when the replica stops: builds finish while everything else still runs.
        stack.push_async_callback(self._drain, gateway, mirror, shutdown)
        self._not_ready = ""
        log.info("replica.ready", roles=["gateway"], pool=str(self._pool), name=replica_name())

    async def _drain(self, gateway: GatewayRole, mirror: Mirror, shutdown: Shutdown) -> None:
        await shutdown.pause(self._options.settings.appliance.endpoint_removal_delay.total_seconds())
        pool = mirror.pools.get(self._pool)
        bounds = pool.spec.gateway if pool else PoolGateway()  # builds of a deleted pool may finish too
        await gateway.drain(bounds.drain_timeout.total_seconds(), shutdown)
        shutdown.drained()
