"""The registration of one lease as its loop knows it: when to register, to renew and to withdraw.

A gateway registers at the worker before it dials it for the first time (rule 10, docs/rules.md#r10). Nothing here
does I/O: a `CallbackLeaseRegistry` carries out the requests. Everything runs in the lease's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from bkpool.core.errors import BkpoolError, Gone
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import GatewayLimits

OnDone = Callable[[BkpoolError | None], None]
"""Called once in the lease's loop, with None after success, otherwise with the error."""


class CallbackLeaseRegistry(Protocol):
    """The lease registry (`control.lease_registry.LeaseRegistry`) as the gateway's loops use it.

    Each call returns at once. The answer comes to `on_done`, in bounded time.
    """

    def register(self, route: LeaseRoute, connections: int, on_done: OnDone) -> None:
        """Registers this gateway with this many connections. Gone: the lease has ended, or holds no worker."""

    def renew(self, route: LeaseRoute, connections: int, on_done: OnDone) -> None:
        """Renews the registration with this many connections. Gone: the lease does not hold the worker."""

    def beat(self, leases: Mapping[str, int], on_done: OnDone) -> None:
        """Renews the registrations of these leases of this loop, by their id, with these connections."""

    def withdraw(self, route: LeaseRoute, on_done: OnDone) -> None:
        """Removes the registration."""

    def report_worker(self, route: LeaseRoute, silent_for: float | None, on_done: OnDone) -> None:
        """Notes on the worker that it has been silent for these seconds, or that bytes come from it (None)."""

    def find(self, token_sha256: str, on_done: OnDone) -> None:
        """Searches the store for the lease with this token. If it exists, it is in the table before `on_done`."""


class RegisteredLease(Protocol):
    """The lease that is registered."""

    route: LeaseRoute

    @property
    def connections(self) -> int:
        """How many connections of the lease this loop has."""

    def end(self, error: BkpoolError) -> None:
        """Ends the lease, with the error for its new connections."""

    def cut(self, error: BkpoolError) -> None:
        """Ends the lease and cuts its connections, for example because another lease holds the worker."""


class LeaseRegistration:
    """This gateway's registration for one lease. Only one request runs at a time.

    The gateway's heartbeat renews it (`lease_heartbeat`). If none does for `GatewayLimits.renew_interval`, it is
    renewed on the worker.

    Args:
        loop: The lease's loop.
        registry: Carries out the requests.
        limits: The gateway's limits.
        lease: The lease.
        now: Returns the wall clock's time in seconds. It also counts while the machine sleeps, unlike the loop's.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: CallbackLeaseRegistry,
        limits: GatewayLimits,
        lease: RegisteredLease,
        now: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._limits = limits
        self._lease = lease
        self._now = now
        self._callers: list[OnDone] = []
        self._request_running = False
        self._check_next = False
        """Whether the lease is to be checked once the running request is answered."""
        self._withdrawn = False
        self._renewal: asyncio.TimerHandle | None = None
        self._renew_at = 0.0
        self._trusted_until = 0.0
        self._trusted_until_wall = 0.0
        self._told_unused = False
        """Whether the registration says that there is no connection."""

    def ensure(self, on_done: OnDone) -> None:
        """Calls back once this gateway is registered (at once if it is already), or with the error."""
        if self._is_trusted:
            on_done(None)
            self.schedule_renewal()
            return
        self._callers.append(on_done)
        if not self._request_running:
            self._request(self._registry.register)

    @property
    def is_registered(self) -> bool:
        """Whether it was written, and neither withdrawn nor lost since. It may have expired."""
        return bool(self._trusted_until)

    @property
    def _is_trusted(self) -> bool:
        return self._loop.time() < self._trusted_until and self._now() < self._trusted_until_wall

    def connections_for_heartbeat(self) -> int | None:
        """The connections with which a heartbeat that is put together now must name the lease; None: it must not.

        It is named as long as it is trusted: a reader may have missed the heartbeat that renewed it. If the worker
        says that there is no connection, no heartbeat puts that off.
        """
        connections = self._lease.connections
        idle = not connections and (self._told_unused or not self._is_trusted)
        return None if self._withdrawn or idle or not self._trusted_until else connections

    def renewed_by_heartbeat(self, asked_at: float, asked_at_wall: float) -> None:
        """Notes that a heartbeat was written that named the lease with connections.

        One whose answer comes too late is not relied on: the controller may have taken the lease off its worker
        before the heartbeat was written (docs/decisions/0036).

        Args:
            asked_at: When it was put together, in the loop's time.
            asked_at_wall: The same by the wall clock.
        """
        if self._is_trusted:
            self._trust(asked_at, asked_at_wall)

    def _trust(self, since: float, since_wall: float) -> None:
        self._trusted_until = since + self._limits.registration_trust
        self._trusted_until_wall = since_wall + self._limits.registration_trust
        self._renew_at = since + self._limits.renew_interval

    def schedule_renewal(self) -> None:
        """Renews the registration in time while there are connections, and lets it expire when there are none.

        Of a lease that ends when it is unused, it also tells soon that there is no connection, or one again.
        """
        unused = self._lease.route.ends_when_unused and not self._lease.connections
        registered = bool(self._trusted_until and not self._request_running and not self._withdrawn)
        if not registered or (not self._lease.connections and (not unused or self._told_unused)):
            self._cancel_renewal()
            return
        at = self._loop.time() + self._limits.unused_pause if unused else self._renew_at
        if self._told_unused:
            at = 0.0
        if self._renewal is None or at < self._renewal.when():
            self._cancel_renewal()
            self._renewal = self._loop.call_at(at, self._renew_unless_put_off)

    def _renew_unless_put_off(self) -> None:
        """Renews it on the worker, unless a heartbeat has renewed it since this was scheduled."""
        self._renewal = None
        in_use = bool(self._lease.connections) and not self._told_unused
        if in_use and self._loop.time() < self._renew_at:
            self.schedule_renewal()
        else:
            self._request(self._registry.renew)

    def check(self) -> None:
        """Renews it on the worker at once, if there is one: the store says whether the lease still holds the worker.

        If it does not, the lease is cut. If the store does not answer, it is asked again soon.
        """
        if self._request_running:
            self._check_next = True
        elif self._trusted_until and not self._withdrawn:
            self._request(self._registry.renew)

    def withdraw(self) -> None:
        """Removes the registration now, or after the running request, which would write it again."""
        self._withdrawn = True
        self._cancel_renewal()
        if not self._request_running and self._trusted_until:
            self._trusted_until = 0.0
            self._registry.withdraw(self._lease.route, _ignore_result)

    def _cancel_renewal(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    def _request(self, request: Callable[[LeaseRoute, int, OnDone], None]) -> None:
        self._cancel_renewal()
        self._request_running = True
        requested_at, requested_at_wall, connections = self._loop.time(), self._now(), self._lease.connections
        renewing = request == self._registry.renew

        def answered(error: BkpoolError | None) -> None:
            self._told_unused = not connections if error is None else self._told_unused
            self._answered(requested_at, requested_at_wall, renewing, error)

        request(self._lease.route, connections, answered)

    def _answered(
        self, requested_at: float, requested_at_wall: float, renewing: bool, error: BkpoolError | None
    ) -> None:
        self._request_running = False
        if error is None:
            self._trust(requested_at, requested_at_wall)
        else:
            self._renew_at = self._loop.time() + self._limits.retry_renewal_after
        callers, self._callers = self._callers, []
        for on_done in callers:
            on_done(error)
        if isinstance(error, Gone):
            self._lease_gone(error, renewing)
        check, self._check_next = self._check_next, False
        if self._withdrawn:
            self.withdraw()
        elif check and error is None:
            self._request(self._registry.renew)
        else:
            self.schedule_renewal()

    def _lease_gone(self, error: Gone, renewing: bool) -> None:
        if renewing:  # an ended lease may still renew, so Gone means that another lease holds the worker
            self._trusted_until = 0.0
            self._lease.cut(error)
        else:
            self._lease.end(error)


def _ignore_result(error: BkpoolError | None) -> None:
    """A failed withdrawal needs no action: the registration expires by itself."""
