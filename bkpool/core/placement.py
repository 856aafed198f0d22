"""Which worker or slot suits one request best.

It only chooses. The claim is a compare-and-swap that may fail, and then the choice is made again. In which order
requests are served is decided in `queueing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.pool_index import PoolIndex
from bkpool.core.worker import Worker

Caches = Callable[[], Mapping[Slot, str | None]]
"""Returns caches with their owners. It is asked only when a slot is to be filled."""


def choose(
    pool: Pool,
    index: PoolIndex,
    caches: Caches,
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
        index: The workers of the pool.
        caches: Returns the caches of the pool's slots.
        owner: The digest of the owner of the cache that the lease will use.
        taken: Slots that other requests are claiming now.
        only_ready: Chooses only a worker that serves at once: no start and no wipe comes before.

    Returns:
        The worker to claim, the slot to create one in, or None: the request must wait.
    """
    limit = pool.spec.scaling.max

    def first(workers: Iterable[Worker]) -> Worker | None:
        return next((w for w in workers if w.slot not in taken and w.slot.number < limit), None)

    ready = first(index.last_idle_of(owner)) or first(index.idle_of(None))
    if ready is not None or only_ready:
        return ready
    return (
        first(index.starting())
        or _empty_slot(pool, index, caches, owner, taken)
        or first(index.idle())
        or first(index.failed())
    )


def _empty_slot(pool: Pool, index: PoolIndex, caches: Caches, owner: str, taken: Collection[Slot]) -> Slot | None:
    """An empty slot: with the owner's cache if possible, else with a clean one, else any; None if none is empty."""
    empty = index.empty_slots(pool.spec.scaling.max)
    if not empty:
        return None
    cached = caches()
    own = (slot for slot, of in cached.items() if of == owner)
    with_own_cache = (slot for slot in own if slot not in taken and empty.has(slot.number))
    return min(with_own_cache, default=None) or next(iter(empty.first(1, pool.key, cached, taken)), None)
