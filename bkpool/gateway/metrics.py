"""What the gateway counts, under the names that other people's dashboards use (DESIGN 2).

Labels are names of pools and of statuses only: bounded, and nothing of a client.
"""

from __future__ import annotations

from collections import Counter

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram

_MINUTE, _HOUR = 60, 3600


class Metrics:
    """The gateway's metrics in a registry of their own; to count is a lock and an add."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._open: Counter[str] = Counter()
        self._connections = prometheus_client.Counter(
            "buildkit_gateway_connections",
            "Connections that reached a worker (success) and those that were refused (error).",
            ["pool", "status"],
            registry=self.registry,
        )
        self._refusals = prometheus_client.Counter(
            "buildkit_gateway_refusals",
            "Refused connections by their reason; the pool is empty where it is not known.",
            ["pool", "reason"],
            registry=self.registry,
        )
        self._active = Gauge(
            "buildkit_gateway_active_connections",
            "Connections that are being relayed now.",
            ["pool"],
            registry=self.registry,
        )
        self._duration = Histogram(
            "buildkit_gateway_connection_duration_seconds",
            "How long relayed connections lasted.",
            ["pool"],
            buckets=(0.1, 1, 5, 15, _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 4 * _HOUR),
            registry=self.registry,
        )

    def active(self, pool: str) -> int:
        """How many connections of this pool are being relayed now."""
        return self._open[pool]

    def opened(self, pool: str) -> None:
        """A connection is being relayed from now on."""
        self._open[pool] += 1
        self._connections.labels(pool, "success").inc()
        self._active.labels(pool).inc()

    def closed(self, pool: str, seconds: float) -> None:
        """A relayed connection has ended."""
        self._open[pool] -= 1
        self._active.labels(pool).dec()
        self._duration.labels(pool).observe(seconds)

    def refused(self, pool: str, reason: str) -> None:
        """A connection was refused; the reason is an error's code, and bounded like those."""
        self._connections.labels(pool, "error").inc()
        self._refusals.labels(pool, reason).inc()
