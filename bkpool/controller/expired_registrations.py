"""Makes sure that the registrations of a lease have really expired before its worker is stopped, or leaves the lease.

A gateway renews them by its heartbeat, which is another object. So the condition of the write to the worker does not
notice a renewal that the copy in memory has missed; this does (docs/decisions/0036-one-heartbeat-a-gateway.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bkpool.core.errors import Conflict
from bkpool.core.gateway_heartbeat import HeartbeatVersion
from bkpool.core.names import Key
from bkpool.core.reconcile.actions import Action, FinishLease, ReplaceDaemon, StopDaemon
from bkpool.core.registrations import SeenRegistrations
from bkpool.core.worker import EndReason
from bkpool.store.heartbeats import Heartbeats

Judged = Mapping[Key, HeartbeatVersion | None]
"""The heartbeats behind the registrations that an action counts as expired, as they were when that was decided."""
_NONE: Judged = MappingProxyType({})


def judged_heartbeats(action: Action, registrations: SeenRegistrations) -> Judged:
    """What the action was decided by. It must be called before anything else has its turn in the loop.

    Mostly there are none. A revoked lease is cut in any case, and waits for nothing.
    """
    if not isinstance(action, FinishLease | StopDaemon | ReplaceDaemon):
        return _NONE
    worker, lease = action.worker, action.worker.lease
    if lease is None or (lease.end_reason is EndReason.REVOKED and not isinstance(action, FinishLease)):
        return _NONE
    return registrations.heartbeats_of(worker, lease.id)


async def check_expired(judged: Judged, heartbeats: Heartbeats) -> None:
    """Asks the store whether the heartbeats are still as they were when the action was decided.

    The copy of heartbeats is no measure: another action may have corrected it since.

    Raises:
        Conflict: One has changed. The copy of it is right now, so that it can be decided again.
        Unavailable: The store does not answer.
    """
    for key, version in judged.items():
        if not await heartbeats.is_still(key, version):
            raise Conflict(f"the heartbeat of gateway {key} has changed")
