"""Which pools have changed, and whose turn it is to be taken over and planned (rule 16, docs/rules.md#r16).

A turn has the slots that had changed when it began. What changes meanwhile is for the next turn of the pool, so each
turn comes to its end. This only counts slots: it knows neither workers nor plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from bkpool.core.names import Key, Slot

AT_ONCE = 32
"""How many slots one round takes over, and then looks at, for each pool: a few milliseconds."""
_OF_A_POOL = 8
"""As how many more slots each pool of a round counts, because its status is worked out, too."""
_MOST_POOLS = AT_ONCE // _OF_A_POOL


@dataclass(frozen=True, slots=True)
class Part:
    """One round's part of a pool's turn."""

    pool: Key
    slots: list[Slot]
    """To be taken over now."""
    more: bool = False
    """Some of the turn's slots are left for later rounds."""
    last: bool = False
    """These are the turn's last slots. A plan may have more parts after this one; they have no slots."""


class Turns:
    """The pools that have changed, each with its slots that have, in the order in which this became known."""

    def __init__(self) -> None:
        self._noted: dict[Key, dict[Slot, None]] = {}
        """For the next turn of each pool."""
        self._going_on: dict[Key, dict[Slot, None]] = {}
        """The pools whose turn has begun, with the slots of this turn that are left."""
        self._others_first = False

    def note(self, pool: Key) -> None:
        """Notes that a pool may have changed."""
        self._noted.setdefault(pool, {})

    def note_slot(self, slot: Slot) -> None:
        """Notes that a slot may have changed."""
        self._noted.setdefault(pool_of(slot), {})[slot] = None

    def goes_on(self, pool: Key) -> None:
        """Notes that the turn of a pool has not ended, because its plan is unfinished."""
        self._going_on.setdefault(pool, {})

    @property
    def has_more(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._noted or self._going_on)

    def next_round(self) -> list[Part]:
        """What one round takes over.

        Every second round begins with the pools that wait for a turn, the others with the turns that go on. So a
        large pool holds up no other, and many small ones do not hold up a large one.
        """
        self._others_first = not self._others_first
        left, parts = AT_ONCE, list[Part]()
        for key in self._candidates():
            if left <= 0:
                break
            part = self._part(key)
            parts.append(part)
            goes_on_with_plan = not (part.slots or part.last)
            left -= _OF_A_POOL + (AT_ONCE if goes_on_with_plan else len(part.slots))
        return parts

    def _candidates(self) -> Iterator[Key]:
        going_on = list(islice(self._going_on, _MOST_POOLS))
        waiting = list(islice((key for key in self._noted if key not in self._going_on), _MOST_POOLS))
        return chain(waiting, going_on) if self._others_first else chain(going_on, waiting)

    def _part(self, key: Key) -> Part:
        """The next part of a pool's turn. It begins a turn if none is under way."""
        begins = key not in self._going_on
        slots = self._noted.pop(key) if begins else self._going_on.pop(key)
        takes_over = begins or bool(slots)
        taken = list(islice(slots, AT_ONCE))
        for slot in taken:
            del slots[slot]
        if slots:
            self._going_on[key] = slots
        return Part(key, taken, more=bool(slots), last=takes_over and not slots)


def pool_of(slot: Slot) -> Key:
    """The pool that a slot belongs to."""
    return Key(slot.namespace, slot.pool)
