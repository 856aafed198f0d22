"""When a gateway reports that it hears nothing from the worker of a lease, and when that it does. Pure.

A report may cost a write to the store. A worker that is silent is reported once, until a byte has come from it again.
A silent worker need not hang: whether it does, the controller finds out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from bkpool.gateway.net.relay import WorkerBytes
from bkpool.gateway.session.limits import GatewayLimits


@dataclass(frozen=True, slots=True)
class Report:
    """What is reported about the worker of a lease."""

    silent_for: float | None
    """Seconds since the last sign of it; None: bytes come from it."""


class WorkerSilence:
    """What one gateway hears of the worker of one lease.

    Args:
        limits: The gateway's limits.
    """

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._reported_sign = -inf
        """The last sign of the worker when its silence was reported."""
        self._reported_at = -inf
        self._noted_at = inf
        """Since when the store says that nobody hears from it."""

    def noted(self, now: float, *, silent: bool) -> None:
        """The store says that nobody hears from the worker, or does not say so any more."""
        self._noted_at = min(self._noted_at, now) if silent else inf

    def unreachable(self, now: float) -> Report | None:
        """The worker could not be dialled. Returns what must be reported."""
        if now < self._reported_at + self._limits.report_interval:
            return None
        self._reported_at = now
        return Report(0.0)

    def look(self, now: float, connections: Iterable[WorkerBytes]) -> Report | None:
        """Returns what must be reported, given all relayed connections of the lease."""
        signs = [(one.began_at, False) if one.received_at is None else (one.received_at, True) for one in connections]
        if not signs:
            return None
        sign, is_byte = max(signs)
        if self._noted_at < inf:
            if not is_byte or sign <= self._noted_at or now < self._reported_at + self._limits.report_interval:
                return None
            self._reported_at = now
            return Report(None)
        quiet = self._limits.worker_quiet if is_byte else self._limits.worker_first_byte
        if sign <= self._reported_sign or now < sign + quiet:
            return None
        self._reported_sign, self._reported_at = sign, now
        return Report(now - sign)

    def not_reported(self) -> None:
        """The last report has failed, so it is made again."""
        self._reported_sign = -inf
