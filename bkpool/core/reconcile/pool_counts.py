"""What a pool's status says of its workers in numbers, kept from change to change. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from datetime import datetime

from bkpool.core.names import Slot
from bkpool.core.reconcile.due_times import DueTimes
from bkpool.core.registrations import Expiries, live_registrations
from bkpool.core.worker import Phase, Worker


@dataclass(slots=True)
class WorkerCounts:
    """How many workers there are in all, and how many of them are ready, idle and leased."""

    workers: int = 0
    ready: int = 0
    idle: int = 0
    allocated: int = 0

    def add(self, worker: Worker, times: int = 1) -> None:
        """Counts one worker; with -1, does not count it any more."""
        ready = worker.status.endpoint is not None and worker.status.silent_since is None
        self.workers += times
        self.ready += times * ready
        self.idle += times * (ready and worker.lease is None and worker.phase is Phase.IDLE)
        self.allocated += times * (worker.lease is not None)


class PoolCounts:
    """The same for one pool, with its open connections, its failed workers, and when its last lease ended."""

    def __init__(self) -> None:
        self.workers = WorkerCounts()
        self._counted: dict[Slot, Worker] = {}
        self._failed: dict[Slot, Worker] = {}
        self._ends: list[tuple[datetime, Slot]] = []
        self._connections: dict[Slot, int] = {}
        self._all_connections = 0
        self._expiries: DueTimes[Slot] = DueTimes()
        self._uncounted: set[Slot] = set()
        """Slots whose connections must be counted again."""

    def put(self, slot: Slot, worker: Worker | None) -> None:
        """Takes note of the slot's worker as it is now; None: it has none."""
        before = self._counted.pop(slot, None)
        if before is not None:
            self.workers.add(before, -1)
            self._failed.pop(slot, None)
            if (end := before.last_activity_at) is not None:
                del self._ends[bisect_left(self._ends, (end, slot))]
        if worker is not None:
            self._counted[slot] = worker
            self.workers.add(worker)
            if worker.phase is Phase.FAILED:
                self._failed[slot] = worker
            if (end := worker.last_activity_at) is not None:
                insort(self._ends, (end, slot))
        if slot in self._connections or (worker is not None and worker.status.gateways):
            self._uncounted.add(slot)

    def count_again(self, slot: Slot) -> None:
        """Notes that a gateway may have another number of connections to the slot's worker."""
        self._uncounted.add(slot)

    @property
    def last_end(self) -> datetime | None:
        """When the last lease left one of the workers; None: none of them ever had one."""
        return self._ends[-1][0] if self._ends else None

    @property
    def failed(self) -> Worker | None:
        """The failed worker of the lowest slot."""
        return self._failed[min(self._failed)] if self._failed else None

    def connections(self, registered_until: Expiries, now: datetime) -> int:
        """How many connections of leases are open, as far as registrations that have not expired tell."""
        again, self._uncounted = self._uncounted | self._expiries.due(now), set()
        for slot in again:
            self._all_connections -= self._connections.pop(slot, 0)
            worker = self._counted.get(slot)
            live = live_registrations(worker, registered_until, now) if worker is not None else []
            self._expiries.put(slot, min((expires_at for _, expires_at in live), default=None))
            if live:
                self._connections[slot] = sum(registered_until.connections(entry) for entry, _ in live)
                self._all_connections += self._connections[slot]
        return self._all_connections
