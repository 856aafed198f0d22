"""Which events wait to be written, and which of them is next: those of one object and reason are one.

However many are recorded, a bounded number waits and a bounded number is written. If too many wait, those about
workers are counted in one about their pool. Others are left out only if none about a worker waits. Pure: it writes
nothing and reads no clock.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from bkpool.core.resource import Resource

MOST_PENDING = 1000
"""Events that wait. Beyond this, the oldest ones about workers are counted in one event about their pool."""
MERGE_TIME = 30.0
"""Seconds between two writes for the same object and reason. A worker that is leased every second costs no more."""
RATE, BURST = 20.0, 100
"""Writes a second in the long run, and at once. An API server takes some thousands."""
_FEW = 64
"""Entries of a heap that do not count any more and may stay in any case."""


class Subject(NamedTuple):
    """What an event is about."""

    kind: str
    namespace: str
    name: str
    uid: str
    version: str = ""


class EventKey(NamedTuple):
    """What makes two events one."""

    uid: str
    reason: str


_Entry = tuple[float, int, EventKey]


@dataclass(slots=True)
class PendingEvent:
    """An event that waits, with those that were merged into it."""

    about: Subject
    reason: str
    message: str
    """Of the last one."""
    warning: bool
    at: datetime
    """When the first one happened."""
    last: datetime
    """When the last one happened."""
    owner: Subject | None = None
    """The pool of the worker that it is about."""
    times: int = 1
    subjects: set[str] = field(default_factory=set)
    """The names of the workers whose events were counted here; empty if it is about one object only."""

    @property
    def key(self) -> EventKey:
        """What makes two events one."""
        return EventKey(self.about.uid, self.reason)

    def note(self, times: int) -> str:
        """The sentence to show, if the event has happened so often in all."""
        if self.subjects:
            workers = f"{len(self.subjects)} worker{'s' * (len(self.subjects) != 1)}"
            return f"{self.times} times on {workers}, the last: {self.message}"
        return self.message if times == 1 else f"{self.message} (the last of {times} such events)"

    def take_in(self, other: PendingEvent) -> None:
        """Counts another event of the same object and reason, or of one of its workers, in this one."""
        self.times += other.times
        self.subjects |= other.subjects
        self.warning = self.warning or other.warning
        self.at = min(self.at, other.at)
        if other.last >= self.last:
            self.last, self.message = other.last, other.message


def pending_event(about: Resource, reason: str, message: str, *, warning: bool, at: datetime) -> PendingEvent:
    """An event about an object, as stored."""
    namespace, name = about.key
    owners = about.metadata.owner_references
    owner = Subject(owners[0].kind, namespace, owners[0].name, owners[0].uid) if owners else None
    subject = Subject(about.KIND, namespace, name, about.uid, about.metadata.resource_version or "")
    return PendingEvent(subject, reason, message, warning, at, at, owner)


class PendingEvents:
    """The events that wait. Times are monotonic seconds.

    Args:
        most: Events that wait, at most.
        merge_time: Seconds between two writes for the same object and reason.
        rate: Writes a second in the long run.
        burst: Writes at once after a quiet time.
    """

    def __init__(
        self, *, most: int = MOST_PENDING, merge_time: float = MERGE_TIME, rate: float = RATE, burst: int = BURST
    ) -> None:
        self._most = most
        self._merge_time = merge_time
        self._rate = rate
        self._burst = float(burst)
        self._permits = float(burst)
        self._counted_at: float | None = None
        self._pending: OrderedDict[EventKey, PendingEvent] = OrderedDict()
        self._of_workers: OrderedDict[EventKey, None] = OrderedDict()
        """Those that can be counted in an event about their pool, the oldest first."""
        self._due: tuple[list[_Entry], ...] = ([], [])
        """Heaps of the times from which they may be written: of warnings, and of the others."""
        self._entries: dict[EventKey, int] = {}
        """Which entry of a heap counts."""
        self._next_entry = 0
        self._written: OrderedDict[EventKey, float] = OrderedDict()
        self.dropped = 0
        """Events that were left out: too many waited, and none of them was about a worker."""

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, event: PendingEvent, now: float) -> None:
        """Takes an event in. It is merged with one that waits for the same object and reason."""
        before = self._pending.get(event.key)
        if before is not None:
            was_warning = before.warning
            before.take_in(event)
            if before.warning and not was_warning:
                self._schedule(before, now)
            return
        while len(self._pending) >= self._most:
            self._make_room(now)
        self._pending[event.key] = event
        if event.owner is not None:
            self._of_workers[event.key] = None
        self._schedule(event, now)

    def put_back(self, event: PendingEvent, now: float) -> None:
        """Takes back an event that was taken out and could not be written. It may be written at once."""
        self._written.pop(event.key, None)
        waits = event.key in self._pending
        self.add(event, now)
        if waits:
            self._schedule(self._pending[event.key], now)
        self._pending.move_to_end(event.key, last=False)
        if event.key in self._of_workers:
            self._of_workers.move_to_end(event.key, last=False)

    def wait(self, now: float) -> float | None:
        """Seconds until `take` has something; None: nothing waits."""
        self._forget_entries()
        due = [heap[0][0] for heap in self._due if heap]
        if not due:
            return None
        self._count_permits(now)
        permit = max(0.0, (1 - self._permits) / self._rate)
        return max(0.0, min(due) - now, permit)

    def take(self, now: float, *, hurry: bool = False) -> PendingEvent | None:
        """Takes out what may be written now, warnings first. With `hurry`, whatever waits."""
        self._forget_entries()
        self._count_permits(now)
        if self._permits < 1 and not hurry:
            return None
        for heap in self._due:
            if heap and (hurry or heap[0][0] <= now):
                self._permits = max(0.0, self._permits - 1)
                return self._remove(heap[0][2], now)
        return None

    @property
    def waiting(self) -> Mapping[EventKey, PendingEvent]:
        """What waits, the oldest first."""
        return self._pending

    def _schedule(self, event: PendingEvent, now: float) -> None:
        due = max(now, self._written.get(event.key, now - self._merge_time) + self._merge_time)
        self._next_entry += 1
        self._entries[event.key] = self._next_entry
        heap = self._due[0 if event.warning else 1]
        heapq.heappush(heap, (due, self._next_entry, event.key))
        if len(heap) > 2 * len(self._entries) + _FEW:  # while nothing is written, only the top would be looked at
            heap[:] = [entry for entry in heap if self._counts(entry)]
            heapq.heapify(heap)

    def _counts(self, entry: _Entry) -> bool:
        _, number, key = entry
        return self._entries.get(key) == number

    def _forget_entries(self) -> None:
        """Takes the entries off the heaps that do not count any more."""
        for heap in self._due:
            while heap and not self._counts(heap[0]):
                heapq.heappop(heap)

    def _remove(self, key: EventKey, now: float | None = None) -> PendingEvent:
        """Takes an event out. With a time, it counts as written then."""
        del self._entries[key]
        self._of_workers.pop(key, None)
        if now is not None:
            self._written[key] = now
            self._written.move_to_end(key)
            while self._written and now - next(iter(self._written.values())) >= self._merge_time:
                self._written.popitem(last=False)
        return self._pending.pop(key)

    def _make_room(self, now: float) -> None:
        """Counts the oldest event about a worker in one about its pool. If there is none, leaves the oldest out."""
        if not self._of_workers:
            self.dropped += self._remove(next(iter(self._pending))).times
            return
        oldest = self._remove(next(iter(self._of_workers)))
        if oldest.owner is None:
            raise AssertionError("only events with an owner are there")
        name = oldest.about.name
        of_pool = PendingEvent(
            oldest.owner,
            oldest.reason,
            f"{name}: {oldest.message}",
            oldest.warning,
            oldest.at,
            oldest.last,
            times=oldest.times,
            subjects={name},
        )
        self.add(of_pool, now)

    def _count_permits(self, now: float) -> None:
        since = now if self._counted_at is None else self._counted_at
        self._permits = min(self._burst, self._permits + max(0.0, now - since) * self._rate)
        self._counted_at = now
