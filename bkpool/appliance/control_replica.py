"""A control replica: API, controller, or both, in a pod.

On SIGTERM it first gives the Lease back, so that another replica can run the controller. It goes on answering until
no Service leads to it any more (Kubernetes: pod termination), and then ends.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

import structlog

from bkpool.appliance import kube_secrets
from bkpool.appliance.access_control import open_issuers
from bkpool.appliance.backend import ClusterBackend, open_replica_backend
from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.http import add_probes, metrics_app, serve
from bkpool.appliance.roles.api import ApiSources, open_api
from bkpool.appliance.roles.context import ControlState, RoleContext, follow, open_context, replica_name
from bkpool.appliance.roles.controller import open_controller
from bkpool.appliance.run_options import Role, RunOptions
from bkpool.appliance.shutdown import Shutdown, run_until_stopped
from bkpool.appliance.tuning import allowances, gateway_variables
from bkpool.controller.pool_gateways import PoolGateways
from bkpool.core.names import GATEWAY_PORT
from bkpool.core.pool import Pool
from bkpool.identity.admin_token import AdminTokenAuthenticator
from bkpool.install.manifests import CONTROLLER, IMAGE
from bkpool.kube import KubeApi
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class ControlReplica:
    """API, controller, or both.

    Args:
        options: How the replica runs.
    """

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._settings = options.settings

    async def run(self, deadline: EndDeadline | None = None) -> None:
        """Serves the API here. The controller runs in the replica that holds the Lease."""
        await run_until_stopped(self._start, deadline)

    async def _start(self, stack: AsyncExitStack, shutdown: Shutdown) -> None:
        options, settings, name = self._options, self._settings, replica_name()
        context = open_context(stack, options, shutdown)
        cluster = await open_replica_backend(stack, options, name)
        backend = cluster.backend
        for work in backend.background:
            await context.run_in_background(stack, work)
        mirror = Mirror(backend.store, configs=True, heartbeats=True)
        await follow(stack, context, backend.store, mirror)
        await backend.runtime.adopt()
        state = ControlState(backend, mirror, open_issuers(stack, settings.identity))

        async def not_ready_reason() -> str | None:
            trouble = "this replica is stopping" if shutdown.requested.is_set() else mirror.trouble
            return trouble or await context.checks.trouble()

        if Role.API in settings.appliance.roles:
            sources = ApiSources(
                gateway_endpoint=endpoint_of,
                connections=lambda pool: pool.status.connections,
                unavailable_reason=lambda: mirror.trouble,
                not_ready_reason=not_ready_reason,
            )
            await self._open_api(stack, context, state, cluster.api, sources)
        app = add_probes(metrics_app(context.registry), not_ready_reason)
        await serve(stack, app, settings.metrics.address, options.where("metrics.address"))
        stack.callback(shutdown.drained)
        stack.push_async_callback(shutdown.pause, settings.appliance.endpoint_removal_delay.total_seconds())
        if Role.CONTROLLER in settings.appliance.roles:
            # Opened last, so that it is closed first: the Lease is given back before anything else happens.
            await open_controller(
                stack,
                context,
                state,
                endpoint=endpoint_of,
                make_pool_gateways=lambda: self._pool_gateways(context, cluster, mirror),
            )
        log.info("replica.ready", roles=sorted(settings.appliance.roles), name=name)

    async def _open_api(
        self,
        stack: AsyncExitStack,
        context: RoleContext,
        state: ControlState,
        kube: KubeApi,
        sources: ApiSources,
    ) -> None:
        admin = AdminTokenAuthenticator(
            await kube_secrets.load_or_create_admin_token(kube, self._settings.kubernetes.namespace)
        )
        api = await open_api(stack, context, state, admin=admin, sources=sources)
        # Before the server is closed: who waits for a worker is sent to another replica.
        stack.callback(api.refuse_waiting, "this replica is stopping", hint="Try again: other replicas serve.")

    def _pool_gateways(self, context: RoleContext, cluster: ClusterBackend, mirror: Mirror) -> PoolGateways:
        """What keeps a gateway Deployment for each pool."""
        return PoolGateways(
            cluster.api,
            mirror,
            cluster.secrets.authority,
            cluster.pods.daemons,
            image=self._settings.kubernetes.image or IMAGE,
            controller=CONTROLLER,
            namespace=self._settings.kubernetes.namespace,
            now=context.now,
            recorder=cluster.backend.recorder,
            gateway_variables=gateway_variables(self._settings),
            server_life=self._settings.certificates.server_life,
            allowed=allowances(self._settings),
            former=cluster.secrets.former,
        )


def endpoint_of(pool: Pool) -> str:
    """Where callers reach a pool's gateway: the endpoint in its status, or its Service until there is one."""
    return pool.status.endpoint or f"tcp://{pool.key.name}.{pool.key.namespace}.svc:{GATEWAY_PORT}"
