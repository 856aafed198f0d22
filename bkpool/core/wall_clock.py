"""How long to sleep before something that a wall clock decides: in short pieces, because that clock may jump.

Timers count monotonic time, which stands still while a laptop sleeps. So whoever waits for a time of day looks at the
clock again after each piece. Nothing here reads a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

LONGEST_SLEEP = 30.0
"""Seconds after which a wall clock is looked at again at the latest."""
_NO_JUMP = 1.0
"""Seconds that the two clocks may differ while nobody set one: they are not read at the same moment."""


def pause_until(due: datetime, now: datetime) -> float:
    """Seconds to sleep before the clock is looked at again: until `due`, and at most LONGEST_SLEEP."""
    return min(LONGEST_SLEEP, max(0.0, (due - now).total_seconds()))


@dataclass(frozen=True, slots=True)
class ClockReading:
    """Both clocks at one moment."""

    wall: datetime
    seconds: float
    """Monotonic time."""

    def jumped(self, later: ClockReading) -> bool:
        """Whether the wall clock was set, or the machine slept, between this reading and a later one."""
        passed = (later.wall - self.wall).total_seconds()
        return abs(passed - (later.seconds - self.seconds)) > _NO_JUMP
