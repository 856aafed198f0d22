"""Where a lease goes: which worker or slot a request takes next, and whose cache it will find there.

Pure choice (DESIGN section 6). It claims nothing: the claim is a compare-and-swap that may still fail, and then the
choice is made again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime

from bkpool.core.names import Slot
from bkpool.core.pool import Pool, Reuse
from bkpool.core.tokens import owner_digest
from bkpool.core.worker import Phase, Worker

_NEVER_USED = datetime.min.replace(tzinfo=UTC)


def owner_of(reuse: Reuse, tenant: str, pool_uid: str, allocation_id: str) -> str:
    """The digest of whom a cache belongs to: the tenant, the whole pool, or this one lease.

    With `never` each lease is an owner of its own, so that the one rule "no cache goes to another owner" wipes it.
    """
    match reuse:
        case Reuse.IDENTITY:
            return owner_digest(f"tenant\0{tenant}")
        case Reuse.POOL:
            return owner_digest(f"pool\0{pool_uid}")
        case Reuse.NEVER:
            return owner_digest(f"lease\0{allocation_id}")


def place(
    pool: Pool,
    workers: Collection[Worker],
    caches: Mapping[Slot, str | None],
    owner: str,
    taken: Collection[Slot] = (),
) -> Worker | Slot | None:
    """Chooses for one request.

    In this order: an idle worker with the owner's cache, an unused one, one that is still starting, a new slot, the
    least recently used idle worker of another owner (its cache will be wiped), a failed worker (so that the caller is
    told why instead of waiting).

    Args:
        pool: The pool asked for.
        workers: All workers of the pool.
        caches: The caches of all slots, with their owners.
        owner: The owner's digest, from `owner_of`; with reuse `never` any value that owns nothing.
        taken: Slots that other requests are claiming at this moment.

    Returns:
        The worker to claim, the slot to create one in, or None: wait.
    """
    limit = pool.spec.scaling.max
    free = [w for w in workers if _claimable(w, limit) and w.slot not in taken]
    idle = sorted((w for w in free if w.status.phase is Phase.IDLE), key=last_used)
    mine = [w for w in idle if w.status.cache_owner == owner]
    unused = [w for w in idle if w.status.cache_owner is None]
    starting = [w for w in free if w.status.phase in {Phase.PENDING, Phase.PROVISIONING}]
    if mine:
        return mine[-1]
    if unused or starting:
        return (unused or starting)[0]
    slot = free_slot(pool, workers, caches, owner, taken)
    if slot is not None:
        return slot
    failed = [w for w in free if w.status.phase is Phase.FAILED]
    return next(iter(idle + failed), None)


def free_slot(
    pool: Pool,
    workers: Iterable[Worker],
    caches: Mapping[Slot, str | None],
    owner: str | None = None,
    taken: Collection[Slot] = (),
) -> Slot | None:
    """A slot without a worker: one with the owner's cache, else a clean one, else any; None if all are filled."""
    filled = {w.slot for w in workers}
    slots = (Slot(*pool.key, number) for number in range(pool.spec.scaling.max))
    empty = [slot for slot in slots if slot not in filled and slot not in taken]

    def rank(slot: Slot) -> int:
        cached = caches.get(slot)
        return 0 if owner is not None and cached == owner else 1 if cached is None else 2

    return min(empty, key=rank, default=None)


def last_used(worker: Worker) -> datetime:
    """When the worker last served a lease; long ago if never."""
    return worker.status.last_activity_at or _NEVER_USED


def _claimable(worker: Worker, limit: int) -> bool:
    """Nobody holds it, it is not on its way out, and its slot is within the pool's maximum."""
    return worker.lease is None and not worker.metadata.deletion_timestamp and worker.slot.number < limit
