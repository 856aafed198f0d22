"""The live leases of one pool by what allocation asks for, kept from change to change. Pure: it reads no clock.

A lease that expires makes no change of its worker, so each question first takes out what has expired. It never ends a
lease.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from datetime import UTC, datetime

from bkpool.core.names import LABEL_REQUEST, Slot
from bkpool.core.reconcile.due_times import DueTimes
from bkpool.core.worker import Worker


class LiveLeases:
    """The leases that have not ended, by the request that they were made for, and their number for each holder."""

    def __init__(self) -> None:
        self._not_ended: dict[Slot, Worker] = {}
        """Also has leases that have expired: a clock that is set back makes them live again."""
        self._expiries: DueTimes[Slot] = DueTimes()
        self._as_of = datetime.min.replace(tzinfo=UTC)
        self._clear()

    def put(self, slot: Slot, worker: Worker | None) -> None:
        """Takes over the slot's worker as it is now; None: it has none."""
        self._not_ended.pop(slot, None)
        self._leave(slot)
        if worker is not None and worker.lease is not None and worker.lease.ended_at is None:
            self._not_ended[slot] = worker
            self._enter(slot, worker)

    def of_request(self, request_key: str | None, now: datetime) -> Worker | None:
        """The worker with the live lease of a request; None if there is none, or the request has no key."""
        if request_key is None:
            return None
        self._take_out_expired(now)
        return next(reversed(self._of_request.get(request_key, {}).values()), None)

    def is_live(self, slot: Slot, now: datetime) -> bool:
        """Whether the worker in this slot has a live lease."""
        self._take_out_expired(now)
        return slot in self._live

    def count(self, now: datetime, but: Collection[str] = ()) -> int:
        """How many there are, without those whose ids are in `but`."""
        self._take_out_expired(now)
        return len(self._live) - sum(lease_id in self._slots for lease_id in but)

    def count_of(self, holder: str, now: datetime, but: Collection[str] = ()) -> int:
        """How many this caller holds, by their digest, without those whose ids are in `but`."""
        self._take_out_expired(now)
        left_out = (self._live[self._slots[lease_id]] for lease_id in but if lease_id in self._slots)
        return self._held[holder] - sum(worker.held_lease.holder == holder for worker in left_out)

    def _clear(self) -> None:
        self._live: dict[Slot, Worker] = {}
        self._slots: dict[str, Slot] = {}
        """By the id of the lease."""
        self._held: Counter[str] = Counter()
        self._of_request: defaultdict[str, dict[Slot, Worker]] = defaultdict(dict)
        """Of two leases of one request the one that changed last counts: it is the last one."""

    def _take_out_expired(self, now: datetime) -> None:
        if now == self._as_of:
            return
        if now < self._as_of:
            self._clear()
            self._as_of = now
            for slot, worker in self._not_ended.items():
                self._enter(slot, worker)
        self._as_of = now
        for slot in self._expiries.due(now):
            self._leave(slot)

    def _enter(self, slot: Slot, worker: Worker) -> None:
        lease = worker.held_lease
        if lease.expires_at <= self._as_of:
            return
        self._live[slot] = worker
        self._slots[lease.id] = slot
        self._held[lease.holder] += 1
        if request_key := worker.metadata.labels.get(LABEL_REQUEST):
            self._of_request[request_key][slot] = worker
        self._expiries.put(slot, lease.expires_at)

    def _leave(self, slot: Slot) -> None:
        self._expiries.put(slot, None)
        worker = self._live.pop(slot, None)
        if worker is None:
            return
        lease = worker.held_lease
        self._slots.pop(lease.id, None)
        self._held[lease.holder] -= 1
        if not self._held[lease.holder]:
            del self._held[lease.holder]
        if request_key := worker.metadata.labels.get(LABEL_REQUEST):
            del self._of_request[request_key][slot]
            if not self._of_request[request_key]:
                del self._of_request[request_key]


def with_live_lease(workers: Iterable[Worker], now: datetime) -> list[Worker]:
    """Those of the workers that have a lease which has not ended."""
    return [worker for worker in workers if worker.lease and not worker.lease.ended(now)]
