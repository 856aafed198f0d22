"""The gateway's metrics, under the names that dashboards of others use (docs/observability/README.md).

To count a connection costs some microseconds. To count a byte costs nothing: each connection counts its own bytes,
and they are added up when Prometheus asks. Labels are names of pools, workers and codes, so they are bounded. They
contain no data of a client.
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

from bkpool.core.names import Key
from bkpool.gateway.net.duplex import PeerStream
from bkpool.telemetry.registry import LATENCY_BUCKETS, POOL_LABELS, CachedSeries, new_registry

OTHER = "other"
"""The label that all workers without a separate series share."""

WORKER_SERIES = 200
"""Workers that have a series of their own."""

_MINUTE, _HOUR = 60, 3600
_DURATION_BUCKETS = (0.1, 1, 5, 15, _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR, 4 * _HOUR)


@dataclass(eq=False, slots=True)
class Meter:
    """One relayed connection, and the labels under which its bytes are counted."""

    pool: Key
    worker: str
    stream: PeerStream
    """The client's stream: its `bytes_in` go up to the worker, its `bytes_out` came down."""


class GatewayMetrics:
    """The gateway's metrics. Every method may be called in any thread.

    Args:
        registry: Where they are registered; a new registry if None.
        worker_series: How many workers have a series of their own.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, worker_series: int = WORKER_SERIES) -> None:
        self.registry = registry = new_registry() if registry is None else registry
        self._connections = _counter(
            registry,
            "buildkit_gateway_connections",
            "Connections that reached a worker (success) and those that were refused (error).",
            [*POOL_LABELS, "status"],
        )
        self._refusals = _counter(
            registry,
            "buildkit_gateway_refusals",
            "Refused connections by reason. The pool is empty if the client had no lease.",
            [*POOL_LABELS, "reason"],
        )
        self._durations = _histogram(
            registry,
            "buildkit_gateway_connection_duration_seconds",
            "Duration of relayed connections.",
            list(POOL_LABELS),
            _DURATION_BUCKETS,
        )
        self._handshakes = _histogram(
            registry,
            "buildkit_gateway_handshake_seconds",
            "Time from accept to the end of the TLS handshake, or to its failure.",
            ["outcome"],
            LATENCY_BUCKETS,
        )
        self._dials = _histogram(
            registry,
            "buildkit_gateway_dial_seconds",
            "Dials of workers: reached, failed, impossible because this process has no descriptor or memory left "
            "(exhausted), or answered by another peer than the worker (stranger).",
            [*POOL_LABELS, "outcome"],
            LATENCY_BUCKETS,
        )
        self._current = _Current(worker_series)
        registry.register(self._current)

    def handshake_done(self, seconds: float, *, ok: bool) -> None:
        """Counts a TLS handshake that ended this many seconds after its connection was accepted."""
        self._handshakes["ok" if ok else "failed"].observe(seconds)

    def dial_done(self, pool: Key | None, seconds: float, outcome: str) -> None:
        """Counts a dial of a worker. The outcome is "reached", "failed", "exhausted" or "stranger"."""
        self._dials[*pool_labels(pool), outcome].observe(seconds)

    def relay_started(self, meter: Meter) -> None:
        """Counts a connection that is relayed from now on."""
        self._current.add(meter)
        self._connections[*pool_labels(meter.pool), "success"].inc()

    def relay_ended(self, meter: Meter, seconds: float) -> None:
        """Counts a relayed connection that has ended after this many seconds."""
        self._current.remove(meter)
        self._durations[pool_labels(meter.pool)].observe(seconds)

    def refused(self, pool: Key | None, reason: str) -> None:
        """Counts a refused connection. The reason is the code of an error, from a bounded set."""
        self._connections[*pool_labels(pool), "error"].inc()
        self._refusals[*pool_labels(pool), reason].inc()

    def set_draining(self, draining: bool) -> None:
        """Reports whether the gateway waits for its open connections to end. There is no series before this call."""
        self._current.draining = draining

    def count_pending(self, change: int) -> None:
        """Changes the number of connections without a lease by this many."""
        self._current.count_pending(change)

    def active(self, pool: Key) -> int:
        """Returns how many connections of this pool are relayed now."""
        return self._current.active(pool)

    def active_by_worker(self, pool: Key) -> Counter[str]:
        """Returns how many connections are relayed now to each worker of this pool that has any."""
        return self._current.active_by_worker(pool)


def pool_labels(pool: Key | None) -> tuple[str, str]:
    """The values of POOL_LABELS; both are empty if a client has no pool."""
    return ("", "") if pool is None else (pool.name, pool.namespace)


def _counter(
    registry: CollectorRegistry, name: str, text: str, labels: list[str]
) -> CachedSeries[prometheus_client.Counter]:
    return CachedSeries(prometheus_client.Counter(name, text, labels, registry=registry))


def _histogram(
    registry: CollectorRegistry, name: str, text: str, labels: list[str], buckets: tuple[float, ...]
) -> CachedSeries[Histogram]:
    return CachedSeries(Histogram(name, text, labels, buckets=buckets, registry=registry))


@dataclass(slots=True)
class _PoolCounts:
    """The relayed connections of a pool, and the bytes of those that have ended."""

    active: int = 0
    up: int = 0
    down: int = 0


@dataclass(eq=False, slots=True)
class _Current(Collector):
    """What is open now, and the bytes that have been relayed so far.

    While a connection is open, its bytes are read from its own counts. When it ends, they are added to its pool's
    counts. Both happen under one lock, so no byte counts twice and no total ever decreases.
    """

    worker_series: int = WORKER_SERIES
    draining: bool | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pending: int = 0
    _open: set[Meter] = field(default_factory=set)
    _pools: dict[Key, _PoolCounts] = field(default_factory=dict)

    def add(self, meter: Meter) -> None:
        with self._lock:
            self._open.add(meter)
            self._pools.setdefault(meter.pool, _PoolCounts()).active += 1

    def remove(self, meter: Meter) -> None:
        with self._lock:
            self._open.remove(meter)
            pool = self._pools[meter.pool]
            pool.active -= 1
            pool.up += meter.stream.bytes_in
            pool.down += meter.stream.bytes_out

    def count_pending(self, change: int) -> None:
        with self._lock:
            self._pending += change

    def active(self, pool: Key) -> int:
        counts = self._pools.get(pool)
        return counts.active if counts else 0

    def active_by_worker(self, pool: Key) -> Counter[str]:
        with self._lock:
            meters = list(self._open)
        return Counter(meter.worker for meter in meters if meter.pool == pool)

    def collect(self) -> Iterable[Metric]:
        with self._lock:  # only for the copy, because the gateway's loops need the lock too
            meters = list(self._open)
            pools = {key: _PoolCounts(pool.active, pool.up, pool.down) for key, pool in self._pools.items()}
            pending = self._pending
        for meter in meters:
            pools[meter.pool].up += meter.stream.bytes_in
            pools[meter.pool].down += meter.stream.bytes_out
        active = GaugeMetricFamily(
            "buildkit_gateway_active_connections", "Connections that are relayed now.", labels=POOL_LABELS
        )
        relayed = CounterMetricFamily(
            "buildkit_gateway_bytes",
            "Bytes of plaintext relayed to workers (up) and to clients (down), including open connections.",
            labels=[*POOL_LABELS, "direction"],
        )
        for key, pool in pools.items():
            labels = pool_labels(key)
            active.add_metric(labels, pool.active)
            relayed.add_metric([*labels, "up"], pool.up)
            relayed.add_metric([*labels, "down"], pool.down)
        yield from (active, relayed, _by_worker(meters, self.worker_series))
        yield GaugeMetricFamily("buildkit_gateway_pending_connections", "Connections without a lease.", pending)
        yield GaugeMetricFamily(
            "buildkit_gateway_draining",
            "0 while the gateway accepts connections, 1 while it waits for open ones to end.",
            None if self.draining is None else int(self.draining),
        )


def _by_worker(meters: Iterable[Meter], most: int) -> Metric:
    """Counts open connections by worker, which is by lease: a worker has one lease at a time."""
    ranked = Counter((meter.pool, meter.worker) for meter in meters).most_common()
    rest: Counter[tuple[Key, str]] = Counter()
    for (pool, _), count in ranked[most:]:
        rest[pool, OTHER] += count
    family = GaugeMetricFamily(
        "buildkit_gateway_open_connections",
        f"Connections that are relayed now, by worker. The {most} workers with the most have a series.",
        labels=[*POOL_LABELS, "worker"],
    )
    for (pool, worker), count in [*ranked[:most], *rest.items()]:
        family.add_metric([*pool_labels(pool), worker], count)
    return family
