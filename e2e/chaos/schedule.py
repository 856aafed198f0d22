"""What will be broken and when, from a seed alone: the same seed is the same list, on any machine.

Pure: it breaks nothing, has no clock and knows no process. `damage.py` and `damage_kind.py` carry it out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Lane = Literal["appliance", "workers", "cluster"]


@dataclass(frozen=True)
class Kind:
    """One way to break something."""

    name: str
    lane: Lane
    shortest: float = 0.0
    longest: float = 0.0
    """Seconds for which it lasts; 0: it is done in a moment."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill-appliance", "appliance", 0.0, 3.0),
        Kind("end-appliance", "appliance", 0.0, 1.0),
        Kind("kill-worker", "workers"),
        Kind("stop-worker", "workers", 1.0, 5.0),
        Kind("delete-pod", "cluster"),
        Kind("cut-api", "cluster", 1.0, 6.0),
        Kind("freeze-watches", "cluster", 2.0, 8.0),
        Kind("expire-watches", "cluster"),
        Kind("cut-pods", "cluster", 1.0, 4.0),
    )
}
PAUSES: dict[str, dict[Lane, tuple[float, float]]] = {
    "process": {"appliance": (6.0, 12.0), "workers": (2.0, 6.0)},
    "kind": {"appliance": (12.0, 18.0), "workers": (5.0, 10.0), "cluster": (6.0, 12.0)},
}
"""By backend: seconds between the end of one fault of a lane and the next. Lanes know nothing of each other, so that
faults meet. On kind an appliance takes 5 s to come up instead of one, and a pod 3 s."""
CALM = 3.0
"""Seconds at the beginning in which everybody gets going."""
LANES = {backend: tuple(lanes) for backend, lanes in PAUSES.items()}


@dataclass(frozen=True)
class Fault:
    """One fault: when it begins and how long it lasts (seconds), and at whom it is aimed."""

    at: float
    kind: str
    seconds: float
    victim: int
    """Which of those there are then: this number modulo how many they are."""

    @property
    def lane(self) -> Lane:
        """Faults of one lane follow each other; those of different lanes meet."""
        return KINDS[self.kind].lane


def schedule(seed: int, seconds: float, backend: str) -> list[Fault]:
    """All faults of a run, in order; none lasts beyond its end.

    A longer run with the same seed begins with the same faults, and each lane has every kind of fault in turn, in
    an order of its own every time.
    """
    faults = [fault for lane in LANES[backend] for fault in _lane(seed, lane, seconds, backend)]
    return sorted(faults, key=lambda fault: (fault.at, fault.kind))


def _lane(seed: int, lane: Lane, seconds: float, backend: str) -> list[Fault]:
    chance = random.Random(f"{seed}/{lane}")  # text: the same on every Python, whatever its hashes
    faults: list[Fault] = []
    at = CALM
    while True:
        kinds = [kind for kind in KINDS.values() if kind.lane == lane]
        chance.shuffle(kinds)
        for kind in kinds:
            at += chance.uniform(*PAUSES[backend][lane])
            lasts = chance.uniform(kind.shortest, kind.longest)
            if at + lasts > seconds:
                return faults
            faults.append(Fault(round(at, 2), kind.name, round(lasts, 2), chance.randrange(1000)))
            at += lasts
