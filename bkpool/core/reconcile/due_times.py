"""When each slot, or each pool, is to be looked at again. Pure: the caller gives the time.

The cost of a change is that of one step in a heap, however many slots there are.
"""

from __future__ import annotations

import heapq
from datetime import datetime
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=tuple[Any, ...])
"""A tuple that can be compared: two deadlines may be equal."""

_FEW = 64
"""Entries that are out of date and may stay in the heap in any case."""


class DueTimes(Generic[K]):
    """At most one deadline for each key."""

    def __init__(self) -> None:
        self._at: dict[K, datetime] = {}
        self._heap: list[tuple[datetime, K]] = []
        """Also has deadlines that were changed since; `_at` says which are valid."""

    def put(self, key: K, at: datetime | None) -> None:
        """Gives the key this deadline instead of the one that it had; None: it has none."""
        if at is None:
            self._at.pop(key, None)
        elif self._at.get(key) != at:
            self._at[key] = at
            heapq.heappush(self._heap, (at, key))
        if len(self._heap) > 2 * len(self._at) + _FEW:
            self._heap = [(at, key) for key, at in self._at.items()]
            heapq.heapify(self._heap)

    def due(self, now: datetime) -> set[K]:
        """The keys whose deadline has come. They have none from now on."""
        found: set[K] = set()
        while (first := self.first) is not None and first <= now:
            _, key = heapq.heappop(self._heap)
            del self._at[key]
            found.add(key)
        return found

    @property
    def first(self) -> datetime | None:
        """The earliest deadline of all."""
        while self._heap:
            at, key = self._heap[0]
            if self._at.get(key) == at:
                return at
            heapq.heappop(self._heap)
        return None
