"""The API's metrics: requests by route, callers that wait for a worker, and leases.

Requests are counted when they end; waiting callers and leases are counted only when Prometheus asks, so a change of a
lease costs nothing. Labels are templates of routes, methods, status codes and names of pools: bounded, and nothing
that a caller sends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from http import HTTPMethod

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as CounterMetric
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bkpool.core.names import Key
from bkpool.core.worker import Worker
from bkpool.telemetry.registry import POOL_LABELS, CachedSeries

UNMATCHED = "unmatched"
"""The route of requests to a path, or with a method, that no route has."""
OTHER = "other"
"""The method of requests whose method is not one of HTTP's: a caller may send any string."""
CLIENT_CLOSED_REQUEST = "499"
"""The code of requests whose caller closed the connection before the response. nginx counts them as 499 too."""

_METHODS = frozenset(method.value for method in HTTPMethod)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Upper bounds of the buckets. An allocate request waits for up to an hour by default (ApiLimits.max_wait)."""


class ApiMetrics:
    """Counts for one API. Call it in one event loop.

    Args:
        registry: The process's registry.
        waiting: How many callers wait for a worker of a pool.
        pools: The keys of all pools.
        workers: All workers, with their leases.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        waiting: Callable[[Key], int],
        pools: Iterable[Key],
        workers: Mapping[Key, Worker],
    ) -> None:
        self._requests = CachedSeries(
            CounterMetric(
                "buildkit_api_requests",
                "Requests that have ended, by route, method and status code.",
                ["route", "method", "code"],
                registry=registry,
            )
        )
        self._durations = CachedSeries(
            Histogram(
                "buildkit_api_request_duration_seconds",
                "Time from the arrival of a request until its response. It includes the wait for a worker.",
                ["route"],
                buckets=_SECONDS,
                registry=registry,
            )
        )
        registry.register(_PoolGauges(waiting, pools, workers))

    def expect(self, route: str, method: str, codes: Iterable[str]) -> None:
        """Creates the series of a route: Prometheus sees no increase in a series that begins with its first event."""
        for code in codes:
            self._requests[route, method, code].inc(0)

    def ended(self, route: str, method: str, code: str, seconds: float) -> None:
        """Counts a request that has ended. Every label must be from a bounded set."""
        self._requests[route, method, code].inc()
        self._durations[route].observe(seconds)

    def middleware(self) -> Middleware:
        """A middleware that counts every request. It must be the outermost, so that errors are responses already."""

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            began, code = time.perf_counter(), CLIENT_CLOSED_REQUEST
            try:
                response = await handler(request)
                code = str(response.status)
            finally:
                resource = request.match_info.route.resource
                route = resource.canonical if resource else UNMATCHED
                method = request.method if request.method in _METHODS else OTHER
                self.ended(route, method, code, time.perf_counter() - began)
            return response

        return count


class _PoolGauges(Collector):
    """Waiting callers and leases by pool."""

    def __init__(self, waiting: Callable[[Key], int], pools: Iterable[Key], workers: Mapping[Key, Worker]) -> None:
        self._waiting = waiting
        self._pools = pools
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        waiting: Counter[Key] = Counter()
        leases: Counter[Key] = Counter()
        for key in self._pools:
            waiting[key] += self._waiting(key)
            leases[key] += 0
        for worker in self._workers.values():
            if worker.lease is not None:
                leases[worker.pool] += 1
        yield _gauge("buildkit_api_waiters", "Callers that wait at this replica for a worker of the pool.", waiting)
        yield _gauge("buildkit_api_leases", "Leases of the pool, those that still drain included.", leases)


def _gauge(name: str, description: str, values: Mapping[Key, int]) -> Metric:
    family = GaugeMetricFamily(name, description, labels=POOL_LABELS)
    for pool, value in values.items():
        family.add_metric([pool.name, pool.namespace], value)
    return family
