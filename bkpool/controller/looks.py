"""Which pools have changed, and which of them a round of the controller looks at (rule 16, docs/rules.md#r16).

A look at a pool has the slots that had changed when it began. What changes meanwhile is for the next one. So each
look ends, after several rounds if it is large. This only counts slots: it knows neither workers nor plans.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import chain, islice

from bkpool.core.names import Key, Slot

AT_ONCE = 32
"""How many slots one round takes over, and then looks at, for each pool: a few milliseconds."""
_OF_A_POOL = 8
"""As how many more slots each pool of a round counts, because its status is worked out, too."""
_MOST_POOLS = AT_ONCE // _OF_A_POOL


class LookStage(Enum):
    """How far a look is with a round's part of it."""

    TAKING_OVER = auto()
    """Some of its slots are left for later rounds."""
    TAKEN_OVER = auto()
    """The part has its last slots."""
    PLANNING = auto()
    """It had its last slots before. Only its plan was not finished."""


@dataclass(frozen=True, slots=True)
class LookPart:
    """One round's part of a look at a pool."""

    pool: Key
    slots: list[Slot]
    """To be taken over now."""
    stage: LookStage


class Looks:
    """The pools that have changed, each with its slots that have, in the order in which this became known."""

    def __init__(self) -> None:
        self._noted: dict[Key, dict[Slot, None]] = {}
        """For the next look at each pool."""
        self._begun: dict[Key, dict[Slot, None]] = {}
        """The pools at which a look has begun, with the slots of this look that are left."""
        self._others_first = False

    def note(self, pool: Key) -> None:
        """Notes that a pool may have changed."""
        self._noted.setdefault(pool, {})

    def note_slot(self, slot: Slot) -> None:
        """Notes that a slot may have changed."""
        self._noted.setdefault(pool_of(slot), {})[slot] = None

    def plan_unfinished(self, pool: Key) -> None:
        """Notes that the look at a pool has not ended, because its plan is unfinished."""
        self._begun.setdefault(pool, {})

    @property
    def has_more(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._noted or self._begun)

    def next_round(self) -> list[LookPart]:
        """What one round takes over.

        Every second round begins with the pools that wait for a look, the others with the looks that have begun. So a
        large pool holds up no other, and many small ones do not hold up a large one.
        """
        self._others_first = not self._others_first
        left, parts = AT_ONCE, list[LookPart]()
        for key in self._candidates():
            if left <= 0:
                break
            part = self._part(key)
            parts.append(part)
            left -= _OF_A_POOL + (AT_ONCE if part.stage is LookStage.PLANNING else len(part.slots))
        return parts

    def _candidates(self) -> Iterator[Key]:
        begun = list(islice(self._begun, _MOST_POOLS))
        waiting = list(islice((key for key in self._noted if key not in self._begun), _MOST_POOLS))
        return chain(waiting, begun) if self._others_first else chain(begun, waiting)

    def _part(self, key: Key) -> LookPart:
        """The next part of the look at a pool. It begins one if none has begun."""
        begins = key not in self._begun
        slots = self._noted.pop(key) if begins else self._begun.pop(key)
        stage = LookStage.TAKEN_OVER if begins or slots else LookStage.PLANNING
        taken = list(islice(slots, AT_ONCE))
        for slot in taken:
            del slots[slot]
        if slots:
            self._begun[key], stage = slots, LookStage.TAKING_OVER
        return LookPart(key, taken, stage)


def pool_of(slot: Slot) -> Key:
    """The pool that a slot belongs to."""
    return Key(slot.namespace, slot.pool)
