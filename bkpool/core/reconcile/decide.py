"""What to do next for one pool, as a pure function of its state.

`decide(snapshot, now)` returns actions, and the next moment at which time alone would change the answer. It looks at
the state and never at how the state came about, so it may be called at any time and as often as needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from bkpool.core.durations import render
from bkpool.core.names import Slot
from bkpool.core.observation import DaemonState, Observation, Snapshot, ready_observation
from bkpool.core.pool import Pool
from bkpool.core.reconcile import lease_end, scaling
from bkpool.core.reconcile.actions import (
    Action,
    CreateWorker,
    LoseLease,
    Plan,
    RemoveWorker,
    SetCacheOwner,
    SetProtection,
    StartDaemon,
    StopDaemon,
    WipeCache,
    WriteStatus,
)
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, FailureLimits, failed_worker, only_of_holder, retry_at
from bkpool.core.reconcile.health import health_step
from bkpool.core.reconcile.replacing import to_replace
from bkpool.core.reconcile.undelivered import LONGEST_STEP
from bkpool.core.reconcile.unneeded_caches import caches_to_wipe
from bkpool.core.worker import UNDELIVERED_LIFE, EndReason, Lease, Phase, Worker

TOKEN_TIMEOUT = timedelta(minutes=1)
"""A lease of an earlier version that has no token after this time never gets one: who was creating it was killed."""


_NOT_DELIVERED = f"its answer did not reach its caller, and nobody used it for {render(UNDELIVERED_LIFE)}"


def decide(snapshot: Snapshot, now: datetime, limits: FailureLimits = DEFAULT_LIMITS) -> Plan:
    """What to do now for one pool. The limits apply to workers that fail."""
    actions: list[Action] = []
    surplus, deadlines = scaling.surplus(snapshot, now)
    too_many = {worker.slot for worker in surplus}
    wiped, more_to_wipe_at = caches_to_wipe(snapshot, now)
    deadlines += [more_to_wipe_at] if more_to_wipe_at else []
    actions += [WipeCache(slot) for slot in wiped]
    replaced = to_replace(snapshot, [w for w in snapshot.workers if w.lease is None and w.slot not in too_many])
    for worker in snapshot.workers:
        if worker.slot in snapshot.busy or worker.slot in wiped:
            continue
        if worker.slot in too_many:
            actions.append(RemoveWorker(worker))
            continue
        if worker.slot in replaced:
            actions.append(StopDaemon(worker))
            continue
        seen = snapshot.observed.get(worker.slot)
        lease = worker.lease
        if lease is None:
            step = _idle(worker, seen, snapshot.pool, now, limits)
        else:
            abandoned_in = _abandoned_in(worker, lease, snapshot, now)
            if abandoned_in is not None and abandoned_in <= timedelta(0):
                step = LoseLease(worker, _NOT_DELIVERED, EndReason.ABANDONED)
            else:
                deadlines += [] if abandoned_in is None else [now + min(abandoned_in, LONGEST_STEP)]
                step = _leased(worker, lease, seen, snapshot, now, limits=limits)
        if isinstance(step, datetime):
            deadlines.append(step)
        elif step is not None:
            actions.append(step)
    actions += [CreateWorker(slot) for slot in scaling.missing(snapshot, wiped)]
    return Plan(tuple(actions), min(deadlines, default=None))


def wind_up_leases(snapshot: Snapshot, now: datetime, limits: FailureLimits = DEFAULT_LIMITS) -> Plan:
    """What to do for a pool that cannot be read: leases that have ended leave their workers, and nothing else.

    Without its spec nobody knows which workers it should have. So none is created, started or removed.
    """
    actions: list[Action] = []
    deadlines: list[datetime] = []
    for worker in snapshot.workers:
        lease = worker.lease
        if lease is None or worker.slot in snapshot.busy:
            continue
        over = lease.ended(now)
        step: Action | datetime = lease.expires_at
        if over is not None:
            step = lease_end.wind_up(
                worker,
                lease,
                over,
                snapshot.observed.get(worker.slot),
                now,
                limits=limits,
                registered_until=snapshot.registered_until,
            )
        if isinstance(step, datetime):
            deadlines.append(step)
        else:
            actions.append(step)
    return Plan(tuple(actions), min(deadlines, default=None))


def stray_slots(
    observed: Iterable[Slot], workers: Iterable[Worker], busy: Iterable[Slot], unreadable: Iterable[Slot] = ()
) -> list[Slot]:
    """Slots in which something runs although they have no worker: the worker object was deleted.

    A worker that exists and cannot be read is there, so what runs in its slot is no stray.
    """
    return sorted(set(observed) - {w.slot for w in workers} - set(busy) - set(unreadable))


def _idle(
    worker: Worker, seen: Observation | None, pool: Pool, now: datetime, limits: FailureLimits
) -> Action | datetime | None:
    """The next step for a worker without a lease."""
    up = ready_observation(worker, seen)
    if up is None:
        return _start(worker, seen, None, pool, now, limits=limits)
    if up.protected:
        return SetProtection(worker, protected=False)
    return _status(worker, up, Phase.IDLE, now, worker.status.failures) or health_step(worker, up, now)


def _abandoned_in(worker: Worker, lease: Lease, snapshot: Snapshot, now: datetime) -> timedelta | None:
    """The time until a lease that no caller has ends, unless it is renewed; None: a caller has it, or it is over."""
    unchanged_for = snapshot.undelivered_for.get(lease.id)
    if unchanged_for is None or worker.undelivered is None or lease.ended(now):
        return None
    return UNDELIVERED_LIFE - unchanged_for


def _leased(
    worker: Worker,
    lease: Lease,
    seen: Observation | None,
    snapshot: Snapshot,
    now: datetime,
    *,
    limits: FailureLimits,
) -> Action | datetime | None:
    """The next step for a worker with a lease."""
    pool, over = snapshot.pool, lease.ended(now)
    if over is not None:
        return lease_end.wind_up(
            worker, lease, over, seen, now, limits=limits, registered_until=snapshot.registered_until
        )
    if worker.metadata.deletion_timestamp or pool.metadata.deletion_timestamp:
        deleted = "pool" if pool.metadata.deletion_timestamp else "worker"
        return LoseLease(worker, f"the {deleted} was deleted")
    # A lease that says that no caller has it yet is judged by that, and not by the clock of another machine.
    judged_by_time = not lease.token_sha256 and lease.undelivered is None
    token_deadline = lease.allocated_at + TOKEN_TIMEOUT if judged_by_time else None
    if token_deadline is not None and now >= token_deadline:
        return LoseLease(worker, "the request for it was never answered")
    up = ready_observation(worker, seen)
    if up is None:
        if worker.counted_failures >= limits.max_failures:
            return LoseLease(worker, worker.status.message)
        return _start(worker, seen, lease.owner, pool, now, limits=limits)
    failures = 0 if worker.status.phase is Phase.IDLE else worker.status.failures
    action = _prepare_for_holder(worker, lease.owner, up) or _status(worker, up, Phase.ALLOCATED, now, failures)
    step = action or health_step(worker, up, now, registered_until=snapshot.registered_until)
    if not isinstance(step, Action):
        end = lease_end.unused_until(worker, lease, now, registered_until=snapshot.registered_until)
        if end is not None and now >= end:
            step = LoseLease(worker, "nobody was connected to its worker", EndReason.ABANDONED)
        else:
            step = min(filter(None, (step, token_deadline, end, lease.expires_at)))
    return step


def _prepare_for_holder(worker: Worker, owner: str, up: Observation) -> Action | None:
    """What is missing until the cache belongs to the lease's owner and the worker is protected; None: nothing."""
    if up.cache_owner is None:
        return SetCacheOwner(worker, owner)
    if up.cache_owner != owner:
        return StartDaemon(worker, owner)
    return SetProtection(worker, protected=True) if up.protected is False else None


def _start(
    worker: Worker, seen: Observation | None, owner: str | None, pool: Pool, now: datetime, *, limits: FailureLimits
) -> Action | datetime:
    """Starts buildkitd where it does not run: at once after a reboot, after a growing pause where it failed."""
    if seen is not None and seen.state is DaemonState.EXITED and worker.status.endpoint is not None:
        log_tail = seen.log_tail if only_of_holder(worker, seen, pool.uid) else ""
        return WriteStatus(failed_worker(worker, seen.message, log_tail, now, limits))
    pause_ends = retry_at(worker, limits)
    if pause_ends is not None and now < pause_ends:
        return pause_ends
    return StartDaemon(worker, owner)


def _status(worker: Worker, seen: Observation, phase: Phase, now: datetime, failures: int) -> WriteStatus | None:
    """A status to write, if the stored one differs from what is seen."""
    status = worker.status
    wanted: dict[str, Any] = {
        "phase": phase,
        "endpoint": seen.endpoint,
        "cache_owner": seen.cache_owner,
        "ephemeral_cache": seen.ephemeral_cache,
        "pod_name": seen.pod_name,
        "pod_ip": seen.pod_ip,
    }
    if all(getattr(status, field) == value for field, value in wanted.items()):
        return None
    if seen.cache_owner != status.cache_owner:  # the log was deleted together with the old cache
        wanted["ended"] = tuple(past.but(log_tail="") for past in status.ended)
    ready_at = status.ready_at if status.endpoint is not None else now
    # It goes with a status that is written anyway: an upgrade that makes other digests writes nothing by itself.
    wanted["spec_digest"] = seen.spec_digest or None
    return WriteStatus(worker.with_status(**wanted, ready_at=ready_at, failures=failures, message="", log_tail=""))
