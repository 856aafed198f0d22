"""Names the leases of one loop in the gateway's heartbeat, at the same moments in all loops (docs/decisions/0036).

It does no I/O: a `CallbackLeaseRegistry` writes. Everything runs in the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from math import floor

from bkpool.core.errors import BkpoolError
from bkpool.gateway.session.lease_registration import CallbackLeaseRegistry, LeaseRegistration
from bkpool.gateway.session.limits import GatewayLimits


class LeaseHeartbeat:
    """The heartbeat of one loop. It runs while the loop has a lease, and writes only where there is one to name.

    Args:
        loop: The loop.
        registry: Writes the heartbeat.
        limits: The gateway's limits.
        registrations: Returns the registrations of all leases of the loop, each with the id of its lease.
        now: Returns the wall clock's time in seconds.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: CallbackLeaseRegistry,
        limits: GatewayLimits,
        registrations: Callable[[], Iterable[tuple[str, LeaseRegistration]]],
        now: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._limits = limits
        self._registrations = registrations
        self._now = now
        self._next: asyncio.TimerHandle | None = None
        self._running = False
        self._stopped = False
        self._named_any = False
        """Whether the last heartbeat named a lease. The next one says that there is none any more."""

    def start(self) -> None:
        """Makes it run, because there is a lease. Does nothing if it runs, or was ended."""
        if self._next is None and not self._running and not self._stopped:
            self._beat_at(next_beat(self._loop.time(), self._limits))

    def stop(self) -> None:
        """Ends it: the gateway closes. A heartbeat that is being written is the last one."""
        self._stopped = True
        if self._next is not None:
            self._next.cancel()
        self._next = None

    def _beat_at(self, at: float) -> None:
        self._next = self._loop.call_at(at, self._beat)

    def _beat(self) -> None:
        self._next = None
        asked_at, asked_at_wall = self._loop.time(), self._now()
        registrations = list(self._registrations())
        named = [
            (lease_id, registration, connections)
            for lease_id, registration in registrations
            if (connections := registration.connections_for_heartbeat()) is not None
        ]
        if not named and not self._named_any:
            if registrations:  # one of them may have a connection by then
                self._beat_at(next_beat(asked_at, self._limits))
            return
        self._running, self._named_any = True, bool(named)

        def written(error: BkpoolError | None) -> None:
            if error is None:
                for _, registration, connections in named:
                    if connections:
                        registration.renewed_by_heartbeat(asked_at, asked_at_wall)
            self._again(failed=error is not None)

        self._registry.beat({lease_id: connections for lease_id, _, connections in named}, written)

    def _again(self, *, failed: bool) -> None:
        self._running = False
        if self._stopped:
            return
        at = next_beat(self._loop.time(), self._limits)
        self._beat_at(min(at, self._loop.time() + self._limits.retry_renewal_after) if failed else at)


def next_beat(now: float, limits: GatewayLimits) -> float:
    """When the loops of a gateway beat next. Their clocks show the same time."""
    interval = limits.heartbeat_interval
    begun = floor((now - limits.heartbeat_phase) / interval)
    return (begun + 1) * interval + limits.heartbeat_phase
