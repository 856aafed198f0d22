"""The end of a lease: when it may leave its worker, and what the worker remembers of it.

A lease that has ended stays on its worker while a gateway may still have connections of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from bkpool.core.names import LABEL_REQUEST
from bkpool.core.observation import DaemonState, Observation, ready_observation
from bkpool.core.reconcile.actions import Action, FinishLease, SetCacheOwner, StopDaemon, WriteStatus
from bkpool.core.reconcile.failures import FailureLimits, failed_worker
from bkpool.core.registrations import REGISTRATION_LIFE, Expiries, RegistrationKey, live_registrations
from bkpool.core.shown_worker import draining_message
from bkpool.core.worker import (
    REMEMBERED_LEASES,
    EndedLease,
    EndReason,
    GatewayRegistration,
    Lease,
    Phase,
    Worker,
    WorkerStatus,
)

FIRST_USE_TIMEOUT = timedelta(minutes=2)
"""A lease that ends when it is unused ends so long after its worker is ready, if nobody has connected."""


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
    draining_at: datetime,
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
        draining_at: When it may be written that the worker is draining.

    Returns:
        An action, or the time at which there may be one.
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
    if worker.status.phase is Phase.DRAINING:
        return min(registered)
    return _draining(worker, reason) if now >= draining_at else min(draining_at, *registered)


def _draining(worker: Worker, reason: EndReason) -> WriteStatus:
    """Notes that connections of a lease that has ended may be left."""
    if reason is EndReason.LOST:  # its clients are still told why, with the log
        return WriteStatus(worker.with_status(phase=Phase.DRAINING))
    message = draining_message(reason)
    return WriteStatus(worker.with_status(phase=Phase.DRAINING, message=message, log_tail=""))


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
    failed = worker
    if seen is not None and seen.state is DaemonState.EXITED and worker.status.endpoint is not None:
        # It exited during this lease. The next holder must not find this exit, nor the log of these builds.
        failed = failed_worker(worker, seen.message, "", now, limits)
    ended = EndedLease(
        token_sha256=lease.token_sha256,
        ended_at=lease.over_since(),
        reason=reason,
        message=lease.end_message,
        log_tail=failed.status.log_tail if reason is EndReason.LOST else "",
    )
    return FinishLease(worker, ended, _status_before(worker, failed, reason, up))


def _status_before(worker: Worker, failed: Worker, reason: EndReason, up: Observation | None) -> WorkerStatus | None:
    """The status that must be stored before a lease leaves its worker; None: the stored one will do.

    Nobody may get the worker as idle if it is not ready, nor before the owner of its cache is known, nor read the log
    of these builds. Everything else of the status may follow.

    Args:
        worker: The worker as it is stored.
        failed: The same, with an exit that happened during this lease.
        reason: Why the lease ended.
        up: What the runtime sees of its daemon, if that is ready.
    """
    status = failed.status
    owner = up.cache_owner if up else status.cache_owner
    ended = only_in_status(worker, log_of=worker.held_lease.token_sha256)
    has_log = status.log_tail or "\n" in status.message  # earlier versions stored it below the message's first line
    has_log = has_log or any(past.log_tail and past not in ended for past in status.ended)
    says_ready = up is None and status.phase in {Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING}
    if failed is worker and owner == status.cache_owner and not has_log and not says_ready:
        return None
    down = Phase.FAILED if status.failures else Phase.PENDING
    phase = Phase.IDLE if up else down
    # A failed worker goes on saying why.
    has_reason = reason is EndReason.LOST or status.phase is not Phase.DRAINING
    message = status.message.partition("\n")[0] if phase is Phase.FAILED and has_reason else ""
    return status.but(phase=phase, cache_owner=owner, message=message, log_tail="", gateways=(), ended=ended)


def _used_without_owner(worker: Worker, seen: Observation | None) -> bool:
    """Whether the worker has a cache that may have been used but has no owner yet. It need not be ready now."""
    if seen is None or seen.worker_uid != worker.uid or seen.state is DaemonState.EXITED:
        return False
    return seen.ephemeral_cache and seen.cache_owner is None


def with_lease_remembered(worker: Worker, ended: EndedLease, now: datetime) -> Worker:
    """The worker with the ended lease in its spec, beside the leases that ended before it. Their logs are forgotten.

    A lease that is remembered already stays as it is: it was written together with the log, which may be gone now.
    """
    earlier = worker.ended_leases
    known = next((past for past in earlier if past.token_sha256 == ended.token_sha256), None)
    others = tuple(past.but(log_tail="") if past.log_tail else past for past in earlier if past is not known)
    spec = worker.spec.but(
        ended=(*others, known or ended)[-REMEMBERED_LEASES:],
        last_activity_at=now,
        allocation_count=worker.allocation_count + (known is None),
    )
    return worker.but(spec=spec)


def only_in_status(worker: Worker, *, log_of: str) -> tuple[EndedLease, ...]:
    """What the status remembers since an earlier version wrote it, and the spec does not; with one log at most.

    Args:
        worker: The worker.
        log_of: The digest of the token of the lease whose log is kept; empty: none.
    """
    known = {past.token_sha256 for past in worker.spec.ended}
    return tuple(
        past if past.token_sha256 == log_of else past.but(log_tail="")
        for past in worker.status.ended
        if past.token_sha256 not in known
    )


def registrations_that_count(
    worker: Worker, now: datetime, registered_until: Expiries
) -> tuple[GatewayRegistration, ...]:
    """The registrations for the worker's lease, and those of other leases that have not expired."""
    live = [entry for entry, _ in live_registrations(worker, registered_until, now)]
    lease_id = worker.lease.id if worker.lease is not None else None
    return tuple(entry for entry in worker.status.gateways if entry.lease_id == lease_id or entry in live)


def without_lease(worker: Worker) -> Worker:
    """The worker without its lease, and without the label of the request for it."""
    labels = {key: value for key, value in worker.metadata.labels.items() if key != LABEL_REQUEST}
    return worker.but(metadata=worker.metadata.but(labels=labels)).with_lease(None)


def without_logs(worker: Worker) -> Worker:
    """The worker that remembers its ended leases without the logs of those that were lost."""
    return worker.but(spec=worker.spec.but(ended=tuple(past.but(log_tail="") for past in worker.spec.ended)))
