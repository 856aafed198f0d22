"""A replica: some roles of an appliance in one process, as they run in a cluster.

Replicas share the custom resources, Secrets and one Lease; none of them stores anything itself. This module chooses
what runs the roles.
"""

from __future__ import annotations

from typing import Protocol

from bkpool.appliance.control_replica import ControlReplica
from bkpool.appliance.end_deadline import EndDeadline
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.run_options import Role, RunOptions
from bkpool.core.errors import InvalidInput


class Replica(Protocol):
    """Some roles in one process."""

    async def run(self, deadline: EndDeadline | None = None) -> None:
        """Runs them until SIGTERM. The deadline is for the end that follows."""


def make_replica(options: RunOptions) -> Replica:
    """What runs the roles of the settings.

    Raises:
        InvalidInput: These roles cannot run together, or an option that they need is missing.
    """
    roles_from = options.where("appliance.roles")
    if options.backend not in {"auto", "kubernetes"}:
        raise InvalidInput(
            f"{roles_from}: cannot be used with --backend {options.backend}",
            hint="Leave the roles out, or use --backend kubernetes.",
            field=roles_from,
        )
    roles, pool = options.settings.appliance.roles, options.settings.gateway.pool
    if roles == {Role.GATEWAY}:
        if pool is None:
            where = options.where("gateway.pool")
            raise InvalidInput(
                f"{where}: missing; the role gateway ({roles_from}) serves one pool",
                hint="Give the pool: --pool NAMESPACE/NAME.",
                field=where,
            )
        return GatewayReplica(options, pool)
    if Role.GATEWAY in roles:
        raise InvalidInput(
            f"{roles_from}: gateway runs alone, or together with both api and controller",
            hint="Give gateway alone, or api,controller.",
            field=roles_from,
        )
    return ControlReplica(options)
