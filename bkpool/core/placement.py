"""Which worker or slot suits one request best.

It only chooses. The claim is a compare-and-swap that may fail, and then the choice is made again. In which order
requests are served is decided in `queueing`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Generic, TypeVar

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.pool_index import PoolIndex
from bkpool.core.worker import Worker

T = TypeVar("T", bound=Worker | Slot)

Caches = Callable[[], Mapping[Slot, str | None]]
"""Returns the caches of a pool with their owners. It is asked only when a slot is to be filled."""


def choose(
    pool: Pool,
    index: PoolIndex,
    caches: Caches,
    owner: str,
    taken: Container[Slot] = (),
    *,
    only_ready: bool = False,
) -> Worker | Slot | None:
    """Chooses for one request; see `Choices`."""
    return Choices(pool, index, caches, taken).best(owner, only_ready=only_ready)


class Choices:
    """What a pool has for the requests of one moment.

    In this order: an idle worker with the owner's cache, an idle worker that was never used, a worker that is still
    starting, an empty slot, the least recently used idle worker of another owner (its cache will be wiped), a failed
    worker (so that the caller learns the reason instead of waiting). A worker that does not answer is not chosen: in
    some seconds it answers, or has failed.

    What is taken is passed over once, so that many requests cost little each. Until the end of the moment nothing
    becomes free, and the index does not change.

    Args:
        pool: The pool that the requests name.
        index: The workers of the pool.
        caches: Returns the caches of the pool's slots.
        taken: Slots that requests are claiming now. It may grow.
    """

    def __init__(self, pool: Pool, index: PoolIndex, caches: Caches, taken: Container[Slot]) -> None:
        self._pool = pool
        self._index = index
        self._caches = caches
        self._taken = taken
        self._own: dict[str, _Untaken[Worker]] = {}
        self._unused = self._untaken(index.idle_of(None))
        self._starting = self._untaken(index.starting())
        self._idle = self._untaken(index.idle())
        self._failed = self._untaken(index.failed())
        self._empty: _EmptySlots | None = None

    @property
    def nothing_left(self) -> bool:
        """Whether no request gets anything, whoever made it."""
        free = self._unused.first() or self._starting.first() or self._idle.first() or self._failed.first()
        return free is None and not self._index.empty_slots(self._pool.spec.scaling.max)

    def best(self, owner: str, *, only_ready: bool = False) -> Worker | Slot | None:
        """The best that is left for one request.

        Args:
            owner: The digest of the owner of the cache that the lease will use.
            only_ready: Chooses only a worker that serves at once: no start and no wipe comes before.

        Returns:
            The worker to claim, the slot to create one in, or None: the request must wait.
        """
        own = self._own.get(owner)
        if own is None:
            own = self._own[owner] = self._untaken(self._index.last_idle_of(owner))
        ready = own.first() or self._unused.first()
        if ready is not None or only_ready:
            return ready
        return self._starting.first() or self._empty_slot(owner) or self._idle.first() or self._failed.first()

    def _untaken(self, workers: Iterable[Worker]) -> _Untaken[Worker]:
        return _Untaken(workers, self._is_free)

    def _is_free(self, target: Worker | Slot) -> bool:
        slot = target.slot if isinstance(target, Worker) else target
        return slot.number < self._pool.spec.scaling.max and slot not in self._taken

    def _empty_slot(self, owner: str) -> Slot | None:
        """An empty slot: with the owner's cache if possible, else with a clean one, else any."""
        if self._empty is None:
            self._empty = _EmptySlots(self._pool, self._index, self._caches, self._is_free)
        return self._empty.best(owner)


class _Untaken(Generic[T]):
    """What is left of workers or slots in one order.

    Args:
        ordered: All of them.
        is_free: Whether one of them is left.
    """

    def __init__(self, ordered: Iterable[T], is_free: Callable[[T], bool]) -> None:
        self._rest = iter(ordered)
        self._is_free = is_free
        self._head = next(self._rest, None)

    def first(self) -> T | None:
        while self._head is not None and not self._is_free(self._head):
            self._head = next(self._rest, None)
        return self._head


class _EmptySlots:
    """The empty slots by the owners of their caches. Of those that are alike the lowest is first."""

    def __init__(self, pool: Pool, index: PoolIndex, caches: Caches, is_free: Callable[[Slot], bool]) -> None:
        empty = index.empty_slots(pool.spec.scaling.max)
        cached = caches() if empty else {}
        own: defaultdict[str, list[Slot]] = defaultdict(list)
        for slot, owner in cached.items():
            if owner is not None and empty.has(slot.number) and (slot.namespace, slot.pool) == pool.key:
                own[owner].append(slot)
        self._own = {owner: _Untaken(sorted(slots), is_free) for owner, slots in own.items()}
        self._clean = _Untaken((slot for slot in empty.slots(pool.key) if cached.get(slot) is None), is_free)
        self._any = _Untaken(empty.slots(pool.key), is_free)

    def best(self, owner: str) -> Slot | None:
        own = self._own[owner].first() if owner in self._own else None
        return own or self._clean.first() or self._any.first()
