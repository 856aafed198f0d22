"""Who gets a worker next: tenants in turn, the requests of each in the order of their arrival.

`assign` is a pure function of the queue and the pool. It claims nothing: the claim is a compare-and-swap that may
fail, and then the request is put at the front of the queue and `assign` is called again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from bkpool.core.caller_share import most_leases
from bkpool.core.names import Slot
from bkpool.core.placement import Caches, choose
from bkpool.core.pool import Pool
from bkpool.core.pool_index import PoolIndex
from bkpool.core.worker import Worker

Target = Worker | Slot
"""What a request gets: a worker to claim, a slot to create a worker in, or a worker that it has leased already."""


class QueuedRequest(Protocol):
    """What `assign` reads of a request that waits."""

    @property
    def owner(self) -> str:
        """Digest of the owner of the cache that the lease will use."""

    @property
    def tenant(self) -> str:
        """Digest of the tenant, who gets one worker in each turn."""

    @property
    def holder(self) -> str:
        """Digest of the caller, as their leases have it."""

    @property
    def admin(self) -> bool:
        """Whether the caller is the admin, who may have every lease."""

    @property
    def only_ready(self) -> bool:
        """Whether only a worker that serves at once will do."""

    @property
    def request_key(self) -> str | None:
        """Digest of the caller and their jobId. A live lease with the same key is this request's as well."""


W = TypeVar("W", bound=QueuedRequest)
_NO_CLAIMS: Mapping[Slot, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Assignment(Generic[W]):
    """One request and what it is given."""

    waiter: W
    target: Target


def assign(
    waiters: Sequence[W],
    pool: Pool,
    index: PoolIndex,
    caches: Caches,
    *,
    turns: Sequence[str] = (),
    claiming: Mapping[Slot, str] = _NO_CLAIMS,
    unreadable: Collection[Slot] = (),
    now: datetime,
) -> list[Assignment[W]]:
    """Gives workers and slots to the requests that wait for a pool.

    1. A request whose key has a live lease gets the worker with that lease, wherever it is in the queue: it repeats
       an earlier request, and takes nothing from the others.
    2. Of all others each tenant in turn gets one worker, so that no tenant waits for more than one request of each
       other tenant. The requests of one tenant are served first come, first served, except that a caller with as many
       leases as they may have waits until one of these ends. Which worker or slot a request gets is the choice of
       `placement.choose`. The first request for which there is nothing stops the rest, but for one that takes only a
       worker which serves at once: it is passed over.

    Args:
        waiters: The requests, in the order of their arrival.
        pool: The pool that they wait for.
        index: All workers of the pool.
        caches: Returns the caches that exist, each with the digest of its owner (None: clean).
        turns: The tenants in the order of their turns. One that is missing comes after them.
        claiming: Slots that earlier requests were given and are still claiming, each with the digest of the caller.
        unreadable: Slots whose worker cannot be read: nobody gets one of them.
        now: The time.

    Returns:
        The requests that are served now, in this order. All others go on waiting.
    """
    repeated, queues = _repeated_and_others(waiters, index, turns, now)
    claimed = Counter(holder for slot, holder in claiming.items() if not index.leases.is_live(slot, now))

    def holding(holder: str) -> int:
        return index.leases.count_of(holder, now) + claimed[holder]

    caches_of_pool = cache(lambda: _of_pool(caches(), pool))  # the caches of other pools may be many more
    served: list[Assignment[W]] = []
    taken = {*claiming, *unreadable}
    ring = deque(queues.values())
    while ring:
        queue = ring.popleft()
        first = _next_of_tenant(queue, pool, holding)
        if first is None:
            continue  # nobody of this tenant waits, or only callers who have as many leases as they may have
        target = choose(pool, index, caches_of_pool, first.owner, taken, only_ready=first.only_ready)
        if target is None and not first.only_ready:
            break
        queue.remove(first)
        ring.append(queue)
        if target is not None:
            served.append(Assignment(first, target))
            taken.add(slot_of_target(target))
            claimed[first.holder] += 1
    return repeated + served


def _repeated_and_others(
    waiters: Iterable[W], index: PoolIndex, turns: Iterable[str], now: datetime
) -> tuple[list[Assignment[W]], dict[str, deque[W]]]:
    """The requests that have a live lease already, and the queues of all others by tenant."""
    repeated: list[Assignment[W]] = []
    queues: dict[str, deque[W]] = {tenant: deque() for tenant in turns}
    for waiter in waiters:
        leased = index.leases.of_request(waiter.request_key, now)
        if leased is not None:
            repeated.append(Assignment(waiter, leased))
        else:
            queues.setdefault(waiter.tenant, deque()).append(waiter)
    return repeated, queues


def _of_pool(caches: Mapping[Slot, str | None], pool: Pool) -> Mapping[Slot, str | None]:
    return {slot: owner for slot, owner in caches.items() if (slot.namespace, slot.pool) == pool.key}


def _next_of_tenant(queue: Iterable[W], pool: Pool, holding: Callable[[str], int]) -> W | None:
    """The first request whose caller may have one more lease.

    Args:
        queue: The requests of one tenant.
        pool: The pool.
        holding: How many leases a caller has, with those that are being claimed.
    """
    for waiter in queue:
        most = most_leases(pool.spec, admin=waiter.admin)
        if most is None or holding(waiter.holder) < most:
            return waiter
    return None


def slot_of_target(target: Target) -> Slot:
    """The slot of a worker, or the slot itself."""
    return target.slot if isinstance(target, Worker) else target
