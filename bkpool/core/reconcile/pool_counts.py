"""What a pool's status says of its workers in numbers, kept from change to change. Pure."""

from __future__ import annotations

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
        status, leased = worker.status, worker.lease is not None
        ready = status.endpoint is not None and status.silent_since is None
        self.workers += times
        if ready:
            self.ready += times
        if leased:
            self.allocated += times
        elif ready and worker.phase is Phase.IDLE:
            self.idle += times


class PoolCounts:
    """The same for one pool, with its open connections, its failed workers, and when its last lease ended."""

    def __init__(self) -> None:
        self.workers = WorkerCounts()
        self._counted: dict[Slot, Worker] = {}
        self._failed: dict[Slot, Worker] = {}
        self._ends: dict[Slot, datetime] = {}
        self._last_end: datetime | None = None
        self._last_end_left = False
        """Whether `_last_end` may not be that of any worker any more."""
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
        self._put_end(slot, worker.last_activity_at if worker is not None else None)
        if worker is not None:
            self._counted[slot] = worker
            self.workers.add(worker)
            if worker.phase is Phase.FAILED:
                self._failed[slot] = worker
        if slot in self._connections or (worker is not None and worker.status.gateways):
            self._uncounted.add(slot)

    def count_again(self, slot: Slot) -> None:
        """Notes that a gateway may have another number of connections to the slot's worker."""
        self._uncounted.add(slot)

    @property
    def last_end(self) -> datetime | None:
        """When the last lease left one of the workers; None: none of them ever had one."""
        if self._last_end_left:
            self._last_end, self._last_end_left = max(self._ends.values(), default=None), False
        return self._last_end

    def _put_end(self, slot: Slot, end: datetime | None) -> None:
        """Takes note of when the last lease left the slot's worker. It becomes later, until the worker goes."""
        before = self._ends.pop(slot, None)
        if end is not None:
            self._ends[slot] = end
            if self._last_end is None or end >= self._last_end:
                self._last_end, self._last_end_left = end, False
                return
        if before is not None and before == self._last_end and before != end:
            self._last_end_left = True

    @property
    def failed(self) -> Worker | None:
        """The failed worker of the lowest slot."""
        return self._failed[min(self._failed)] if self._failed else None

    def connections(self, registered_until: Expiries, now: datetime) -> int:
        """How many connections the workers' leases have, as far as registrations that have not expired tell."""
        again, self._uncounted = self._uncounted | self._expiries.due(now), set()
        for slot in again:
            self._all_connections -= self._connections.pop(slot, 0)
            worker = self._counted.get(slot)
            lease = worker.lease if worker is not None else None
            entries = live_registrations(worker, registered_until, now) if worker is not None and lease else []
            live = [found for found in entries if lease is not None and found[0].lease_id == lease.id]
            self._expiries.put(slot, min((expires_at for _, expires_at in live), default=None))
            if live:
                self._connections[slot] = sum(registered_until.connections(entry) for entry, _ in live)
                self._all_connections += self._connections[slot]
        return self._all_connections
