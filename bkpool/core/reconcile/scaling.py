"""How many workers a pool should have: which idle ones are too many, and in which slots some are missing.

A leased worker is never too many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from bkpool.core.names import Slot
from bkpool.core.observation import Snapshot
from bkpool.core.placement import free_slot, last_used
from bkpool.core.pool import Pool
from bkpool.core.removal import removal_of
from bkpool.core.worker import Worker


def surplus(snapshot: Snapshot, now: datetime) -> tuple[list[Worker], list[datetime]]:
    """The workers to remove now, and the times at which further ones are to be removed.

    Without a lease, a worker is removed at once if it or its pool is being deleted or removed, or if its slot is
    beyond `scaling.max`. Beyond `scaling.min`, the least recently used ones are removed after
    `scaling.scaleDownDelay`.
    """
    scaling = snapshot.pool.spec.scaling
    idle = sorted((w for w in snapshot.workers if w.lease is None), key=last_used)
    pool_ends = _ends(snapshot.pool)
    gone = {w.slot for w in idle if pool_ends or w.metadata.deletion_timestamp or w.slot.number >= scaling.max}
    removed = [w for w in idle if w.slot in gone]
    kept = [w for w in idle if w.slot not in gone]
    spare = kept[: max(0, len(kept) - scaling.min)]
    due = {w.key: _idle_since(w, now) + scaling.scale_down_delay for w in spare}
    removed += [w for w in spare if due[w.key] <= now]
    return removed, [at for at in due.values() if at > now]


def _ends(pool: Pool) -> bool:
    return pool.metadata.deletion_timestamp is not None or removal_of(pool) is not None


def _idle_since(worker: Worker, now: datetime) -> datetime:
    return worker.status.last_activity_at or worker.metadata.creation_timestamp or now


def missing(snapshot: Snapshot, wiped: Sequence[Slot]) -> Iterator[Slot]:
    """The slots to create workers in, so that `scaling.min` idle workers are ready, within `scaling.max` in all.

    Args:
        snapshot: The pool.
        wiped: Slots whose cache is about to be wiped: not to be used yet.
    """
    if _ends(snapshot.pool):
        return
    idle = sum(w.lease is None for w in snapshot.workers)
    being_created = len(snapshot.busy - {w.slot for w in snapshot.workers})
    taken = {*snapshot.busy, *snapshot.unreadable_slots, *wiped}
    for _ in range(snapshot.pool.spec.scaling.min - idle - being_created):
        slot = free_slot(snapshot.pool, snapshot.workers, snapshot.caches, taken=taken)
        if slot is None:
            return
        taken.add(slot)
        yield slot
