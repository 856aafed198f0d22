"""The number of connections with a lease, in each pool and in all: one count for all loops of the gateway.

It knows no connection. A caller that takes a place must give it back.
"""

from __future__ import annotations

import threading
from collections import Counter

from bkpool.core.errors import NoCapacity
from bkpool.core.names import Key
from bkpool.gateway.session.limits import GatewayLimits


class Capacity:
    """The connections that a gateway may have. Safe to use from any thread.

    Args:
        limits: The gateway's limits.
    """

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._by_pool: Counter[Key] = Counter()
        self._total = 0

    def take(self, pool: Key) -> None:
        """Takes a place of this pool.

        Raises:
            NoCapacity: The pool or the gateway has no place left.
        """
        limits = self._limits
        with self._lock:
            if self._total >= limits.connections:
                raise _full(f"the gateway already has {limits.connections} open connections")
            if self._by_pool[pool] >= limits.connections_per_pool:
                raise _full(f"pool {pool} already has {limits.connections_per_pool} open connections")
            self._by_pool[pool] += 1
            self._total += 1

    def give_back(self, pool: Key) -> None:
        """Gives a place back that was taken."""
        with self._lock:
            self._total -= 1
            self._by_pool[pool] -= 1
            if not self._by_pool[pool]:
                del self._by_pool[pool]


def _full(message: str) -> NoCapacity:
    return NoCapacity(message, hint="Try again when other builds have ended.")
