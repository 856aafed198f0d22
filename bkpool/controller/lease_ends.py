"""Writes the end of a lease: that it was lost, and then that it has left its worker.

It decides nothing. Every write is a compare-and-swap, and after a crash between two of them both can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import structlog

from bkpool.allocation.leases import lease_facts
from bkpool.core.cache_owner import history_ends_with_lease
from bkpool.core.errors import Conflict
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import FinishLease, LoseLease
from bkpool.core.reconcile.lease_end import with_lease_remembered, without_lease
from bkpool.core.worker import EndedLease, EndReason, Worker
from bkpool.store import Store
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror
from bkpool.workers import Daemons

log = structlog.get_logger(__name__)

_OLD_DEFINITION = (
    "The definition of BuildKitWorkers in the cluster is too old for `spec.ended`: each lease costs one more write. "
    "Apply this version's manifests."
)


class LeaseEnds:
    """Ends leases.

    Args:
        store: Where the workers are.
        mirror: Gets what was written.
        daemons: Clear the build history where the next holder may not read it.
        recorder: Gets an event for each lease that has left its worker.
        now: The clock.
    """

    def __init__(
        self, store: Store, mirror: Mirror, daemons: Daemons, recorder: Recorder, now: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._daemons = daemons
        self._recorder = recorder
        self._now = now

    async def lose(self, action: LoseLease) -> None:
        """Ends a lease that was not over."""
        worker, reason = action.worker, action.reason
        lost = worker.held_lease.but(ended_at=self._now(), end_reason=reason, end_message=action.message)
        self._mirror.apply(await self._store.replace(worker.with_lease(lost)))
        tell = log.error if reason is EndReason.LOST else log.info
        tell(f"lease.{reason.value}", **lease_facts(worker), reason=action.message)

    async def finish(self, action: FinishLease, pool: Pool) -> None:
        """Takes an ended lease off its worker and remembers it, in one write.

        What the next holder may not read is cleared before that: while the lease is on the worker, nobody gets it.
        """
        lease, ended = action.worker.held_lease, action.ended
        if history_ends_with_lease(lease.owner, pool.uid):
            await self._check_unchanged(action.worker)
            await self._daemons.clear_history(action.worker.slot)
        worker = await self._with_status_stored(action)
        worker = await self._store.replace(without_lease(with_lease_remembered(worker, ended, self._now())))
        self._mirror.apply(await self._kept_by_store(worker, ended))
        log.info("lease.ended", **lease_facts(action.worker), reason=ended.reason.value)
        message = ended.message or f"the lease of {lease.requested_by} has ended"
        if ended.reason is EndReason.REVOKED:
            message = f"the lease of {lease.requested_by} was revoked {ended.message}"
        warning = ended.reason is EndReason.LOST
        self._recorder.record(worker, ended.reason.value.capitalize(), message, warning=warning)

    async def _with_status_stored(self, action: FinishLease) -> Worker:
        """The worker with the status that it needs before the lease leaves it.

        That status has no log any more. So a log that the holder may read is remembered before it is written.
        """
        worker = action.worker
        if action.status is None:
            return worker
        if action.ended.log_tail:
            worker = await self._store.replace(with_lease_remembered(worker, action.ended, self._now()))
        return await self._store.replace_status(worker.but(status=action.status))

    async def _kept_by_store(self, worker: Worker, ended: EndedLease) -> Worker:
        """Remembers the lease in the status if the custom resource definition of an earlier version dropped it."""
        kept = any(past.token_sha256 == ended.token_sha256 for past in worker.spec.ended)
        if kept or worker.metadata.deletion_timestamp is not None:
            return worker
        log.warning("worker.old_definition", worker=str(worker.key), hint=_OLD_DEFINITION)
        remembered = with_lease_remembered(worker, ended, self._now())
        spec = remembered.spec
        return await self._store.replace_status(
            worker.with_status(
                ended=spec.ended, last_activity_at=spec.last_activity_at, allocation_count=spec.allocation_count
            )
        )

    async def _check_unchanged(self, worker: Worker) -> None:
        """Raises Conflict if the worker has changed: a gateway may have renewed its registration unseen."""
        current = await self._store.get(Worker, *worker.key)
        if current.metadata.resource_version != worker.metadata.resource_version:
            raise Conflict(f"{worker.key} has changed")
