"""What the gateway counts, under the names that other people's dashboards use (DESIGN 2; docs/observability).

To count costs a connection some microseconds, and a byte nothing: bytes are added up when somebody asks, from the
counts that the connections keep anyway. Labels are names of pools, workers, loops and codes: bounded, and nothing of
a client.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import prometheus_client
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bkpool.gateway.net.duplex import PeerStream
from bkpool.telemetry.registry import LATENCY_BUCKETS, CachedSeries, new_registry

OTHER = "other"
"""The label of the workers that have no series of their own."""

_WORKERS = 200  # with a series of their own
_MINUTE, _HOUR = 60, 3600
_DURATIONS = (0.1, 1, 5, 15, _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 4 * _HOUR)


@dataclass(eq=False, slots=True)
class Meter:
    """One relayed connection, and where its bytes are counted."""

    pool: str
    worker: str
    end: PeerStream
    """The client's: what it has said goes up, what it was told came down."""


class GatewayMetrics:
    """The gateway's metrics. Every method may be called in any thread.

    Args:
        registry: Where they are registered; a new registry if None.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = new_registry() if registry is None else registry
        self._connections = CachedSeries(
            prometheus_client.Counter(
                "buildkit_gateway_connections",
                "Connections that reached a worker (success) and those that were refused (error).",
                ["pool", "status"],
                registry=self.registry,
            )
        )
        self._refusals = CachedSeries(
            prometheus_client.Counter(
                "buildkit_gateway_refusals",
                "Refused connections by their reason; the pool is empty where it is not known.",
                ["pool", "reason"],
                registry=self.registry,
            )
        )
        self._durations = CachedSeries(
            Histogram(
                "buildkit_gateway_connection_duration_seconds",
                "How long relayed connections lasted.",
                ["pool"],
                buckets=_DURATIONS,
                registry=self.registry,
            )
        )
        self._handshakes = CachedSeries(
            Histogram(
                "buildkit_gateway_handshake_seconds",
                "From accept to the end of the TLS handshake, or to its failure.",
                ["outcome"],
                buckets=LATENCY_BUCKETS,
                registry=self.registry,
            )
        )
        self._dials = CachedSeries(
            Histogram(
                "buildkit_gateway_dial_seconds",
                "Dials of workers: reached, failed, or answered by something that is not the worker (stranger).",
                ["pool", "outcome"],
                buckets=LATENCY_BUCKETS,
                registry=self.registry,
            )
        )
        self._now = _Now()
        self.registry.register(self._now)

    def shaken(self, seconds: float, *, ok: bool) -> None:
        """A TLS handshake has ended, so long after its connection was accepted."""
        self._handshakes["ok" if ok else "failed"].observe(seconds)

    def dialled(self, pool: str, seconds: float, outcome: str) -> None:
        """A dial of a worker has ended: "reached", "failed" or "stranger"."""
        self._dials[pool, outcome].observe(seconds)

    def opened(self, meter: Meter) -> None:
        """A connection is being relayed from now on."""
        self._now.opened(meter)
        self._connections[meter.pool, "success"].inc()

    def closed(self, meter: Meter, seconds: float) -> None:
        """A relayed connection has ended, after so long, and its bytes count no further."""
        self._now.closed(meter)
        self._durations[meter.pool].observe(seconds)

    def refused(self, pool: str, reason: str) -> None:
        """A connection was refused; the reason is an error's code, and bounded like those."""
        self._connections[pool, "error"].inc()
        self._refusals[pool, reason].inc()

    def draining(self, yes: bool) -> None:
        """The gateway accepts (no), or waits for what is open to end (yes). Until it is said there is no series."""
        self._now.draining = yes

    def pending(self, change: int) -> None:
        """So many connections without a lease have come, or gone."""
        self._now.count_pending(change)

    def active(self, pool: str) -> int:
        """How many connections of this pool are being relayed now."""
        return self._now.active(pool)


@dataclass(slots=True)
class _Pool:
    """What a pool has open, and the bytes of what it had."""

    active: int = 0
    up: int = 0
    down: int = 0


@dataclass(eq=False, slots=True)
class _Now(Collector):
    """What is open, and what has moved until now.

    Bytes of a connection are read from its own counts while it is open, and added to its pool's when it is closed: in
    one step for whoever asks, so that none counts twice and no total ever goes back.
    """

    draining: bool | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pending: int = 0
    _open: set[Meter] = field(default_factory=set)
    _pools: dict[str, _Pool] = field(default_factory=dict)

    def opened(self, meter: Meter) -> None:
        with self._lock:
            self._open.add(meter)
            self._pools.setdefault(meter.pool, _Pool()).active += 1

    def closed(self, meter: Meter) -> None:
        with self._lock:
            self._open.remove(meter)
            pool = self._pools[meter.pool]
            pool.active -= 1
            pool.up += meter.end.bytes_in
            pool.down += meter.end.bytes_out

    def count_pending(self, change: int) -> None:
        with self._lock:
            self._pending += change

    def active(self, name: str) -> int:
        pool = self._pools.get(name)
        return pool.active if pool else 0

    def collect(self) -> Iterable[Metric]:
        with self._lock:  # held for a copy only: the gateway's loops want it too
            meters = list(self._open)
            pools = {name: _Pool(pool.active, pool.up, pool.down) for name, pool in self._pools.items()}
            pending = self._pending
        for meter in meters:
            pools[meter.pool].up += meter.end.bytes_in
            pools[meter.pool].down += meter.end.bytes_out
        active = GaugeMetricFamily(
            "buildkit_gateway_active_connections", "Connections that are being relayed now.", labels=["pool"]
        )
        moved = CounterMetricFamily(
            "buildkit_gateway_bytes",
            "Bytes of plaintext relayed to workers (up) and to clients (down), open connections included.",
            labels=["pool", "direction"],
        )
        for name, pool in pools.items():
            active.add_metric([name], pool.active)
            moved.add_metric([name, "up"], pool.up)
            moved.add_metric([name, "down"], pool.down)
        yield from (active, moved, _by_worker(meters))
        yield GaugeMetricFamily("buildkit_gateway_pending_connections", "Connections that hold no lease.", pending)
        yield GaugeMetricFamily(
            "buildkit_gateway_draining",
            "0 while the gateway accepts connections, 1 while it only lets open ones end.",
            None if self.draining is None else int(self.draining),
        )


def _by_worker(meters: Iterable[Meter]) -> Metric:
    """Open connections by worker, and so by lease: a worker has one at a time. Only the busiest have a series."""
    ranked = Counter((meter.pool, meter.worker) for meter in meters).most_common()
    rest: Counter[tuple[str, str]] = Counter()
    for (pool, _), count in ranked[_WORKERS:]:
        rest[pool, OTHER] += count
    family = GaugeMetricFamily(
        "buildkit_gateway_open_connections",
        f"Connections that are being relayed now, of the {_WORKERS} busiest leases by the worker that each holds.",
        labels=["pool", "worker"],
    )
    for labels, count in [*ranked[:_WORKERS], *rest.items()]:
        family.add_metric(labels, count)
    return family
