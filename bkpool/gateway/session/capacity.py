"""How many connections hold a lease, in each pool and in all: one count for all loops of the gateway.

It knows no connection; whoever takes a place gives it back.
"""

from __future__ import annotations

import threading
from collections import Counter

from bkpool.core.errors import NoCapacity
from bkpool.core.names import Key
from bkpool.gateway.session.limits import GatewayLimits


class Capacity:
    """The places of a gateway. Safe to use from any thread.

    Args:
        limits: The bounds.
    """

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._taken: Counter[Key] = Counter()
        self._all = 0

    def take(self, pool: Key) -> None:
        """Takes a place. Raises NoCapacity: there is none."""
        limits = self._limits
        with self._lock:
            if self._all >= limits.connections:
                raise _full(f"the gateway has {limits.connections} connections open already")
            if self._taken[pool] >= limits.per_pool:
                raise _full(f"pool {pool} has {limits.per_pool} connections open already")
            self._taken[pool] += 1
            self._all += 1

    def give_back(self, pool: Key) -> None:
        """Gives back a place that was taken."""
        with self._lock:
            self._all -= 1
            self._taken[pool] -= 1
            if not self._taken[pool]:
                del self._taken[pool]


def _full(message: str) -> NoCapacity:
    return NoCapacity(message, hint="Try again later.")
