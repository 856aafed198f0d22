"""What to do next for one worker, or for the slot that it is in. Pure.

What concerns the pool as a whole (how many workers, which caches, which daemons are replaced) is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from bkpool.core.durations import render
from bkpool.core.observation import MOST_RESTARTS, MOST_STARTS, DaemonState, Observation, ready_observation
from bkpool.core.pool import Pool
from bkpool.core.reconcile import lease_end
from bkpool.core.reconcile.actions import (
    Action,
    ForgetLogs,
    LoseLease,
    SetCacheOwner,
    SetProtection,
    StartDaemon,
    WriteStatus,
)
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, FailureLimits, failed_worker, only_of_holder, retry_at
from bkpool.core.reconcile.health import health_step
from bkpool.core.reconcile.later_writes import DEFAULT_PAUSES, NONE_NOTED, LeaseSince, WritePauses, due_at
from bkpool.core.reconcile.undelivered import LONGEST_STEP, NONE_UNDELIVERED, UndeliveredFor
from bkpool.core.registrations import NONE_SEEN, Expiries
from bkpool.core.worker import UNDELIVERED_LIFE, EndReason, Lease, Phase, Worker

TOKEN_TIMEOUT = timedelta(minutes=1)
"""A lease of an earlier version that has no token after this time never gets one: who was creating it was killed."""

_NOT_DELIVERED = f"its answer did not reach its caller, and nobody used it for {render(UNDELIVERED_LIFE)}"


_READY = frozenset({Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING})
"""The phases of a worker that is ready. Which of them it is, the lease tells as well."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The time, and what depends on it."""

    now: datetime
    registered_until: Expiries = field(default_factory=lambda: NONE_SEEN)
    """When the registrations of gateways expire, on the clock of the one who decides. A missing one is valid."""
    undelivered_for: UndeliveredFor = field(default_factory=lambda: NONE_UNDELIVERED)
    """For each lease that no caller is known to have: for how long the controller has seen it unchanged."""
    restarts_left: int = MOST_RESTARTS
    """How many outdated daemons may be replaced now, beside the starts and stops of all pools that are under way."""
    limits: FailureLimits = DEFAULT_LIMITS
    """Apply to workers that fail."""
    lease_since: LeaseSince = field(default_factory=lambda: NONE_NOTED)
    """Since when each worker has the lease that it has, or none. What is missing has been so for long."""
    pauses: WritePauses = DEFAULT_PAUSES
    """How long it must be so until it is written."""
    starts_left: int = MOST_STARTS
    """How many workers without a lease may begin to start now, beside the starts of all pools that are under way."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now, and when to look again if nothing changes before."""

    action: Action | None
    look_again_at: datetime | None = None


NO_STEP = Step(None)


def next_step(worker: Worker, seen: Observation | None, pool: Pool, moment: Moment) -> Step:
    """The next step for a worker that is to stay."""
    lease = worker.lease
    if lease is None:
        return _step(_idle(worker, seen, pool, moment))
    abandoned_in = _abandoned_in(worker, lease, moment)
    if abandoned_in is not None and abandoned_in <= timedelta(0):
        return Step(LoseLease(worker, _NOT_DELIVERED, EndReason.ABANDONED))
    step = _step(_leased(worker, lease, seen, pool, moment))
    if abandoned_in is None:
        return step
    at = moment.now + min(abandoned_in, LONGEST_STEP)
    return Step(step.action, min(at, step.look_again_at or at))


def wind_up_step(worker: Worker, seen: Observation | None, moment: Moment) -> Step:
    """The next step for a worker of a pool that cannot be read: a lease that has ended leaves it, and it is idle."""
    lease = worker.lease
    if lease is None:
        up = ready_observation(worker, seen)
        is_stale = worker.phase is Phase.IDLE and worker.status.phase is not Phase.IDLE
        return NO_STEP if up is None or not is_stale else _step(_status(worker, up, Phase.IDLE, moment))
    over = lease.ended(moment.now)
    return Step(None, lease.expires_at) if over is None else _step(_over(worker, lease, over, seen, moment))


def _step(found: Action | datetime | None) -> Step:
    if found is None:
        return NO_STEP
    return Step(None, found) if isinstance(found, datetime) else Step(found)


def _idle(worker: Worker, seen: Observation | None, pool: Pool, moment: Moment) -> Action | datetime | None:
    """The next step for a worker without a lease."""
    now = moment.now
    up = ready_observation(worker, seen)
    if up is None:
        return _start(worker, seen, None, pool, moment)
    return _first(
        _status(worker, up, Phase.IDLE, moment),
        health_step(worker, up, now),
        _unprotect(worker, up, moment) if up.protected else None,
    )


def _abandoned_in(worker: Worker, lease: Lease, moment: Moment) -> timedelta | None:
    """The time until a lease that no caller has ends, unless it is renewed; None: a caller has it, or it is over."""
    unchanged_for = moment.undelivered_for.get(lease.id)
    if unchanged_for is None or worker.undelivered is None or lease.ended(moment.now):
        return None
    return UNDELIVERED_LIFE - unchanged_for


def _over(
    worker: Worker, lease: Lease, reason: EndReason, seen: Observation | None, moment: Moment
) -> Action | datetime:
    """The next step for a worker whose lease has ended."""
    return lease_end.wind_up(
        worker,
        lease,
        reason,
        seen,
        moment.now,
        limits=moment.limits,
        registered_until=moment.registered_until,
        draining_at=due_at(worker, moment.lease_since, moment.pauses.phase),
    )


def _leased(
    worker: Worker, lease: Lease, seen: Observation | None, pool: Pool, moment: Moment
) -> Action | datetime | None:
    """The next step for a worker with a lease."""
    now = moment.now
    over = lease.ended(now)
    if over is not None:
        return _over(worker, lease, over, seen, moment)
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
        if worker.counted_failures >= moment.limits.max_failures:
            return LoseLease(worker, worker.status.message)
        return _start(worker, seen, lease.owner, pool, moment)
    step = _prepare_for_holder(worker, lease.owner, up) or _first(
        _status(worker, up, Phase.ALLOCATED, moment),
        health_step(worker, up, now, registered_until=moment.registered_until),
        SetProtection(worker, protected=True) if up.protected is False else None,
    )
    if not isinstance(step, Action):
        end = lease_end.unused_until(worker, lease, now, registered_until=moment.registered_until)
        if end is not None and now >= end:
            step = LoseLease(worker, "nobody was connected to its worker", EndReason.ABANDONED)
        else:
            step = min(filter(None, (step, token_deadline, end, lease.expires_at)))
    return step


def _prepare_for_holder(worker: Worker, owner: str, up: Observation) -> Action | None:
    """What is missing until the cache belongs to the lease's owner; None: nothing."""
    if up.cache_owner is None:
        return SetCacheOwner(worker, owner)
    return StartDaemon(worker, owner) if up.cache_owner != owner else None


def _unprotect(worker: Worker, up: Observation, moment: Moment) -> Action | datetime:
    """Ends the protection of a worker without a lease, unless it has another lease soon."""
    due = due_at(worker, moment.lease_since, moment.pauses.protected)
    return SetProtection(worker, protected=False) if up.goes_unprotected or moment.now >= due else due


def _first(*steps: Action | datetime | None) -> Action | datetime | None:
    """The first of these that is an action; else the earliest of the times."""
    earliest: datetime | None = None
    for step in steps:
        if isinstance(step, datetime):
            earliest = step if earliest is None else min(step, earliest)
        elif step is not None:
            return step
    return earliest


def _start(
    worker: Worker, seen: Observation | None, owner: str | None, pool: Pool, moment: Moment
) -> Action | datetime:
    """Starts buildkitd where it does not run: at once after a reboot, after a growing pause where it failed."""
    now, limits = moment.now, moment.limits
    if seen is not None and seen.state is DaemonState.EXITED and worker.status.endpoint is not None:
        log_tail = seen.log_tail if only_of_holder(worker, seen, pool.uid) else ""
        return WriteStatus(failed_worker(worker, seen.message, log_tail, now, limits))
    pause_ends = retry_at(worker, limits)
    if pause_ends is not None and now < pause_ends:
        return pause_ends
    return StartDaemon(worker, owner)


def _status(worker: Worker, seen: Observation, phase: Phase, moment: Moment) -> Action | datetime | None:
    """A status to write, if the stored one differs from what is seen. If only its phase does, it is written later."""
    status = worker.status
    stored = (status.endpoint, status.cache_owner, status.ephemeral_cache, status.pod_name, status.pod_ip)
    found = (seen.endpoint, seen.cache_owner, seen.ephemeral_cache, seen.pod_name, seen.pod_ip)
    if stored == found:
        if status.phase is phase:
            return None
        due = due_at(worker, moment.lease_since, moment.pauses.phase)
        if moment.now < due and status.phase in _READY:
            return due
    wanted: dict[str, Any] = dict(
        zip(("endpoint", "cache_owner", "ephemeral_cache", "pod_name", "pod_ip"), found, strict=True)
    )
    if seen.cache_owner != status.cache_owner:  # the log was deleted together with the old cache
        if any(past.log_tail for past in worker.spec.ended):
            return ForgetLogs(worker)
        log_of = ""
    else:
        log_of = worker.ended_leases[-1].token_sha256 if status.ended else ""
    wanted["ended"] = lease_end.only_in_status(worker, log_of=log_of)
    wanted["gateways"] = lease_end.registrations_that_count(worker, moment.now, moment.registered_until)
    wanted["ready_at"] = status.ready_at if status.endpoint is not None else moment.now
    wanted["failures"] = worker.counted_failures
    # These go with a status that is written anyway. An upgrade that makes other digests writes nothing by itself.
    wanted["spec_digest"] = seen.spec_digest or None
    wanted["last_activity_at"], wanted["allocation_count"] = worker.last_activity_at, worker.allocation_count
    return WriteStatus(worker.with_status(**wanted, phase=phase, message="", log_tail=""))
