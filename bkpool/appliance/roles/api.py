"""Opens the API role: the lease service and the HTTP server in front of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from bkpool.allocation import Allocator, PoolRemover, Revoker
from bkpool.api import ApiMetrics, Service, make_app
from bkpool.api.service import always_ready
from bkpool.appliance.access_control import make_access_control
from bkpool.appliance.api_tls import make_api_tls
from bkpool.appliance.http import serve
from bkpool.appliance.roles.context import ControlState, RoleContext, replica_name
from bkpool.appliance.tuning import api_limits, http_limits
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Unavailable
from bkpool.core.pool import Pool
from bkpool.home.local_socket import SocketPlaces
from bkpool.identity.access import AccessControl
from bkpool.identity.admin_token import AdminTokenAuthenticator


@dataclass(frozen=True, slots=True)
class ApiSources:
    """What the API asks other parts of the process."""

    gateway_endpoint: Callable[[Pool], str]
    """Where callers reach a pool's gateway."""
    connections: Callable[[Pool], int]
    """How many connections of a pool are open."""
    unavailable_reason: Callable[[], str | None]
    """Why nothing can be leased at the moment; None if leases are possible."""
    worker_connections: Callable[[Pool], Mapping[str, int]] | None = None
    """How many connections each worker of a pool has, by its name; None: only its gateways' registrations tell."""
    not_ready_reason: Callable[[], Awaitable[str | None]] = always_ready
    """Returns why this replica should get no new requests although it still answers them; None if it should."""


@dataclass(frozen=True, slots=True)
class ApiRole:
    """The open API."""

    address: str
    """host:port, as in a URL."""
    tls_description: dict[str, Any]
    """What `appliance.json` says about its certificate; empty without TLS."""
    allocator: Allocator

    def refuse_waiting(self, message: str, *, hint: str) -> None:
        """Ends every allocate request that waits for a worker, with this error."""
        self.allocator.refuse_all(Unavailable(message, hint=hint))


async def open_api(
    stack: AsyncExitStack,
    context: RoleContext,
    state: ControlState,
    *,
    admin: AdminTokenAuthenticator,
    sources: ApiSources,
    extra_configs: tuple[OIDCConfig, ...] = (),
    local: SocketPlaces | None = None,
) -> ApiRole:
    """Serves the API until the stack is closed. Then the server ends first, and after it the lease service.

    Args:
        stack: Closes it.
        context: Of this process.
        state: Where leases and workers are.
        admin: The admin token.
        sources: What the API asks other parts of the process.
        extra_configs: Trusted issuers that are configured in no object.
        local: Where the Unix socket is for the commands of this machine; None serves on the address only.

    Raises:
        HostFault: `PortTaken`, or the certificate cannot be used.
    """
    options, backend, mirror = context.options, state.backend, state.mirror
    max_waiters, on_waiting = options.settings.allocation.max_waiters, state.waiting.notify
    allocator, leases = backend.lease_service(mirror, context.now, max_waiters, on_waiting, replica_name())
    stack.push_async_callback(allocator.close)
    access = _access_control(context, state, admin, extra_configs)
    revoker = Revoker(store=backend.store, mirror=mirror, leases=leases)
    service = Service(
        allocator=allocator,
        leases=leases,
        revoker=revoker,
        remover=PoolRemover(
            store=backend.store, mirror=mirror, revoker=revoker, now=context.now, only_files=backend.only_files
        ),
        mirror=mirror,
        access=access,
        now=context.now,
        gateway_endpoint=sources.gateway_endpoint,
        connections=sources.connections,
        worker_connections=sources.worker_connections,
        unavailable_reason=sources.unavailable_reason,
        not_ready_reason=sources.not_ready_reason,
        full_disk=backend.full_disk,
        audience=options.audience,
        limits=api_limits(options.settings),
    )
    metrics = ApiMetrics(context.registry, waiting=allocator.waiting, pools=mirror.pools, workers=mirror.workers)
    tls = make_api_tls(options, backend.api_authority or backend.authority, context.now)
    if tls is not None:
        await context.run_in_background(stack, tls.run())
    app = make_app(service, metrics)
    where, ssl_context = options.where("api.address"), tls.context if tls else None
    limits = http_limits(options.settings, context.shares)
    address = await serve(stack, app, options.settings.api.address, where, ssl_context, local=local, limits=limits)
    return ApiRole(address, tls.description if tls else {}, allocator)


def _access_control(
    context: RoleContext, state: ControlState, admin: AdminTokenAuthenticator, extra_configs: tuple[OIDCConfig, ...]
) -> AccessControl:
    options, backend = context.options, state.backend
    return make_access_control(
        admin,
        backend.authenticators,
        state.issuers,
        state.mirror,
        namespace=options.settings.kubernetes.namespace,
        audience=options.audience,
        leeway=options.settings.identity.clock_leeway.total_seconds(),
        extra_configs=extra_configs,
        now=context.now,
        missing_network=backend.missing_network,
    )
