"""The caches of workers by pool, kept from change to change, so that a choice does not look at those of all pools.

A cache that is reported late costs a worse choice and nothing else. It never changes a cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from bkpool.core.names import Key, Slot
from bkpool.core.observation import SeenCache

_NONE: Mapping[Slot, str | None] = MappingProxyType({})


class ReportedCaches(Protocol):
    """What it needs of the workers' caches (`workers.caches.Caches`)."""

    def owners(self) -> Mapping[Slot, str | None]:
        """Every cache, with its owner."""

    def cache(self, slot: Slot) -> SeenCache | None:
        """The cache of one slot; None: there is none."""

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when the cache of a slot may have changed. Returns a function that unsubscribes."""


class KnownCaches:
    """The caches of each pool.

    Args:
        caches: The workers' caches.
    """

    def __init__(self, caches: ReportedCaches) -> None:
        self._caches = caches
        self._of: defaultdict[Key, dict[Slot, str | None]] = defaultdict(dict)
        self._unsubscribe = caches.on_change(self._on_change)
        self._changed: set[Slot] = set(caches.owners())

    def close(self) -> None:
        """Stops listening."""
        self._unsubscribe()

    def of(self, pool: Key) -> Mapping[Slot, str | None]:
        """The caches of a pool's slots, each with the digest of its owner; None: nobody has used it."""
        for slot in self._changed:
            self._put(slot, self._caches.cache(slot))
        self._changed.clear()
        return self._of.get(pool, _NONE)

    def _on_change(self, slot: Slot) -> None:
        self._changed.add(slot)

    def _put(self, slot: Slot, seen: SeenCache | None) -> None:
        pool = Key(slot.namespace, slot.pool)
        if seen is not None:
            self._of[pool][slot] = seen.owner
            return
        self._of[pool].pop(slot, None)
        if not self._of[pool]:
            del self._of[pool]
