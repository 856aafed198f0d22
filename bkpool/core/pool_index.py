"""The workers of one pool in the orders in which allocation looks for one, kept from change to change. Pure.

`placement` and `queueing` read it, so that a choice costs the same with ten workers and with thousands. It decides
nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import count

from bkpool.core.live_leases import LiveLeases
from bkpool.core.names import Slot
from bkpool.core.reconcile.empty_slots import EmptySlots
from bkpool.core.reconcile.pool_counts import WorkerCounts
from bkpool.core.worker import Phase, Worker

_NEVER_USED = datetime.min.replace(tzinfo=UTC)


class PoolIndex:
    """The workers that can be read. Of two that are alike in an order, the one that has changed first is first."""

    def __init__(self) -> None:
        self.workers: dict[Slot, Worker] = {}
        self.leases = LiveLeases()
        self.counts = WorkerCounts()
        self._idle = _ByUse()
        self._idle_of: defaultdict[str | None, _ByUse] = defaultdict(_ByUse)
        """By the owner of the cache; None: never used."""
        self._starting: dict[Slot, Worker] = {}
        self._failed: dict[Slot, Worker] = {}
        self._empty = EmptySlots(0)
        self._changes = count()
        self._changed: dict[Slot, int] = {}
        """By slot: the number of its worker's last change."""

    def put(self, slot: Slot, worker: Worker | None) -> None:
        """Takes over the slot's worker as it is now; None: it has none, or one that cannot be read."""
        before = self.workers.pop(slot, None)
        if before is not None:
            self.counts.add(before, -1)
            self._take_out(slot, before)
        if worker is not None:
            self.workers[slot] = worker
            self.counts.add(worker)
            self._changed[slot] = next(self._changes)
            self._put_in(slot, worker)
        self.leases.put(slot, worker)
        self._empty.put(slot.number, filled=worker is not None)

    def idle_of(self, owner: str | None) -> Iterator[Worker]:
        """Idle workers with this owner's cache, or never used ones; the least recently used first."""
        return iter(self._idle_of[owner]) if owner in self._idle_of else iter(())

    def last_idle_of(self, owner: str) -> Iterator[Worker]:
        """Idle workers with this owner's cache, the most recently used first."""
        return reversed(self._idle_of[owner]) if owner in self._idle_of else iter(())

    def idle(self) -> Iterator[Worker]:
        """All idle workers, the least recently used first."""
        return iter(self._idle)

    def starting(self) -> Iterable[Worker]:
        """The workers without a lease that are starting."""
        return self._starting.values()

    def failed(self) -> Iterable[Worker]:
        """The workers without a lease that have failed."""
        return self._failed.values()

    def empty_slots(self, limit: int) -> EmptySlots:
        """The slots below the pool's maximum without a worker that can be read."""
        self._empty.resize(limit)
        return self._empty

    def _put_in(self, slot: Slot, worker: Worker) -> None:
        if not _is_free(worker):
            return
        phase = worker.phase
        if phase is Phase.IDLE and worker.status.silent_since is None:
            self._idle.add(worker, self._changed[slot])
            self._idle_of[worker.status.cache_owner].add(worker, self._changed[slot])
        elif phase is Phase.PENDING:
            self._starting[slot] = worker
        elif phase is Phase.FAILED:
            self._failed[slot] = worker

    def _take_out(self, slot: Slot, worker: Worker) -> None:
        changed, owner = self._changed.pop(slot), worker.status.cache_owner
        self._starting.pop(slot, None)
        self._failed.pop(slot, None)
        if _is_free(worker) and worker.phase is Phase.IDLE and worker.status.silent_since is None:
            self._idle.remove(worker, changed)
            self._idle_of[owner].remove(worker, changed)
            if not self._idle_of[owner]:
                del self._idle_of[owner]


class _ByUse:
    """Workers, the least recently used first."""

    def __init__(self) -> None:
        self._workers: list[tuple[datetime, int, Worker]] = []

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return (worker for _, _, worker in self._workers)

    def __reversed__(self) -> Iterator[Worker]:
        return (worker for _, _, worker in reversed(self._workers))

    def add(self, worker: Worker, changed: int) -> None:
        insort(self._workers, (last_used(worker), changed, worker))

    def remove(self, worker: Worker, changed: int) -> None:
        place = (last_used(worker), changed)
        del self._workers[bisect_left(self._workers, place, key=lambda entry: entry[:2])]


def last_used(worker: Worker) -> datetime:
    """When the worker last had a lease; the earliest possible time if it never had one."""
    return worker.last_activity_at or _NEVER_USED


def _is_free(worker: Worker) -> bool:
    """Whether it has no lease and is not being deleted."""
    return worker.lease is None and not worker.metadata.deletion_timestamp
