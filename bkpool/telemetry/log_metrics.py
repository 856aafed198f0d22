"""The metric of a process's log. It counts nothing itself: the writer of the log does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class LogMetrics(Collector):
    """Reports the lines that were lost.

    Args:
        registry: Where the metric is registered.
        lost: Returns how many lines were lost until now.
    """

    def __init__(self, registry: CollectorRegistry, lost: Callable[[], int]) -> None:
        self._lost = lost
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by the registry for each scrape."""
        yield CounterMetricFamily(
            "bkpool_log_lines_lost",
            "Lines of the log that found no room in its queue or could not be written.",
            value=self._lost(),
        )
