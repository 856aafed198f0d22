"""Which caches are wiped although nobody else wants their slot.

These are used ones that nobody may get again, those of slots beyond the pool's maximum, and those of a pool that is
removed. The cache of a slot that has a lease is never among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime

from bkpool.core.names import Slot
from bkpool.core.observation import Snapshot
from bkpool.core.pool import CachesBeyondMax, Pool, Reuse
from bkpool.core.removal import caches_due, removal_of
from bkpool.core.worker import Worker


def caches_to_wipe(snapshot: Snapshot, now: datetime) -> tuple[list[Slot], datetime | None]:
    """The slots whose cache is wiped now, before anything else, and when time alone brings the next ones."""
    removal = removal_of(snapshot.pool)
    slots, due = caches_due(snapshot, removal, now) if removal else _long_beyond_max(snapshot, now)
    return sorted({*slots, *_not_to_be_reused(snapshot)} - snapshot.busy - snapshot.unreadable_slots), due


def caches_beyond_max(
    pool: Pool, workers: Iterable[Worker], caches: Mapping[Slot, str | None], now: datetime
) -> tuple[CachesBeyondMax, ...]:
    """What the pool's status says about caches of slots beyond the maximum, in groups that came there together.

    If the maximum is raised again, they are not beyond it any more, and nothing is remembered of the time before.

    Args:
        pool: The pool with its status as it is stored.
        workers: Its workers.
        caches: Its caches.
        now: The time.
    """
    since = {number: group.since for group in pool.status.caches_beyond_max for number in group.slots}
    taken = {worker.slot for worker in workers}
    groups: defaultdict[datetime, list[int]] = defaultdict(list)
    for slot in sorted(caches):
        if slot.number >= pool.spec.scaling.max and slot not in taken:
            groups[since.get(slot.number, now)].append(slot.number)
    return tuple(CachesBeyondMax(since=at, slots=tuple(groups[at])) for at in sorted(groups))


def _long_beyond_max(snapshot: Snapshot, now: datetime) -> tuple[list[Slot], datetime | None]:
    """Those that are known to be beyond the maximum for `scaleDownDelay`, and when the next ones are."""
    pool, taken = snapshot.pool, {worker.slot for worker in snapshot.workers}
    limit, delay = pool.spec.scaling.max, pool.spec.scaling.scale_down_delay
    due: list[Slot] = []
    later: list[datetime] = []
    for group in pool.status.caches_beyond_max:
        if group.since + delay > now:
            later.append(group.since + delay)
            continue
        slots = (Slot(*pool.key, number) for number in group.slots if number >= limit)
        due += [slot for slot in slots if slot in snapshot.caches and slot not in taken]
    return due, min(later, default=None)


def _not_to_be_reused(snapshot: Snapshot) -> set[Slot]:
    """With reuse `never`: the slots without a lease whose cache was used."""
    if snapshot.pool.spec.reuse is not Reuse.NEVER:
        return set()
    seen = {slot: snapshot.observed[slot].cache_owner for slot in snapshot.observed}
    used = {slot for slot, owner in {**snapshot.caches, **seen}.items() if owner is not None}
    leased = {worker.slot for worker in snapshot.workers if worker.lease is not None}
    return {slot for slot in used if (slot.namespace, slot.pool) == snapshot.pool.key} - leased
