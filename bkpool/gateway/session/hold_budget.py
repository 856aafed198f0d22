"""How long a client is held until its worker is reachable, from the earlier connections of the same lease.

Pure: it has no clock, and it holds no client itself.
"""

from __future__ import annotations

from math import inf

from bkpool.gateway.session.limits import GatewayLimits


class HoldBudget:
    """How long the clients of one lease may wait for its worker.

    Each failed wait makes the next one shorter (docs/clients.md#waiting). Times are seconds of one monotonic clock.

    Args:
        limits: The gateway's limits.
    """

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._failed_waits = 0
        self._last_failure_at = 0.0
        self._last_cut_at = -inf

    def allowance(self, now: float) -> tuple[int, float]:
        """Returns the number of failed waits before this one, and the seconds that this one may last."""
        limits = self._limits
        if now >= self._last_failure_at + limits.failed_wait_memory:
            self._failed_waits = 0
        waits = (limits.first_wait, limits.second_wait, limits.later_wait)
        return self._failed_waits, waits[min(self._failed_waits, 2)]

    def wait_failed(self, now: float, failed_before: int) -> None:
        """A wait ended without the worker. Waits that ran at the same time count as one.

        Args:
            now: The time.
            failed_before: What `allowance` returned when this wait began.
        """
        self._failed_waits = max(self._failed_waits, failed_before + 1)
        self._last_failure_at = now

    def worker_reached(self) -> None:
        """A dial succeeded, so the next wait is a first one again."""
        self._failed_waits = 0

    def worker_closed_connection(self, now: float) -> None:
        """The worker closed a connection of the lease before the client did."""
        self._last_cut_at = now

    def follows_a_cut(self, accepted_at: float) -> bool:
        """Whether a client accepted at this time may be a retry of the build that the worker's close cut."""
        return accepted_at < self._last_cut_at + self._limits.cut_retry_window
