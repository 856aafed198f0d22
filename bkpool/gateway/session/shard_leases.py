"""The leases that this gateway's loop has connections of: who may join, what ends them, and their registrations.

A lease tells its connections of changes, and the registry of itself before any of them is dialled (DESIGN rule 10).
It does no I/O; its callbacks run in the gateway's loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from bkpool.core.errors import BkpoolError, Forbidden, Gone, NoCapacity
from bkpool.core.names import Key
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.hold_budget import HoldBudget
from bkpool.gateway.session.lease_table import LeaseRoute, LeaseTable, PastLease, unknown_lease
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.pki.names import pool_named

Told = Callable[[BkpoolError | None], None]
"""Called in the gateway's loop with how it went."""


class Registry(Protocol):
    """Keeps this gateway's entry in a worker's status, and looks for leases that are newer than the table.

    Answers in the gateway's loop, bounded in time.
    """

    def register(self, route: LeaseRoute, connections: int, told: Told) -> None:
        """Enters this gateway with so many connections; Gone if the worker is not, or no longer, of this lease."""

    def renew(self, route: LeaseRoute, connections: int, told: Told) -> None:
        """Says that this gateway still has connections, and how many; Gone if the worker has another lease."""

    def withdraw(self, route: LeaseRoute, told: Told) -> None:
        """Takes the entry out."""

    def find(self, token_sha256: str, told: Told) -> None:
        """Looks in the store for the lease with this token. If there is one it is in the table when this answers."""


class Member(Protocol):
    """A connection, as its lease sees it."""

    def rerouted(self, route: LeaseRoute) -> None:
        """The worker came or went, or the lease has a new end."""

    def parted(self) -> None:
        """The worker has ended another connection, before its client did."""

    def lease_ended(self, why: BkpoolError, cut_in: float) -> None:
        """New connections are refused; this one has so many seconds at most."""

    def lease_resumed(self) -> None:
        """The lease was renewed after all."""

    def cut(self, reason: str) -> None:
        """The worker is not this lease's any more."""


class ShardLeases:
    """Everything this loop knows about leases.

    Args:
        loop: The gateway's loop: its clock and timers.
        registry: Where leases are registered.
        now: The time by which leases expire.
        limits: The bounds.
        capacity: The places of the whole gateway.
        pool: The only pool whose leases are admitted; None admits those of all.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        registry: Registry,
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
        self._leases: dict[str, ShardLease] = {}  # by digest of the token

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now().timestamp()

    def admit(self, token_sha256: str, member: Member, asked_for: str | None = None) -> ShardLease:
        """Makes a connection a member of the lease that its token is of.

        Args:
            token_sha256: The digest of the token.
            member: The connection.
            asked_for: The name under which it came (SNI). One that is a pool's Service leads to that pool only.

        Raises:
            Unauthenticated: No lease has this token.
            Gone, WorkerFailed: The lease is over.
            Forbidden: It is of a pool that this gateway does not serve, or that the client did not ask for.
            NoCapacity: There are too many connections already.
        """
        self._check_pool(token_sha256, asked_for)
        lease = self._living(token_sha256)
        if len(lease.members) >= self.limits.per_lease:
            raise NoCapacity(
                f"this lease has {self.limits.per_lease} connections open already",
                hint="Run fewer builds at once on it, or run `bkpool allocate` for a second worker.",
            )
        self._capacity.take(lease.route.pool)
        lease.members[member] = None
        return lease

    def leave(self, lease: ShardLease, member: Member) -> None:
        """The connection is closed, or refused."""
        del lease.members[member]
        self._capacity.give_back(lease.route.pool)
        lease.tidy()

    def knows(self, token_sha256: str) -> bool:
        """Whether there is, or was, a lease with this token."""
        return self._found(token_sha256) is not None

    def pool_of(self, token_sha256: str) -> str:
        """The name of the pool whose lease this is or was; empty if unknown."""
        found = self._found(token_sha256)
        return found.pool.name if found else ""

    def update(self, table: LeaseTable) -> None:
        """Takes over a newer table."""
        self._table = table
        for token_sha256, lease in list(self._leases.items()):
            route = table.routes.get(token_sha256)
            if route is not None and route.allocation_id == lease.route.allocation_id:
                lease.changed(route)
            else:
                past = table.past.get(token_sha256)
                lease.end(past.over() if past else unknown_lease())

    def withdraw_all(self) -> None:
        """This gateway closes, and has no connection left."""
        for lease in list(self._leases.values()):
            lease.registration.withdraw()

    def forget(self, lease: ShardLease) -> None:
        """A lease is over, and so is everything of it here."""
        self._leases.pop(lease.route.token_sha256, None)

    def _check_pool(self, token_sha256: str, asked_for: str | None) -> None:
        found = self._found(token_sha256)
        if found is None:
            return
        if self._pool is not None and found.pool != self._pool:
            raise _wrong_pool(f"this is the gateway of pool {self._pool}", found.pool)
        asked = pool_named(asked_for) if asked_for else None
        if asked in self._table.pools and found.pool != asked:
            raise _wrong_pool(f"this connection is for pool {asked}, by the name {asked_for}", found.pool)

    def _found(self, token_sha256: str) -> LeaseRoute | PastLease | None:
        return self._table.routes.get(token_sha256) or self._table.past.get(token_sha256)

    def _living(self, token_sha256: str) -> ShardLease:
        route, past = self._table.routes.get(token_sha256), self._table.past.get(token_sha256)
        if route is None:
            raise past.over() if past else unknown_lease()
        over = route.over(self.now())
        if over is not None:
            raise over
        lease = self._leases.get(token_sha256)
        if lease is None:
            lease = self._leases[token_sha256] = ShardLease(self, route)
        return lease


class ShardLease:
    """One lease, its connections here, and the clock by which it ends."""

    def __init__(self, leases: ShardLeases, route: LeaseRoute) -> None:
        self.route = route
        self.members: dict[Member, None] = {}
        self.over: BkpoolError | None = None
        self.patience = HoldBudget(leases.limits)
        self.registration = Registration(leases, self)
        self._leases = leases
        self._expiry: asyncio.TimerHandle | None = None
        self._await_expiry()

    def changed(self, route: LeaseRoute) -> None:
        """The lease was renewed or has ended, or its worker came or went."""
        if route == self.route and self.over is None:
            return
        self.route = route
        over = route.over(self._leases.now())
        if over is not None:
            self.end(over)
            return
        if self.over is not None:  # it was renewed while our table was behind
            self.over = None
            for member in list(self.members):
                member.lease_resumed()
        self._await_expiry()
        for member in list(self.members):
            member.rerouted(route)

    def end(self, why: BkpoolError) -> None:
        """New connections are refused from now on, and open ones get the pool's drainTimeout (DESIGN rule 8)."""
        if self.over is not None:
            return
        self.over = why
        self._cancel_expiry()
        cut_in = max(0.0, min(self.route.drain_timeout, self.route.not_after - self._leases.now()))
        for member in list(self.members):
            member.lease_ended(why, cut_in)
        self.tidy()

    def parted(self) -> None:
        """The worker has ended a connection, before its client did."""
        self.patience.parted(self._leases.loop.time())
        for member in list(self.members):
            member.parted()

    def lost(self, why: Gone) -> None:
        """The worker is another lease's: nothing of this one may reach it any longer."""
        self.end(why)
        for member in list(self.members):
            member.cut(why.message)

    def tidy(self) -> None:
        """Lets go of what nobody needs any more."""
        self.registration.rest_or_renew()
        if self.over is not None and not self.members:
            self.registration.withdraw()
            self._leases.forget(self)

    def _await_expiry(self) -> None:
        self._cancel_expiry()
        left = max(0.0, self.route.expires_at - self._leases.now())
        self._expiry = self._leases.loop.call_later(left, self._judge)

    def _judge(self) -> None:
        over = self.route.over(self._leases.now())
        if over is None:  # the clock was set back
            self._await_expiry()
        else:
            self.end(over)

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()


class Registration:
    """This gateway's entry in the worker's status, as far as the loop knows. One request is under way at a time."""

    def __init__(self, leases: ShardLeases, lease: ShardLease) -> None:
        self._leases = leases
        self._lease = lease
        self._asking: list[Told] = []
        self._busy = False
        self._withdrawn = False
        self._renewal: asyncio.TimerHandle | None = None
        self._renew_at = 0.0
        self._trusted_until = 0.0

    def ensure(self, told: Told) -> None:
        """Calls back once this gateway is registered, at once if it is; or with why it cannot be."""
        if self._leases.loop.time() < self._trusted_until:
            told(None)
            self.rest_or_renew()
            return
        self._asking.append(told)
        if not self._busy:
            self._request(self._leases.registry.register)

    def rest_or_renew(self) -> None:
        """Keeps the registration while there are connections, and lets it run out when there are none."""
        needed = bool(self._lease.members and self._trusted_until and not self._busy)
        if needed and self._renewal is None:
            self._renewal = self._leases.loop.call_at(self._renew_at, self._request, self._leases.registry.renew)
        elif not needed:
            self._rest()

    def withdraw(self) -> None:
        """Takes the entry out at once; behind a request that is under way, which would put it in again."""
        self._withdrawn = True
        if not self._busy and self._trusted_until:
            self._trusted_until = 0.0
            self._leases.registry.withdraw(self._lease.route, _unheard)

    def _rest(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    def _request(self, request: Callable[[LeaseRoute, int, Told], None]) -> None:
        self._rest()
        self._busy = True
        begun = self._leases.loop.time()
        renewing = request == self._leases.registry.renew
        request(self._lease.route, len(self._lease.members), lambda error: self._answered(begun, renewing, error))

    def _answered(self, begun: float, renewing: bool, error: BkpoolError | None) -> None:
        limits = self._leases.limits
        self._busy = False
        if error is None:
            self._trusted_until = begun + limits.registered
            self._renew_at = begun + limits.renew
        else:
            self._renew_at = self._leases.loop.time() + limits.renew / 4
        asking, self._asking = self._asking, []
        for told in asking:
            told(error)
        if isinstance(error, Gone):
            self._refused(error, renewing)
        if self._withdrawn:
            self.withdraw()
        else:
            self.rest_or_renew()

    def _refused(self, error: Gone, renewing: bool) -> None:
        if renewing:  # which an ended lease may still do: the worker is another's
            self._trusted_until = 0.0
            self._lease.lost(error)
        else:
            self._lease.end(error)


def _wrong_pool(meant: str, other: Key) -> Forbidden:
    return Forbidden(
        f"{meant}; the certificate is for a lease of pool {other}",
        hint="Use the gatewayEndpoint that `bkpool allocate` gave with the certificate.",
        code="WrongPool",
    )


def _unheard(error: BkpoolError | None) -> None:
    """Nobody waits for a withdrawal: an entry that stays runs out by itself."""
