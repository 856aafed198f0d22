"""What to do next for one pool, as a pure function of its state.

`decide(snapshot, now)` returns actions, and the next moment at which time alone would change the answer. It looks at
the state and never at how the state came about, so it may be called at any time and as often as needed.
"""

from __future__ import annotations

from datetime import datetime

from bkpool.core.observation import SeenCache, Snapshot
from bkpool.core.reconcile.actions import Plan
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, FailureLimits
from bkpool.core.reconcile.pool_state import PoolState
from bkpool.core.reconcile.slot_step import Moment


def decide(snapshot: Snapshot, now: datetime, limits: FailureLimits = DEFAULT_LIMITS) -> Plan:
    """What to do now for one pool. The limits apply to workers that fail."""
    moment = Moment(
        now,
        snapshot.registered_until,
        snapshot.undelivered_for,
        snapshot.restarts_left,
        limits,
        snapshot.lease_since,
        starts_left=snapshot.starts_left,
    )
    return state_of(snapshot).plan(moment)


def state_of(snapshot: Snapshot) -> PoolState:
    """A new state of a pool that is as this snapshot says."""
    state = PoolState(snapshot.pool)
    for worker in snapshot.workers:
        state.set_worker(worker.slot, worker)
    for slot, seen in snapshot.observed.items():
        state.set_observation(slot, seen)
    for slot, owner in snapshot.caches.items():
        state.set_cache(slot, SeenCache(owner))
    for slot in snapshot.busy:
        state.set_busy(slot, busy=True)
    state.set_unreadable(snapshot.unreadable_slots)
    return state
