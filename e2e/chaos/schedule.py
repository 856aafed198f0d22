"""Decides what is broken and when. The same seed always gives the same list of faults, on any machine.

It is pure: it breaks nothing, has no clock and knows no process. `damage.py` and `damage_kind.py` carry out the list.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Lane = Literal["appliance", "workers", "cluster", "machine"]


@dataclass(frozen=True)
class Kind:
    """One kind of fault."""

    name: str
    lane: Lane
    shortest: float = 0.0
    longest: float = 0.0
    """Limits for the seconds that it lasts; 0 if it is over at once."""


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
        Kind("full-disk", "machine", 2.0, 6.0),
        Kind("hang-worker", "machine", 22.0, 26.0),
        Kind("remove-runtime", "machine"),
        Kind("unread-log", "machine", 2.0, 6.0),
    )
}
PAUSES: dict[str, dict[Lane, tuple[float, float]]] = {
    "process": {"appliance": (6.0, 12.0), "workers": (2.0, 6.0), "machine": (1.0, 4.0)},
    "kind": {"appliance": (12.0, 18.0), "workers": (5.0, 10.0), "cluster": (6.0, 12.0)},
}
"""By backend: limits for the seconds between one fault of a lane and the next one. Lanes are independent, so faults
of different lanes can overlap. On kind, an appliance needs 5 s to start instead of 1 s, and a pod 3 s."""
CALM = 3.0
"""Seconds at the beginning without a fault, in which the clients start."""
LANES = {backend: tuple(lanes) for backend, lanes in PAUSES.items()}


@dataclass(frozen=True)
class Fault:
    """One fault: when it begins, how long it lasts (both in seconds), and which worker it affects."""

    at: float
    kind: str
    seconds: float
    victim: int
    """The index of the affected worker: this number modulo the number of workers at that time."""

    @property
    def lane(self) -> Lane:
        """Faults of one lane follow each other. Those of different lanes can overlap."""
        return KINDS[self.kind].lane


def schedule(seed: int, seconds: float, backend: str) -> list[Fault]:
    """Returns all faults of a run, in order. Each ends before the run does.

    A longer run with the same seed begins with the same faults. Each lane repeats all its kinds of faults, every time
    in another random order.
    """
    faults = [fault for lane in LANES[backend] for fault in _lane(seed, lane, seconds, backend)]
    return sorted(faults, key=lambda fault: (fault.at, fault.kind))


def _lane(seed: int, lane: Lane, seconds: float, backend: str) -> list[Fault]:
    chance = random.Random(f"{seed}/{lane}")  # a seed of text gives the same numbers on every Python
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
