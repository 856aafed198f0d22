"""The end of a lease: when it may leave its worker, and what the worker remembers of it.

A lease that has ended stays on its worker while a gateway may still have connections of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from bkpool.core.observation import DaemonState, Observation, ready_observation
from bkpool.core.reconcile.actions import Action, FinishLease, SetCacheOwner, StopDaemon, WriteStatus
from bkpool.core.reconcile.failures import FailureLimits, failed_worker
from bkpool.core.registrations import REGISTRATION_LIFE, Expiries, RegistrationKey, live_registrations
from bkpool.core.worker import EndedLease, EndReason, Lease, Phase, Worker

FIRST_USE_TIMEOUT = timedelta(minutes=2)
"""A lease that ends when it is unused ends so long after its worker is ready, if nobody has connected."""
REMEMBERED_LEASES = 16
"""Ended leases that a worker remembers, so that a client that comes too late learns why its lease ended."""


def unused_until(worker: Worker, lease: Lease, now: datetime, *, registered_until: Expiries) -> datetime | None:
    """When a running lease ends because nobody uses it; None for most leases, and while it is used.

    buildx makes several connections with pauses between them. So the lease goes on for the life of a registration
    (60 s) after the gateways said that they have no connection. A registration that has expired with connections
    proves nothing: its gateway, or the store, may have been away while the build went on. Such a lease ends by its
    ttl.
    """
    if not (lease.ends_when_unused and lease.token_sha256):
        return None
    entries = [entry for entry in worker.status.gateways if entry.lease_id == lease.id]
    if any(entry.connections for entry in entries):
        return None
    if entries:
        keys = (RegistrationKey(worker.key, entry.gateway, entry.lease_id) for entry in entries)
        return max(registered_until.get(key, now + REGISTRATION_LIFE) for key in keys)
    return max(lease.allocated_at, worker.status.ready_at or lease.allocated_at) + FIRST_USE_TIMEOUT


def wind_up(
    worker: Worker,
    lease: Lease,
    reason: EndReason,
    seen: Observation | None,
    now: datetime,
    *,
    limits: FailureLimits,
    registered_until: Expiries,
) -> Action | datetime:
    """The next step for a lease that has ended.

    Args:
        worker: The worker that the lease is on.
        lease: The lease.
        reason: Why it ended.
        seen: What the runtime sees in the worker's slot.
        now: The time.
        limits: Apply if the worker failed meanwhile.
        registered_until: When the registrations of gateways expire.

    Returns:
        An action, or the time at which the last gateway registration expires.
    """
    if reason is EndReason.REVOKED and seen is not None and seen.state is not DaemonState.EXITED:
        # Gateways cut the connections, but one that is frozen cuts none, and in a rootless pod a process that a step
        # left behind outlives its build (docs/decisions/0019-revoked-leases.md).
        return StopDaemon(worker)
    if _used_without_owner(worker, seen):
        # The holder did not have to wait for this mark. The next holder needs it: their cache must be another one.
        return SetCacheOwner(worker, lease.owner)
    live = live_registrations(worker, registered_until, now)
    registered = [expires_at for entry, expires_at in live if entry.lease_id == lease.id]
    if not registered:
        return _leave(worker, lease, reason, seen, now, limits=limits)
    if worker.status.phase is not Phase.DRAINING:
        if reason is EndReason.LOST:  # its clients are still told why, with the log
            return WriteStatus(worker.with_status(phase=Phase.DRAINING))
        builds = "its builds were stopped" if reason is EndReason.REVOKED else "builds may finish"
        message = f"the lease is {reason}; {builds}"
        return WriteStatus(worker.with_status(phase=Phase.DRAINING, message=message, log_tail=""))
    return min(registered)


def _leave(
    worker: Worker,
    lease: Lease,
    reason: EndReason,
    seen: Observation | None,
    now: datetime,
    *,
    limits: FailureLimits,
) -> Action:
    """The next step for a lease that has ended, and of which no connection is left. The arguments are `wind_up`'s."""
    up = ready_observation(worker, seen)
    if up is not None and (up.outdated or up.reaches_other) and not worker.metadata.deletion_timestamp:
        # While the lease is on the worker, nobody else gets this daemon. And nobody gets a worker that is being
        # deleted: the end of its pod may wait for builds that other gateways still relay, and the lease need not.
        return StopDaemon(worker)
    if seen is not None and seen.state is DaemonState.EXITED and worker.status.endpoint is not None:
        # It exited during this lease. The next holder must not find this exit, nor the log of these builds.
        worker = failed_worker(worker, seen.message, "", now, limits)
    return _finish(worker, lease, reason, up)


def _finish(worker: Worker, lease: Lease, reason: EndReason, up: Observation | None) -> FinishLease:
    if up:
        # Write cache_owner together with the lease's end. Otherwise the next lease could be routed here before the
        # owner is known.
        worker = worker.with_status(cache_owner=up.cache_owner)
    ended = EndedLease(
        token_sha256=lease.token_sha256,
        ended_at=lease.over_since(),
        reason=reason,
        message=lease.end_message,
        log_tail=worker.status.log_tail if reason is EndReason.LOST else "",
    )
    down = Phase.FAILED if worker.status.failures else Phase.PENDING
    return FinishLease(worker, ended, Phase.IDLE if up else down)


def _used_without_owner(worker: Worker, seen: Observation | None) -> bool:
    """Whether the worker has a cache that may have been used but has no owner yet. It need not be ready now."""
    if seen is None or seen.worker_uid != worker.uid or seen.state is DaemonState.EXITED:
        return False
    return seen.ephemeral_cache and seen.cache_owner is None


def with_lease_remembered(action: FinishLease, now: datetime) -> Worker:
    """The worker with the ended lease in its status. The lease is still in its spec, to be taken off afterwards.

    It is idempotent: a crash between the two writes repeats this one.
    """
    status = action.worker.status
    known = any(past.token_sha256 == action.ended.token_sha256 for past in status.ended)
    # A failed worker goes on saying why. Earlier versions stored the log below the first line of the message.
    has_reason = action.ended.reason is EndReason.LOST or status.phase is not Phase.DRAINING
    failed = action.phase is Phase.FAILED and has_reason
    earlier = tuple(past.but(log_tail="") for past in status.ended)
    return action.worker.with_status(
        phase=action.phase,
        last_activity_at=now,
        allocation_count=status.allocation_count + (not known),
        gateways=(),
        ended=status.ended if known else (*earlier, action.ended)[-REMEMBERED_LEASES:],
        message=status.message.partition("\n")[0] if failed else "",
        log_tail="",
    )
