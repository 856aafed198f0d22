"""Which caches are wiped although nobody else wants their slot.

These are used ones that nobody may get again, those of slots beyond the pool's maximum, and those of a pool that is
removed. The cache of a slot that has a lease is never among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime

from bkpool.core.names import Slot
from bkpool.core.observation import Observation, SeenCache
from bkpool.core.pool import CachesBeyondMax, Pool, Reuse
from bkpool.core.removal import caches_due, removal_of
from bkpool.core.worker import Worker


class SpareCaches:
    """The caches of a pool that no worker uses, and those that were used and whose slot has no lease."""

    def __init__(self) -> None:
        self.without_worker: dict[Slot, str | None] = {}
        """With their owners. A worker that cannot be read is a worker, too."""
        self._used_and_free: set[Slot] = set()

    def put(
        self,
        slot: Slot,
        cache: SeenCache | None,
        seen: Observation | None,
        worker: Worker | None,
        *,
        unreadable: bool,
    ) -> None:
        """Takes note of a slot as it is now.

        Args:
            slot: The slot.
            cache: Its cache; None: it has none.
            seen: What the runtime sees there; it knows the owner first.
            worker: Its worker; None: it has none, or one that cannot be read.
            unreadable: It has a worker that cannot be read.
        """
        if cache is None or worker is not None or unreadable:
            self.without_worker.pop(slot, None)
        else:
            self.without_worker[slot] = cache.owner
        owner = seen.cache_owner if seen is not None else cache.owner if cache is not None else None
        if owner is None or unreadable or (worker is not None and worker.lease is not None):
            self._used_and_free.discard(slot)
        else:
            self._used_and_free.add(slot)

    def to_wipe(
        self, pool: Pool, busy: Collection[Slot], leases: int, last_lease: datetime | None, now: datetime
    ) -> tuple[set[Slot], datetime | None]:
        """The slots whose cache is wiped now, before anything else, and when time alone brings the next ones.

        Args:
            pool: The pool.
            busy: Slots in which an action is under way.
            leases: How many leases the pool has.
            last_lease: When the last one left its worker, if that is known.
            now: The time.
        """
        removal = removal_of(pool)
        if removal is not None:
            slots, due = caches_due(self.without_worker, removal, leases, last_lease, now)
        else:
            slots, due = self._long_beyond_max(pool, now)
        wiped = {*slots, *(self._used_and_free if pool.spec.reuse is Reuse.NEVER else ())}
        return wiped.difference(busy), due

    def beyond(self, limit: int) -> list[Slot]:
        """Those without a worker in slots beyond the pool's maximum."""
        return sorted(slot for slot in self.without_worker if slot.number >= limit)

    def _long_beyond_max(self, pool: Pool, now: datetime) -> tuple[list[Slot], datetime | None]:
        """Those that are known to be beyond the maximum for `scaleDownDelay`, and when the next ones are."""
        limit, delay = pool.spec.scaling.max, pool.spec.scaling.scale_down_delay
        due: list[Slot] = []
        later: list[datetime] = []
        for group in pool.status.caches_beyond_max:
            if group.since + delay > now:
                later.append(group.since + delay)
                continue
            slots = (Slot(*pool.key, number) for number in group.slots if number >= limit)
            due += [slot for slot in slots if slot in self.without_worker]
        return due, min(later, default=None)


def caches_beyond_max(pool: Pool, beyond: Iterable[Slot], now: datetime) -> tuple[CachesBeyondMax, ...]:
    """What the pool's status says about caches of slots beyond the maximum, in groups that came there together.

    If the maximum is raised again, they are not beyond it any more, and nothing is remembered of the time before.

    Args:
        pool: The pool with its status as it is stored.
        beyond: Their slots, in order.
        now: The time.
    """
    since = {number: group.since for group in pool.status.caches_beyond_max for number in group.slots}
    groups: defaultdict[datetime, list[int]] = defaultdict(list)
    for slot in beyond:
        groups[since.get(slot.number, now)].append(slot.number)
    return tuple(CachesBeyondMax(since=at, slots=tuple(groups[at])) for at in sorted(groups))
