"""What waits, dealt out in turn: one of each group, so that no group waits until another one has nothing more.

When a thousand leases of a pool end at once, the other pools need not wait for a thousand writes. It knows neither
threads nor commands, and it keeps the order within a group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class InTurn(Generic[T]):
    """Items that wait, by group."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, deque[T]] = {}
        self._turns: deque[Hashable] = deque()
        """The groups that have items, in the order of their turns."""

    def __bool__(self) -> bool:
        return bool(self._turns)

    def put(self, group: Hashable, item: T) -> None:
        """Lets an item wait behind the others of its group."""
        if group not in self._groups:
            self._groups[group] = deque()
            self._turns.append(group)
        self._groups[group].append(item)

    def take(self, most: int | None = None) -> list[T]:
        """Takes so many items (None: all), one of each group in turn. The next call goes on with the next group."""
        taken: list[T] = []
        while self._turns and len(taken) != most:
            group = self._turns.popleft()
            items = self._groups[group]
            taken.append(items.popleft())
            if items:
                self._turns.append(group)
            else:
                del self._groups[group]
        return taken
