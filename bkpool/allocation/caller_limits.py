"""How many leases and requests one caller, and all callers of a pool, may have: `spec.auth.limits`.

Leases are counted over all replicas. Open requests and requests of the last minute are counted by each replica for
itself. A refused request does not count. This module never waits.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

from bkpool.core.auth import Allowance
from bkpool.core.errors import NoCapacity
from bkpool.core.live_leases import LiveLeases
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.identity import Identity

_WINDOW = 60.0  # seconds: "per minute"
_RETRY_AFTER = 10  # seconds: nobody knows when a lease will end


@dataclass(slots=True)
class _Account:
    """What one caller, or all callers of a pool, asked this replica for."""

    times: deque[float] = field(default_factory=deque)
    """The times of requests within the window: at most as many as are allowed."""
    open_requests: Counter[Hashable] = field(default_factory=Counter)
    """Requests without a lease so far. A request and its repetitions count as one."""

    def check_waiting(self, most: int | None, limit: str, who: str) -> None:
        """Raises NoCapacity if one more request, or repetition of one, would be too many."""
        waiting = self.open_requests.total()
        if most is not None and waiting >= most:
            raise _reached(
                f"{limit}.waiters: {waiting} requests of {who} wait already, and at most {most} may",
                "Wait until one of them has its lease",
                _RETRY_AFTER,
            )

    def check(self, allowed: Allowance, limit: str, who: str, leases: Callable[[], int], now: float) -> None:
        """Raises NoCapacity if one more would be too many. Leases are counted only if there is a limit of them."""
        if allowed.leases is not None and (have := leases() + len(self.open_requests)) >= allowed.leases:
            raise _too_many_leases(limit, who, allowed.leases, f"has or waits for {have}")
        self._forget(now)
        if allowed.per_minute is not None and len(self.times) >= allowed.per_minute:
            free_at = self.times[len(self.times) - allowed.per_minute] + _WINDOW  # the limit may be lower than before
            raise _reached(
                f"{limit}.perMinute: {who} may ask {allowed.per_minute} times a minute, and did so already",
                "Ask less often",
                max(1, math.ceil(free_at - now)),
            )

    def enter(self, allowed: Allowance, request: Hashable, now: float) -> None:
        self.open_requests[request] += 1
        if allowed.per_minute is not None and self.open_requests[request] == 1:
            self.times.append(now)

    def leave(self, request: Hashable) -> None:
        self.open_requests[request] -= 1
        if not self.open_requests[request]:
            del self.open_requests[request]

    def idle(self, now: float) -> bool:
        self._forget(now)
        return not self.times and not self.open_requests

    def _forget(self, now: float) -> None:
        while self.times and self.times[0] <= now - _WINDOW:
            self.times.popleft()


class CallerLimits:
    """Counts requests for leases and refuses what is too much.

    Args:
        clock: Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[tuple[Key, str], _Account] = {}
        """By pool and the caller's digest (empty: all callers). Empty accounts are dropped within minutes."""
        self._swept = clock()
        self._claiming: set[str] = set()
        """The ids of leases that open requests are claiming. They may be stored already."""

    @contextmanager
    def one_more(
        self,
        pool: Pool,
        caller: Identity,
        request: Hashable,
        held: LiveLeases,
        *,
        at: datetime,
        most_waiting: int | None = None,
    ) -> Iterator[Callable[[str], None]]:
        """Admits one request for a lease, which is open until the block ends.

        The block gets a function, to be called with the id of each lease that the request is about to claim. Without
        it, a lease would be counted twice between its creation and the end of the block.

        Args:
            pool: The pool that has the limits.
            caller: The caller.
            request: Identifies the request; equal for a request that repeats another one.
            held: The leases of the pool.
            at: The time, by which leases expire.
            most_waiting: How many requests of this caller may wait; None: no limit.

        Raises:
            NoCapacity: `LimitReached`. The message names the limit's field and its value.
        """
        now, limits = self._clock(), pool.spec.auth.limits
        self._sweep(now)
        of_caller = self._accounts.setdefault((pool.key, caller.digest), _Account())
        of_all = self._accounts.setdefault((pool.key, ""), _Account())
        of_one, of_pool, who = "spec.auth.limits.identity", "spec.auth.limits.pool", f"all callers of {pool.key.name}"
        of_caller.check_waiting(most_waiting, of_one, caller.name)
        of_all.check_waiting(limits.pool.waiters, of_pool, who)
        if request not in of_caller.open_requests:
            own_leases = partial(held.count_of, caller.digest, at, self._claiming)
            of_caller.check(limits.identity, of_one, caller.name, own_leases, now)
            of_all.check(limits.pool, of_pool, f"{who} together", partial(held.count, at, self._claiming), now)
        of_caller.enter(limits.identity, request, now)
        of_all.enter(limits.pool, request, now)
        claims: list[str] = []

        def about_to_claim(lease_id: str) -> None:
            claims.append(lease_id)
            self._claiming.add(lease_id)

        try:
            yield about_to_claim
        finally:
            self._claiming.difference_update(claims)
            of_caller.leave(request)
            of_all.leave(request)

    def check_again(self, pool: Pool, caller: Identity, held: LiveLeases, *, at: datetime) -> None:
        """Refuses a request that has waited if there are as many leases as its pool, as it is now, allows.

        Requests that wait do not count: otherwise several of one caller would refuse each other.

        Args:
            pool: The pool that has the limits.
            caller: The caller.
            held: The leases of the pool.
            at: The time, by which leases expire.

        Raises:
            NoCapacity: `LimitReached`, as in `one_more`.
        """
        limits, who = pool.spec.auth.limits, f"all callers of {pool.key.name} together"
        most, most_of_all = limits.identity.leases, limits.pool.leases
        if most is not None and (have := held.count_of(caller.digest, at, self._claiming)) >= most:
            raise _too_many_leases("spec.auth.limits.identity", caller.name, most, f"has {have}")
        if most_of_all is not None and (have := held.count(at, self._claiming)) >= most_of_all:
            raise _too_many_leases("spec.auth.limits.pool", who, most_of_all, f"has {have}")

    def _sweep(self, now: float) -> None:
        if now - self._swept >= _WINDOW:
            self._swept = now
            self._accounts = {key: account for key, account in self._accounts.items() if not account.idle(now)}


def _too_many_leases(limit: str, who: str, most: int, have: str) -> NoCapacity:
    message = f"{limit}.leases: {who} may have {most} leases at once, and {have}"
    return _reached(message, "Release a lease", _RETRY_AFTER)


def _reached(message: str, hint: str, retry_after: int) -> NoCapacity:
    return NoCapacity(
        message,
        hint=f"{hint}, or ask the operator of the appliance to raise this limit of the pool.",
        code="LimitReached",
        field=message.partition(":")[0],
        retry_after=retry_after,
    )
