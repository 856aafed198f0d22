"""Makes sure that the registrations of a lease have really expired before its worker is stopped, or leaves the lease.

A gateway renews them by its heartbeat, which is another object. So the condition of the write to the worker does not
notice a renewal that the copy in memory has missed; this does (docs/decisions/0036-one-heartbeat-a-gateway.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from bkpool.core.errors import Conflict
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key
from bkpool.core.reconcile.actions import Action, FinishLease, ReplaceDaemon, StopDaemon
from bkpool.core.worker import EndReason
from bkpool.store.heartbeats import Heartbeats

Judged = Mapping[Key, GatewayHeartbeat | None]
"""The heartbeats that a decision has judged, by their names; None: there was none."""


def judged(action: Action, heartbeats: Heartbeats) -> Judged:
    """The heartbeats behind the lease's registrations, if the action ends what they protect. Mostly there are none.

    It must be called in the step of the loop in which the action was decided: of two leases of one gateway, the first
    one's question corrects the copy. A revoked lease is cut in any case, and waits for nothing.
    """
    if not isinstance(action, FinishLease | StopDaemon | ReplaceDaemon):
        return {}
    worker, lease = action.worker, action.worker.lease
    if lease is None or (lease.end_reason is EndReason.REVOKED and not isinstance(action, FinishLease)):
        return {}
    entries = (entry for entry in worker.status.gateways if entry.lease_id == lease.id)
    return {key: heartbeats.gateways.get(key) for entry in entries if (key := entry.heartbeat_key) is not None}


async def check_expired(known: Judged, heartbeats: Heartbeats) -> None:
    """Asks the store whether the heartbeats are those that were judged.

    Raises:
        Conflict: One has changed. The copy of it is right now, so that it can be decided again.
        Unavailable: The store does not answer.
    """
    for key, heartbeat in known.items():
        if not await heartbeats.is_current(key, heartbeat):
            raise Conflict(f"the heartbeat of gateway {key} has changed")
