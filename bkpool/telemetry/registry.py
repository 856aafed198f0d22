"""A registry for a process's metrics, and fast access to the series of a metric.

Each room counts its own metrics. The role that runs creates one registry and passes it to each room. Nothing here
names a metric.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

POOL_LABELS = ("pool", "pool_namespace")
"""The labels that name a pool. `namespace` alone would be that of the pod: Prometheus' operator sets it."""

LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Seconds: upper bounds of the buckets of a histogram of short times."""

M = TypeVar("M", bound=MetricWrapperBase)


def new_registry() -> CollectorRegistry:
    """Returns an empty registry. It has no default collectors, so a process reports only what it counts itself."""
    return CollectorRegistry(auto_describe=True)


class CachedSeries(dict[str | tuple[str, ...], M], Generic[M]):
    """The series of one metric, by the values of their labels.

    `prometheus_client` takes some microseconds to find a series. This finds one with a single dictionary access. One
    label is given as a string, several as a tuple. A series is never removed, so labels must come from a bounded set.

    Args:
        metric: A metric with at least one label.
    """

    def __init__(self, metric: M) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, labels: str | tuple[str, ...]) -> M:
        series = self[labels] = self._metric.labels(*([labels] if isinstance(labels, str) else labels))
        return series
