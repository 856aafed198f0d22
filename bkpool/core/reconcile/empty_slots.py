"""The slots of a pool without a worker, and which of them get one next. Pure.

They are kept in order from change to change, so that filling a large pool does not look at all slots each time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping

from bkpool.core.names import Key, Slot


class EmptySlots:
    """The numbers below the pool's maximum that no worker has.

    Args:
        limit: The pool's `scaling.max`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._numbers = list(range(limit))
        self._filled: set[int] = set()

    def resize(self, limit: int) -> None:
        """Takes over another maximum."""
        if limit != self._limit:
            self._limit = limit
            self._numbers = [number for number in range(limit) if number not in self._filled]

    def put(self, number: int, *, filled: bool) -> None:
        """Notes whether the slot with this number has a worker."""
        if filled == (number in self._filled):
            return
        if filled:
            self._filled.add(number)
        else:
            self._filled.discard(number)
        if number >= self._limit:
            return
        if filled:
            del self._numbers[bisect_left(self._numbers, number)]
        else:
            insort(self._numbers, number)

    def __len__(self) -> int:
        return len(self._numbers)

    def has(self, number: int) -> bool:
        """Whether the slot with this number is one of them."""
        return number < self._limit and number not in self._filled

    def slots(self, pool: Key) -> Iterator[Slot]:
        """All of them, as slots of this pool, the lowest first."""
        return (Slot(*pool, number) for number in self._numbers)

    def first(self, count: int, pool: Key, caches: Mapping[Slot, str | None], taken: Collection[Slot]) -> list[Slot]:
        """So many empty slots at most: those with a clean cache or none first, then those with a used one.

        Args:
            count: How many are wanted.
            pool: The pool.
            caches: The caches of the slots, with their owners.
            taken: Slots that cannot be used now.
        """
        clean: list[Slot] = []
        used: list[Slot] = []
        for number in self._numbers if count > 0 else ():
            slot = Slot(*pool, number)
            if slot in taken:
                continue
            (clean if caches.get(slot) is None else used).append(slot)
            if len(clean) == count:
                break
        return (clean + used)[:count]
