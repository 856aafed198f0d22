"""Which worker or slot suits one request best.

It only chooses. The claim is a compare-and-swap that may fail, and then the choice is made again. In which order
requests are served is decided in `queueing`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.worker import Phase, Worker

_NEVER_USED = datetime.min.replace(tzinfo=UTC)


def choose(
    pool: Pool,
    workers: Collection[Worker],
    caches: Mapping[Slot, str | None],
    owner: str,
    taken: Collection[Slot] = (),
    *,
    only_ready: bool = False,
) -> Worker | Slot | None:
    """Chooses a worker, or a slot to create one in, for one request.

    In this order: an idle worker with the owner's cache, an idle worker that was never used, a worker that is still
    starting, an empty slot, the least recently used idle worker of another owner (its cache will be wiped), a failed
    worker (so that the caller learns the reason instead of waiting). A worker that does not answer is not chosen: in
    some seconds it answers, or has failed.

    Args:
        pool: The pool that the request names.
        workers: All workers of the pool.
        caches: The caches of all slots, with their owners.
        owner: The digest of the owner of the cache that the lease will use.
        taken: Slots that other requests are claiming now.
        only_ready: Chooses only a worker that serves at once: no start and no wipe comes before.

    Returns:
        The worker to claim, the slot to create one in, or None: the request must wait.
    """
    limit = pool.spec.scaling.max
    free = [w for w in workers if _claimable(w, limit) and w.slot not in taken]
    idle = sorted((w for w in free if w.status.phase is Phase.IDLE and w.status.silent_since is None), key=last_used)
    with_own_cache = [w for w in idle if w.status.cache_owner == owner]
    unused = [w for w in idle if w.status.cache_owner is None]
    starting = [w for w in free if w.status.phase in {Phase.PENDING, Phase.PROVISIONING}]
    if with_own_cache:
        return with_own_cache[-1]
    if only_ready:
        return next(iter(unused), None)
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
    """An empty slot: with the owner's cache if possible, else with a clean one, else any; None if none is empty."""
    filled = {w.slot for w in workers}
    slots = (Slot(*pool.key, number) for number in range(pool.spec.scaling.max))
    empty = [slot for slot in slots if slot not in filled and slot not in taken]

    def rank(slot: Slot) -> int:
        cached = caches.get(slot)
        return 0 if owner is not None and cached == owner else 1 if cached is None else 2

    return min(empty, key=rank, default=None)


def last_used(worker: Worker) -> datetime:
    """When the worker last had a lease; the earliest possible time if it never had one."""
    return worker.status.last_activity_at or _NEVER_USED


def _claimable(worker: Worker, limit: int) -> bool:
    """Whether it has no lease, is not being deleted, and its slot is within the pool's maximum."""
    return worker.lease is None and not worker.metadata.deletion_timestamp and worker.slot.number < limit
