"""The workers of a pool without a lease, in the order in which they are removed, and how many of them are too many.

It is kept from change to change. A change costs two steps of a binary search, however many workers there are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from bkpool.core.names import Slot
from bkpool.core.pool import Scaling
from bkpool.core.worker import Worker

_NEW = datetime.max.replace(tzinfo=UTC)
"""Stands for the creation of a worker that is not stored yet."""

_Place = tuple[datetime, int, Slot]
"""The time, and then the number of the slot: two numbers are compared faster than two slots of one pool."""


@dataclass(slots=True)
class _Row:
    """Workers by the time since which they are idle."""

    places: list[_Place] = field(default_factory=list)
    last_removed: _Place | None = None
    """The workers up to this place are too many; None: none of them is. Its own worker may be gone meanwhile."""

    def removed(self, place: _Place) -> bool:
        return self.last_removed is not None and place <= self.last_removed

    def remove_first(self, count: int) -> set[Slot]:
        """Makes the first ones too many, and no others. Returns those for which this has changed."""
        before = 0 if self.last_removed is None else bisect_right(self.places, self.last_removed)
        self.last_removed = self.places[count - 1] if count else None
        return {slot for _, _, slot in self.places[min(before, count) : max(before, count)]}


class FreeWorkers:
    """The workers without a lease.

    First come those that never had a lease, the oldest first; then the others, the least recently used first. Those
    that are to go in any case ("doomed") are kept apart: they do not count for `scaling.min`.
    """

    def __init__(self) -> None:
        self._never, self._used = _Row(), _Row()
        self._places: dict[Slot, tuple[_Row, _Place]] = {}
        self._doomed: set[Slot] = set()

    def __len__(self) -> int:
        return len(self._places) + len(self._doomed)

    def put(self, slot: Slot, worker: Worker | None, *, doomed: bool) -> None:
        """Takes note of the slot's worker as it is now.

        Args:
            slot: The slot.
            worker: Its worker without a lease; None: it has none.
            doomed: The worker goes in any case.
        """
        known = self._places.pop(slot, None)
        if known is not None:
            row, place = known
            del row.places[bisect_left(row.places, place)]
        self._doomed.discard(slot)
        if worker is None:
            return
        if doomed:
            self._doomed.add(slot)
            return
        used = worker.last_activity_at
        row = self._never if used is None else self._used
        place = (used or worker.metadata.creation_timestamp or _NEW, slot.number, slot)
        insort(row.places, place)
        self._places[slot] = row, place

    def is_too_many(self, slot: Slot) -> bool:
        """Whether the slot's worker is to be removed, as `mark_surplus` found last."""
        if slot in self._doomed:
            return True
        known = self._places.get(slot)
        return known is not None and known[0].removed(known[1])

    def keeps(self, slot: Slot) -> bool:
        """Whether the slot has a worker without a lease that is to stay."""
        return slot in self._places and not self.is_too_many(slot)

    @property
    def kept(self) -> int:
        """How many are to stay."""
        return sum(len(row.places) - self._removed(row) for row in (self._never, self._used))

    def mark_surplus(self, scaling: Scaling, now: datetime) -> tuple[set[Slot], datetime | None]:
        """Finds out which workers are too many now: those beyond `scaling.min` that are idle for `scaleDownDelay`.

        Returns:
            The slots for which the answer has changed, and when time alone changes it next.
        """
        never, used = self._never.places, self._used.places
        spare = max(0, len(never) + len(used) - scaling.min)
        spare_never = min(spare, len(never))
        changed: set[Slot] = set()
        later: list[datetime] = []
        for row, most in ((self._never, spare_never), (self._used, spare - spare_never)):
            count = min(most, bisect_right(row.places, now - scaling.scale_down_delay, key=_since))
            changed |= row.remove_first(count)
            if count < most:
                later.append(_due(row.places[count][0], scaling.scale_down_delay, now))
        return changed, min(later, default=None)

    @staticmethod
    def _removed(row: _Row) -> int:
        return 0 if row.last_removed is None else bisect_right(row.places, row.last_removed)


def _since(place: _Place) -> datetime:
    return place[0]


def _due(since: datetime, delay: timedelta, now: datetime) -> datetime:
    return (now if since == _NEW else since) + delay
