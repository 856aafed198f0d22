"""A replica: some roles of an appliance in one process, as they run in a cluster.

Replicas share the custom resources, Secrets and one Lease; none of them stores anything itself. This module chooses
what runs the roles.
"""

from __future__ import annotations

from typing import Protocol

from bkpool.appliance.control_replica import ControlReplica
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.run_options import Role, RunOptions
from bkpool.core.errors import InvalidInput


class Replica(Protocol):
    """Some roles in one process."""

    async def run(self) -> None:
        """Runs them until SIGTERM."""


def make_replica(options: RunOptions) -> Replica:
    """What runs the roles of the settings.

    Raises:
        InvalidInput: These roles cannot run together, or an option that they need is missing.
    """
    if options.backend not in {"auto", "kubernetes"}:
        raise InvalidInput(
            f"--roles: cannot be used with --backend {options.backend}",
            hint="Leave --roles out, or use --backend kubernetes.",
            field="--roles",
        )
    roles, pool = options.settings.appliance.roles, options.settings.gateway.pool
    if roles == {Role.GATEWAY}:
        if pool is None:
            raise InvalidInput(
                "--pool: missing; --roles gateway serves one pool",
                hint="Give the pool: --pool NAMESPACE/NAME.",
                field="--pool",
            )
        return GatewayReplica(options, pool)
    if Role.GATEWAY in roles:
        raise InvalidInput(
            "--roles: gateway runs alone, or together with both api and controller",
            hint="Use --roles gateway, or --roles api,controller.",
            field="--roles",
        )
    return ControlReplica(options)
