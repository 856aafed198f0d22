"""The controller's metrics: what it decides, what becomes of its actions, and how far it is behind.

Labels are names of actions and results. They contain no pool and no worker, so their number is bounded.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from bkpool.core.reconcile.actions import Action
from bkpool.telemetry.registry import LATENCY_BUCKETS, CachedSeries

STOP_STRAY = "stop_stray"
"""The action that stops a buildkitd without a worker object. `decide` does not return it: it belongs to no pool."""


class Result(StrEnum):
    """What became of an action."""

    DONE = "done"
    CONFLICT = "conflict"
    """Another writer was faster; the next decision takes that into account."""
    FAILED = "failed"
    """The store, the host or the worker refused it; it is tried again."""
    CRASHED = "crashed"
    """A defect of bkpool; the log has a traceback."""


def action_name(kind: type[Action]) -> str:
    """The label of an action: the name of its class in snake_case."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


_NAMES = {kind: action_name(kind) for kind in get_args(Action)}


class ControllerMetrics:
    """Counts for one controller. Call it in one event loop.

    Args:
        registry: The process's registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "buildkit_controller_decisions",
            "How often the controller has decided what one pool needs.",
            registry=registry,
        )
        self._actions = CachedSeries(
            Counter(
                "buildkit_controller_actions",
                "Actions on workers that have ended, by what became of them.",
                ["action", "result"],
                registry=registry,
            )
        )
        self._lag = Histogram(
            "buildkit_controller_lag_seconds",
            "Time from the first change that no decision has taken into account until the decision that does.",
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        for name in (*_NAMES.values(), STOP_STRAY):
            for result in Result:
                # Creates the series: Prometheus sees no increase in a series that begins with its first event.
                self._actions[name, result.value].inc(0)

    def decided(self, pools: int) -> None:
        """Counts one decision for each of this many pools."""
        self._decisions.inc(pools)

    def lagged(self, seconds: float) -> None:
        """Counts a change that was decided about this many seconds after it became known."""
        self._lag.observe(seconds)

    def ended(self, action: type[Action] | None, result: Result) -> None:
        """Counts an action that has ended; None is the stop of a stray."""
        self._actions[STOP_STRAY if action is None else _NAMES[action], result.value].inc()
