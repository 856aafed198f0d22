"""Makes sure that the registrations of a lease have really expired before its worker is stopped, or leaves the lease.

A gateway renews them by its heartbeat, which is another object. So the condition of the write to the worker does not
notice a renewal that the copy in memory has missed; this does (docs/decisions/0036-one-heartbeat-a-gateway.md).
"""

from __future__ import annotations

from bkpool.core.errors import Conflict
from bkpool.core.reconcile.actions import Action, FinishLease, ReplaceDaemon, StopDaemon
from bkpool.core.worker import EndReason
from bkpool.store.heartbeats import Heartbeats


async def check_expired(action: Action, heartbeats: Heartbeats) -> None:
    """Asks the store for the heartbeats behind the lease's registrations, if the action ends what they protect.

    Mostly there are none. A revoked lease is cut in any case, and waits for nothing.

    Raises:
        Conflict: One has changed. The copy of it is right now, so that it can be decided again.
        Unavailable: The store does not answer.
    """
    if not isinstance(action, FinishLease | StopDaemon | ReplaceDaemon):
        return
    worker, lease = action.worker, action.worker.lease
    if lease is None or (lease.end_reason is EndReason.REVOKED and not isinstance(action, FinishLease)):
        return
    for entry in worker.status.gateways:
        key = entry.heartbeat_key
        if entry.lease_id == lease.id and key is not None and not await heartbeats.is_current(key):
            raise Conflict(f"the heartbeat of gateway {key} has changed")
