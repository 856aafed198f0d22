"""How long the clients of one lease are held for its worker, from what became of those before them.

Pure: it is told the time, and holds nobody itself.
"""

from __future__ import annotations

from math import inf

from bkpool.gateway.session.limits import GatewayLimits


class HoldBudget:
    """How long the clients of one lease may wait for its worker: less when waiting was in vain before (DESIGN 3)."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._in_vain = 0
        self._at = 0.0
        self._parted_at = -inf

    def now(self, now: float) -> tuple[int, float]:
        """How many waits were in vain before this one, and for how many seconds this one may last."""
        limits = self._limits
        if now >= self._at + limits.forget_waits:
            self._in_vain = 0
        waits = (limits.first_wait, limits.second_wait, limits.later_wait)
        return self._in_vain, waits[min(self._in_vain, 2)]

    def in_vain(self, now: float, before: int) -> None:
        """A wait has ended without the worker, after so many before it; those at the same time count as one."""
        self._in_vain = max(self._in_vain, before + 1)
        self._at = now

    def reached(self) -> None:
        """The worker was reached: the next wait is a first one."""
        self._in_vain = 0

    def parted(self, now: float) -> None:
        """The worker has ended a connection of the lease, before its client did."""
        self._parted_at = now

    def bereaved(self, accepted_at: float) -> bool:
        """Whether a client who came then may be the rest of a build that was cut with that connection."""
        return accepted_at < self._parted_at + self._limits.bereaved
