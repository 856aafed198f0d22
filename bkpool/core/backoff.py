"""How long to wait before trying again: twice as long after each failure, up to a limit.

Pure arithmetic: it neither sleeps nor reads a clock, and the random factor is passed in.
"""

from __future__ import annotations

from collections.abc import Callable

FIRST_PAUSE = 0.1
"""Seconds after the first failure."""
_MOST_DOUBLINGS = 16  # more would only risk an overflow: 0.1 s becomes 109 minutes


class Backoff:
    """The pauses of one task that tries again and again.

    Args:
        longest: Seconds that no pause exceeds.
        first: Seconds of the first pause.
        jitter: Returns the part of the pause that is really waited, from 0 to 1, so that replicas spread out. The
            default waits all of it.
    """

    def __init__(
        self, longest: float, *, first: float = FIRST_PAUSE, jitter: Callable[[], float] = lambda: 1.0
    ) -> None:
        self._longest = longest
        self._first = first
        self._jitter = jitter
        self._failures = 0

    def failed(self) -> float:
        """Counts a failure and returns the seconds to wait before the next try."""
        pause = min(self._longest, self._first * 2.0 ** min(self._failures, _MOST_DOUBLINGS))
        self._failures += 1
        return self._jitter() * pause

    def succeeded(self) -> None:
        """Begins again with the first pause."""
        self._failures = 0
