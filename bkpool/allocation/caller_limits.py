"""How much of a pool one caller, and all together, may ask for: `spec.auth.limits`.

Counted by each replica for itself: the leases are everybody's, but requests under way and requests of the last minute
are those that came here. It refuses; it never waits, and what it refused does not count.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bkpool.core.auth import Allowance
from bkpool.core.errors import NoCapacity
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.worker import Lease
from bkpool.identity import Identity

_WINDOW = 60.0  # seconds: "per minute"
_TRY_AGAIN = 10  # seconds: when a lease ends nobody knows


@dataclass(slots=True)
class _Account:
    """What one caller, or all callers of a pool, asked for here."""

    asked: deque[float] = field(default_factory=deque)
    """When, within the window; at most as many as are allowed."""
    under_way: Counter[Hashable] = field(default_factory=Counter)
    """Requests that have no lease yet; repeated ones are one."""

    def check(self, allowed: Allowance, limit: str, who: str, leases: int, now: float) -> None:
        """Raises NoCapacity if one more would be too many."""
        have = leases + len(self.under_way)
        if allowed.leases is not None and have >= allowed.leases:
            raise _reached(
                f"{limit}.leases: {who} may have {allowed.leases} leases at once, and has or waits for {have}",
                "Release one",
                _TRY_AGAIN,
            )
        self._forget(now)
        if allowed.per_minute is not None and len(self.asked) >= allowed.per_minute:
            room_at = self.asked[len(self.asked) - allowed.per_minute] + _WINDOW  # it may have been lowered meanwhile
            raise _reached(
                f"{limit}.perMinute: {who} may ask {allowed.per_minute} times a minute, and did",
                "Ask less often",
                max(1, math.ceil(room_at - now)),
            )

    def enter(self, allowed: Allowance, request: Hashable, now: float) -> None:
        self.under_way[request] += 1
        if allowed.per_minute is not None and self.under_way[request] == 1:
            self.asked.append(now)

    def leave(self, request: Hashable) -> None:
        self.under_way[request] -= 1
        if not self.under_way[request]:
            del self.under_way[request]

    def idle(self, now: float) -> bool:
        self._forget(now)
        return not self.asked and not self.under_way

    def _forget(self, now: float) -> None:
        while self.asked and self.asked[0] <= now - _WINDOW:
            self.asked.popleft()


class CallerLimits:
    """Counts requests for leases and refuses what is too much.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[tuple[Key, str], _Account] = {}
        """By pool and caller's digest (empty: all of them). One without anything in it is dropped within minutes."""
        self._swept = clock()
        self._claiming: set[str] = set()
        """Leases of requests under way, which may be stored already."""

    @contextmanager
    def one_more(
        self, pool: Pool, caller: Identity, request: Hashable, held: Collection[Lease]
    ) -> Iterator[Callable[[str], None]]:
        """Lets a request for a lease through; it is under way until the block ends.

        What is entered is to be told the id of each lease that the request is about to claim: between its being
        stored and the end of the block it would be counted twice.

        Args:
            pool: Whose limits they are.
            caller: Who asks.
            request: Equal to that of a request which this one repeats.
            held: The living leases of the pool.

        Raises:
            NoCapacity: `LimitReached`; the message names the limit's field and its number.
        """
        now, limits = self._clock(), pool.spec.auth.limits
        self._sweep(now)
        mine = self._accounts.setdefault((pool.key, caller.digest), _Account())
        everybodys = self._accounts.setdefault((pool.key, ""), _Account())
        if request not in mine.under_way:
            holders = [lease.holder for lease in held if lease.id not in self._claiming]
            own = holders.count(caller.digest)
            mine.check(limits.identity, "spec.auth.limits.identity", caller.name, own, now)
            who = f"all callers of {pool.key.name} together"
            everybodys.check(limits.pool, "spec.auth.limits.pool", who, len(holders), now)
        mine.enter(limits.identity, request, now)
        everybodys.enter(limits.pool, request, now)
        claims: list[str] = []

        def claiming(allocation_id: str) -> None:
            claims.append(allocation_id)
            self._claiming.add(allocation_id)

        try:
            yield claiming
        finally:
            self._claiming.difference_update(claims)
            mine.leave(request)
            everybodys.leave(request)

    def _sweep(self, now: float) -> None:
        if now - self._swept >= _WINDOW:
            self._swept = now
            self._accounts = {key: account for key, account in self._accounts.items() if not account.idle(now)}


def _reached(message: str, hint: str, retry_after: int) -> NoCapacity:
    return NoCapacity(
        message,
        hint=f"{hint}, or have whoever runs the appliance raise the pool's limit.",
        code="LimitReached",
        field=message.partition(":")[0],
        retry_after=retry_after,
    )
