"""Waits until a leased worker is ready for its caller, or until its lease has ended before that.

It reads the copy in memory and asks the worker. It makes no lease, and starts and ends nothing.
"""

from __future__ import annotations

import asyncio

from bkpool.allocation.known_objects import known_worker
from bkpool.allocation.leases import lease_over
from bkpool.allocation.presence import Presence
from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.core.names import Key
from bkpool.core.worker import EndReason, Lease, Worker
from bkpool.store.mirror import Mirror, MirrorChange

_GIVEN_UP = (EndReason.ABANDONED, EndReason.RELEASED)
"""The ends of a lease after which its job may have a new one."""


class LeasedWorkers:
    """The workers that requests of this replica wait for.

    Args:
        mirror: The copy in memory.
        presence: Asks a worker whether it answers.
    """

    def __init__(self, mirror: Mirror, presence: Presence) -> None:
        self._mirror = mirror
        self._presence = presence
        self._changed: dict[Key, asyncio.Event] = {}
        """For each pool that somebody waits for: set by its next change."""
        self.close = mirror.subscribe(self._on_change)

    async def until_ready(self, worker: Worker) -> Worker | None:
        """Waits until the leased worker is ready. An idle one is ready at once; the controller starts any other.

        Returns:
            The worker; None if another request of the same job has given the lease up, or its holder has released it.

        Raises:
            WorkerFailed: The lease has ended.
            Gone: It was revoked.
            UnreadableObject: The worker cannot be read any more.
        """
        while True:
            event = self._changed.setdefault(worker.pool, asyncio.Event())
            current = known_worker(self._mirror, worker.key)
            ended = _ended_lease(current, worker.held_lease)
            if ended is not None:
                if ended.end_reason in _GIVEN_UP:
                    return None
                raise _error_of(worker, ended)
            if current and current.routable_endpoint is not None and await self._presence.of(current):
                return current
            await event.wait()

    def _on_change(self, change: MirrorChange) -> None:
        event = self._changed.pop(change.pool, None)
        if event is not None:
            event.set()


def _error_of(worker: Worker, ended: Lease) -> BkpoolError:
    if ended.end_reason is EndReason.REVOKED:
        return lease_over(EndReason.REVOKED, ended.end_message)
    return WorkerFailed(
        f"{worker.key.name} did not start: {ended.end_message or 'its lease ended before it was ready'}",
        hint=f"Look at `bkpool logs {worker.key.name}`, and run `bkpool doctor`.",
    )


def _ended_lease(worker: Worker | None, lease: Lease) -> Lease | None:
    """The lease with the reason for its end, as its worker remembers it; None while it runs."""
    if worker is None:
        return lease.but(end_message="the worker was removed while it was being prepared")
    if worker.lease is not None and worker.lease.id == lease.id:
        return worker.lease.but(end_message=worker.lease_end_message) if worker.lease.ended_at is not None else None
    past = next((ended for ended in worker.ended_leases if ended.token_sha256 == lease.token_sha256), None)
    return lease.but(end_reason=past.reason, end_message=past.message_with_log) if past else lease
