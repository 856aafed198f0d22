"""A worker whose buildkitd failed: what is written about it, and when it is started again.

The caller supplies the time and stores the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from bkpool.core.cache_owner import history_ends_with_lease
from bkpool.core.observation import Observation
from bkpool.core.worker import Phase, Worker

_COUNTED_FAILURES = 20
"""The count stops here: the pause has long reached its maximum."""


@dataclass(frozen=True, slots=True)
class FailureLimits:
    """How often, and after which pauses, a worker that failed is started again."""

    max_failures: int = 5
    """Failures in a row after which a lease is lost (rule 4, docs/rules.md#r4)."""
    stable_after: timedelta = timedelta(minutes=1)
    """A worker that was ready for this long starts to count its failures from the beginning."""
    backoff: timedelta = timedelta(milliseconds=500)
    """The pause after the first failure. It doubles with each further one."""
    backoff_max: timedelta = timedelta(minutes=2)


DEFAULT_LIMITS = FailureLimits()


def only_of_holder(worker: Worker, seen: Observation, pool_uid: str) -> bool:
    """Whether the log of a daemon that exited can only have output of the present holder's builds.

    It may be the log of an earlier holder's builds although the worker has a lease again: then the cache still has
    the earlier owner, or the whole pool owns it.
    """
    owners = {worker.status.cache_owner, seen.cache_owner} - {None}
    if worker.lease is None:
        return not owners
    return owners <= {worker.lease.owner} and not history_ends_with_lease(worker.lease.owner, pool_uid)


NO_REASON = "its buildkitd ended, and nothing said why"
"""What is said of a failure without a message."""


def failed_worker(
    worker: Worker, message: str, log_tail: str, now: datetime, limits: FailureLimits = DEFAULT_LIMITS
) -> Worker:
    """The worker with one failure more.

    Everybody with access to the worker reads its status, and the log tail may contain output of the last holder's
    build. So it is kept while they hold the worker, and left out after their lease. A worker whose cache was never
    used has run no build, so its log tail is kept as well.

    Args:
        worker: The worker as it is stored.
        message: What happened, without text from buildkitd's log.
        log_tail: The last lines of buildkitd's log; empty if there are none.
        now: The time.
        limits: Say when a worker was stable.
    """
    lease, ready_at = worker.lease, worker.status.ready_at
    used_by_an_earlier_holder = lease is None and worker.status.cache_owner is not None
    was_stable = worker.status.endpoint is not None and ready_at is not None and now - ready_at >= limits.stable_after
    return worker.with_status(
        phase=Phase.FAILED if lease is None else Phase.PROVISIONING,
        endpoint=None,
        pod_ip=None,
        silent_since=None,
        failures=1 if was_stable else min(worker.counted_failures + 1, _COUNTED_FAILURES),
        failures_of="" if lease is None else lease.id,
        failed_at=now,
        message=message.strip() or NO_REASON,
        log_tail="" if used_by_an_earlier_holder else log_tail,
    )


def retry_at(worker: Worker, limits: FailureLimits = DEFAULT_LIMITS) -> datetime | None:
    """When a failed worker may be started again; None: at once.

    It is started at once if it has not failed since it was last stable, or not in the lease that it has now.
    """
    failed_at, failures = worker.status.failed_at, worker.counted_failures
    if failed_at is None or not failures:
        return None
    return failed_at + min(limits.backoff * (1 << (failures - 1)), limits.backoff_max)
