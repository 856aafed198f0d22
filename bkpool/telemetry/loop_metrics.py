"""The metrics of a process's event loops, which every role reports under the same names.

They belong to no role: an API, a controller and a gateway each report the loops that they run.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from bkpool.telemetry.registry import LATENCY_BUCKETS, CachedSeries


class LoopMetrics:
    """Counts what the watchdog finds. Every method may be called in any thread.

    Args:
        registry: Where the metrics are registered. A registry takes them once.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = CachedSeries(
            Histogram(
                "bkpool_loop_lag_seconds",
                "Time from the post of a heartbeat to an event loop until the loop ran it.",
                ["loop"],
                buckets=LATENCY_BUCKETS,
                registry=registry,
            )
        )
        self._blocked = CachedSeries(
            Counter(
                "bkpool_loop_blocked",
                "How often an event loop did not run a heartbeat in time.",
                ["loop"],
                registry=registry,
            )
        )

    def heartbeat(self, loop: str, seconds: float) -> None:
        """Counts a heartbeat that this loop ran this many seconds after it was posted."""
        self._lag[loop].observe(seconds)
        # Create the series now: Prometheus sees no increase in a series that begins with its first event.
        self._blocked[loop].inc(0)

    def blocked(self, loop: str) -> None:
        """Counts a heartbeat that this loop did not run in time."""
        self._blocked[loop].inc()
