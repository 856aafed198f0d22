"""What a person is shown of a worker: its phase and message follow from the lease, and the stored ones may be older.

A status is written later than its lease, so it may still tell of the lease before. What it says of that one is never
shown to the next holder.
"""

from __future__ import annotations

from datetime import datetime

from bkpool.core.worker import EndReason, Lease, Phase, Worker

_READY = frozenset({Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING})


def shown_phase(worker: Worker, now: datetime) -> Phase:
    """The phase of a worker. With a lease, it need not be stored yet."""
    lease, phase = worker.lease, worker.phase
    if lease is None or phase not in _READY:
        return phase
    if lease.ended(now):
        return Phase.DRAINING
    return Phase.PROVISIONING if worker.routable_endpoint is None else Phase.ALLOCATED


def shown_message(worker: Worker, now: datetime) -> str:
    """What happened, followed by the end of the log where there is one."""
    if worker.status.phase is not Phase.DRAINING:
        return worker.status.message_with_log
    lease = worker.lease
    reason = lease.ended(now) if lease is not None else None
    if lease is None or reason is None:  # it tells how the lease before ended
        return ""
    return _of_lost(worker, lease) if reason is EndReason.LOST else draining_message(reason)


def wait_message(worker: Worker) -> str:
    """Why a live lease cannot be used yet, as far as its worker says so."""
    return "" if worker.status.phase is Phase.DRAINING else worker.status.message_with_log


def draining_message(reason: EndReason) -> str:
    """What is said of a lease that has ended and may have connections. One that was lost says why instead."""
    builds = "its builds were stopped" if reason is EndReason.REVOKED else "builds may finish"
    return f"the lease is {reason}; {builds}"


def _of_lost(worker: Worker, lease: Lease) -> str:
    """Why the lease was lost. A status that tells of a failure in another lease does not say it."""
    return worker.status.message_with_log if worker.status.failures_of == lease.id else lease.end_message
