"""The leases that one loop of the gateway has connections of: which connections may join, and what ends them.

A lease reports changes to its connections. Nothing here does I/O. Everything runs in the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Protocol

from bkpool.core.errors import BkpoolError, Forbidden, NoCapacity
from bkpool.core.names import Key
from bkpool.core.wall_clock import LONGEST_SLEEP
from bkpool.gateway.net.relay import WorkerBytes
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.hold_budget import HoldBudget
from bkpool.gateway.session.lease_heartbeat import LeaseHeartbeat
from bkpool.gateway.session.lease_registration import CallbackLeaseRegistry, LeaseRegistration
from bkpool.gateway.session.lease_table import (
    LeaseRoute,
    LeaseTable,
    PastLease,
    TableChange,
    UnreadableLease,
    unknown_lease,
)
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.worker_silence import Report, WorkerSilence
from bkpool.pki.names import pool_named


class LeaseMember(Protocol):
    """A connection, as its lease sees it."""

    @property
    def worker_bytes(self) -> WorkerBytes | None:
        """What it knows of its worker; None: it is not connected to it."""

    def route_changed(self, route: LeaseRoute) -> None:
        """The worker has started or ended, or the lease has a new expiry."""

    def worker_closed_sibling(self) -> None:
        """The worker closed another connection of the lease before its client did."""

    def lease_ended(self, error: BkpoolError, cut_in: float) -> None:
        """The lease has ended. New connections get the error; this one may last for at most `cut_in` seconds."""

    def lease_resumed(self) -> None:
        """The lease was renewed before it ended; this gateway learns of it only now."""

    def cut(self, reason: str) -> None:
        """The connection must end now."""


class ShardLeases:
    """All leases that one loop knows.

    Args:
        loop: The loop: its clock and timers.
        registry: Registers leases at their workers.
        now: Returns the time against which leases expire.
        limits: The gateway's limits.
        capacity: Counts the connections of the whole gateway.
        pool: The only pool whose leases are accepted; None accepts the leases of all pools.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: CallbackLeaseRegistry,
        now: Callable[[], datetime],
        limits: GatewayLimits,
        capacity: Capacity,
        *,
        pool: Key | None = None,
    ) -> None:
        self.loop = loop
        self.registry = registry
        self.limits = limits
        self._capacity = capacity
        self._now = now
        self._pool = pool
        self._table = LeaseTable()
        self._leases: dict[str, ShardLease] = {}  # by the digest of the token
        self._heartbeat = LeaseHeartbeat(loop, registry, limits, self._registrations, self.now)

    def now(self) -> float:
        """Returns the time in seconds since the epoch."""
        return self._now().timestamp()

    def take_slot(self, token_sha256: str, member: LeaseMember, server_name: str | None = None) -> ShardLease:
        """Adds a connection to the lease of its token.

        Args:
            token_sha256: The digest of the token.
            member: The connection.
            server_name: The name that the client asked for (SNI). If it is that of a pool's Service, the lease must
                be of that pool.

        Raises:
            Unauthenticated: No lease has this token.
            Gone, WorkerFailed: The lease has ended.
            UnreadableObject: Its worker cannot be read.
            Forbidden: The lease is of a pool that this gateway does not serve, or that the client did not ask for.
            NoCapacity: There are too many connections.
        """
        self._check_pool(token_sha256, server_name)
        lease = self._valid_lease(token_sha256)
        if len(lease.members) >= self.limits.connections_per_lease:
            raise NoCapacity(
                f"this lease already has {self.limits.connections_per_lease} open connections",
                hint="Run fewer builds at once on it, or run `bkpool allocate` for a second worker.",
            )
        self._capacity.take(lease.route.pool)
        lease.members[member] = None
        lease.watch_worker()
        self._heartbeat.start()
        return lease

    def return_slot(self, lease: ShardLease, member: LeaseMember) -> None:
        """Removes a connection that is closed or refused from its lease."""
        del lease.members[member]
        self._capacity.give_back(lease.route.pool)
        lease.clean_up()

    def knows(self, token_sha256: str) -> bool:
        """Whether the table has, or had, a lease with this token."""
        return self._entry(token_sha256) is not None

    def pool_of(self, token_sha256: str) -> Key | None:
        """Returns the pool of this present or past lease; None if the lease is unknown."""
        entry = self._entry(token_sha256)
        return entry.pool if entry else None

    def update(self, change: TableChange) -> None:
        """Changes the table, and reports that to the leases that the change concerns."""
        for token_sha256 in self._table.apply(change):
            lease = self._leases.get(token_sha256)
            if lease is not None:
                self._review(lease)

    def withdraw_all(self) -> None:
        """Withdraws all registrations. Called when the gateway closes and has no connection left."""
        self._heartbeat.stop()
        for lease in list(self._leases.values()):
            lease.registration.withdraw()

    def forget(self, lease: ShardLease) -> None:
        """Removes a lease that has ended and has no connection left."""
        self._leases.pop(lease.route.token_sha256, None)

    def _review(self, lease: ShardLease) -> None:
        token_sha256 = lease.route.token_sha256
        route = self._table.route(token_sha256)
        if route is not None and route.lease_id == lease.route.lease_id:
            lease.change_route(route)
        elif self._table.can_be_read(lease.route.worker):  # else its open connections may go on
            past = self._table.past(token_sha256)
            error = past.end_error() if past else unknown_lease()
            vanished = past is None and not self._table.has(lease.route.worker)
            if (lease.registration.is_registered and not vanished) or (past is not None and past.revoked):
                lease.cut(error)  # it leaves its worker only when nobody is registered, so another may hold that
            else:
                lease.end(error)
                if vanished:  # perhaps only from view, as a worker that has lost its label
                    lease.registration.check()

    def _registrations(self) -> Iterator[tuple[str, LeaseRegistration]]:
        for lease in self._leases.values():
            yield lease.route.lease_id, lease.registration

    def _check_pool(self, token_sha256: str, server_name: str | None) -> None:
        entry = self._entry(token_sha256)
        if entry is None:
            return
        if self._pool is not None and entry.pool != self._pool:
            raise _wrong_pool(f"this is the gateway of pool {self._pool}", entry.pool)
        wanted = pool_named(server_name) if server_name else None
        if wanted in self._table.pools and entry.pool != wanted:
            raise _wrong_pool(f"the name {server_name} is that of pool {wanted}", entry.pool)

    def _entry(self, token_sha256: str) -> LeaseRoute | PastLease | UnreadableLease | None:
        table = self._table
        return table.route(token_sha256) or table.past(token_sha256) or table.unreadable(token_sha256)

    def _valid_lease(self, token_sha256: str) -> ShardLease:
        route = self._table.route(token_sha256)
        if route is None:
            over = self._table.past(token_sha256) or self._table.unreadable(token_sha256)
            raise over.end_error() if over else unknown_lease()
        error = route.end_error(self.now())
        if error is not None:
            raise error
        lease = self._leases.get(token_sha256)
        if lease is None:
            lease = self._leases[token_sha256] = ShardLease(self, route)
        return lease


class ShardLease:
    """One lease in its loop: its connections, and the timer that ends it.

    Args:
        leases: All leases of the loop.
        route: The lease and the address of its worker.
    """

    def __init__(self, leases: ShardLeases, route: LeaseRoute) -> None:
        self.route = route
        self.members: dict[LeaseMember, None] = {}
        self.end_error: BkpoolError | None = None
        """The error for new connections after the lease's end; None while the lease is valid."""
        self.hold_budget = HoldBudget(leases.limits)
        self.registration = LeaseRegistration(leases.loop, leases.registry, leases.limits, self, leases.now)
        self._leases = leases
        self._silence = WorkerSilence(leases.limits)
        self._silence.noted(leases.loop.time(), silent=route.silent)
        self._next_look: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._schedule_expiry()

    @property
    def connections(self) -> int:
        """How many connections of the lease this loop has."""
        return len(self.members)

    def change_route(self, route: LeaseRoute) -> None:
        """Takes over a route that may have a new expiry, an end or another address of the worker."""
        if route == self.route and self.end_error is None:
            return
        self.route = route
        self._silence.noted(self._leases.loop.time(), silent=route.silent)
        error = route.end_error(self._leases.now())
        if error is not None:
            if route.revoked:
                self.cut(error)
            else:
                self.end(error)
            return
        if self.end_error is not None:  # it was renewed while this gateway's table was old
            self.end_error = None
            for member in list(self.members):
                member.lease_resumed()
        self._schedule_expiry()
        for member in list(self.members):
            member.route_changed(route)

    def end(self, error: BkpoolError) -> None:
        """Ends the lease. New connections are refused, and open ones get the pool's drainTimeout.

        See rule 8, docs/rules.md#r8.
        """
        if self.end_error is not None:
            return
        self.end_error = error
        self._cancel_expiry()
        cut_in = max(0.0, min(self.route.drain_timeout, self.route.not_after - self._leases.now()))
        for member in list(self.members):
            member.lease_ended(error, cut_in)
        self._check_life()
        self.clean_up()

    def worker_closed_connection(self) -> None:
        """The worker closed a connection of the lease before its client did."""
        self.hold_budget.worker_closed_connection(self._leases.loop.time())
        for member in list(self.members):
            member.worker_closed_sibling()

    def worker_unreachable(self) -> None:
        """The worker could not be dialled."""
        self._report(self._silence.unreachable(self._leases.loop.time()))

    def watch_worker(self) -> None:
        """Looks from time to time whether bytes come from the worker, while the lease has connections."""
        if self._next_look is None:
            limits, loop = self._leases.limits, self._leases.loop
            self._next_look = loop.call_later(limits.worker_look_interval, self._look_at_worker)

    def _look_at_worker(self) -> None:
        self._next_look = None
        if self.members:
            connections = [known for member in self.members if (known := member.worker_bytes) is not None]
            self._report(self._silence.look(self._leases.loop.time(), connections))
            self.watch_worker()

    def _report(self, report: Report | None) -> None:
        if report is not None:
            self._leases.registry.report_worker(self.route, report.silent_for, self._reported)

    def _reported(self, error: BkpoolError | None) -> None:
        if error is not None:
            self._silence.not_reported()

    def cut(self, error: BkpoolError) -> None:
        """Ends the lease and cuts its connections, also those that drain already.

        The lease was revoked, or another lease holds the worker, so that no byte may reach it.
        """
        self.end(error)
        for member in list(self.members):
            member.cut(error.message)

    def clean_up(self) -> None:
        """Adjusts the registration to the connections left, and forgets the lease if it has ended and has none."""
        self.registration.schedule_renewal()
        if self.end_error is not None and not self.members:
            self._cancel_expiry()
            if self._next_look is not None:
                self._next_look.cancel()
            self.registration.withdraw()
            self._leases.forget(self)

    def _schedule_expiry(self) -> None:
        """Looks at the clock when the lease expires, and every LONGEST_SLEEP: the machine may sleep meanwhile."""
        self._cancel_expiry()
        seconds = max(0.0, self.route.expires_at - self._leases.now())
        self._expiry = self._leases.loop.call_later(min(seconds, LONGEST_SLEEP), self._check_expiry)

    def _check_expiry(self) -> None:
        error = self.route.end_error(self._leases.now())
        if error is None:
            self._schedule_expiry()
        else:
            self.end(error)

    def _check_life(self) -> None:
        """Cuts what drains beyond the lease's maximum life. The machine may sleep while it drains."""
        left = self.route.not_after - self._leases.now()
        if left > 0:
            self._expiry = self._leases.loop.call_later(min(left, LONGEST_SLEEP), self._check_life)
            return
        for member in list(self.members):
            member.cut("its lease has ended, and so has the time to drain")

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()


def _wrong_pool(wanted: str, pool: Key) -> Forbidden:
    return Forbidden(
        f"{wanted}, but the client certificate is for a lease of pool {pool}",
        hint="Use the gatewayEndpoint that `bkpool allocate` returned together with the certificate.",
        code="WrongPool",
    )
