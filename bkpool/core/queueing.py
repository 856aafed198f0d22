"""Who gets a worker next: tenants in turn, the requests of each in the order of their arrival.

`assign` is a pure function of the queue and the pool. It claims nothing: the claim is a compare-and-swap that may
fail, and then the request is put at the front of the queue and `assign` is called again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from bkpool.core.caller_share import most_leases
from bkpool.core.names import Slot
from bkpool.core.placement import Caches, Choices
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
    claiming_requests: Collection[str | None] = (),
    unreadable: Collection[Slot] = (),
    now: datetime,
) -> list[Assignment[W]]:
    """Gives workers and slots to the requests that wait for a pool.

    1. A request whose key has a live lease gets the worker with that lease, wherever it is in the queue: it repeats
       an earlier request, and takes nothing from the others.
    2. Of all others each tenant in turn gets one worker, so that no tenant waits for more than one request of each
       other tenant. The requests of one tenant are served first come, first served, except that a caller with as many
       leases as they may have waits until one of these ends, and a request waits while another with its key is
       claiming. Which worker or slot a request gets is the choice of `placement.Choices`. The first request for
       which there is nothing stops the rest, but for one that takes only a worker which serves at once: it is passed
       over.

    Args:
        waiters: The requests, in the order of their arrival.
        pool: The pool that they wait for.
        index: All workers of the pool.
        caches: Returns the caches of the pool's slots, each with the digest of its owner (None: clean).
        turns: The tenants in the order of their turns. One that is missing comes after them.
        claiming: Slots that earlier requests were given and are still claiming, each with the digest of the caller.
        claiming_requests: The keys of these earlier requests. Another request with the same key waits until the claim
            is written or has failed, so that one job does not claim two workers.
        unreadable: Slots whose worker cannot be read: nobody gets one of them.
        now: The time.

    Returns:
        The requests that are served now, in this order. All others go on waiting.
    """
    taken = {*claiming, *unreadable}
    choices = Choices(pool, index, caches, taken)
    repeated, others = _repeated_and_others(waiters, index, now)
    if choices.nothing_left:  # the usual case where many requests wait
        return repeated
    queues: dict[str, deque[W]] = {tenant: deque() for tenant in turns}
    for waiter in others:
        queues.setdefault(waiter.tenant, deque()).append(waiter)
    shares = _Shares(pool, index, claiming, claiming_requests, now)
    return repeated + _served_in_turn(deque(queues.values()), choices, taken, shares)


def _served_in_turn(
    ring: deque[deque[W]], choices: Choices, taken: set[Slot], shares: _Shares
) -> list[Assignment[W]]:
    """What the queues of the tenants get. What was given is in `taken` afterwards."""
    served: list[Assignment[W]] = []
    while ring:
        queue = ring.popleft()
        first = _next_of_tenant(queue, shares.may_be_served)
        if first is None:
            continue  # nobody of this tenant waits, or only those who may have no more now
        target = choices.best(first.owner, only_ready=first.only_ready)
        if target is None and not first.only_ready:
            break
        ring.append(queue)
        if target is not None:
            served.append(Assignment(first, target))
            taken.add(slot_of_target(target))
            shares.served(first)
    return served


class _Shares:
    """Which callers may have one more lease at this moment. One who may not is refused until the next look."""

    def __init__(
        self,
        pool: Pool,
        index: PoolIndex,
        claiming: Mapping[Slot, str],
        requests: Iterable[str | None],
        now: datetime,
    ) -> None:
        self._leases = index.leases
        self._now = now
        self._most = {admin: most_leases(pool.spec, admin=admin) for admin in (False, True)}
        self._claimed = Counter(holder for slot, holder in claiming.items() if not self._leases.is_live(slot, now))
        self._requests = {*requests} - {None}

    def may_be_served(self, waiter: QueuedRequest) -> bool:
        """Whether the caller may have one more lease, and no request with the same key is claiming."""
        if waiter.request_key in self._requests:
            return False
        most, holder = self._most[waiter.admin], waiter.holder
        return most is None or self._leases.count_of(holder, self._now) + self._claimed[holder] < most

    def served(self, waiter: QueuedRequest) -> None:
        """Notes that a request was given something to claim."""
        self._claimed[waiter.holder] += 1
        if waiter.request_key is not None:
            self._requests.add(waiter.request_key)


def _repeated_and_others(
    waiters: Iterable[W], index: PoolIndex, now: datetime
) -> tuple[list[Assignment[W]], list[W]]:
    """The requests that have a live lease already, and all others."""
    repeated: list[Assignment[W]] = []
    others: list[W] = []
    for waiter in waiters:
        key = waiter.request_key
        leased = index.leases.of_request(key, now) if key is not None else None
        if leased is None:
            others.append(waiter)
        else:
            repeated.append(Assignment(waiter, leased))
    return repeated, others


def _next_of_tenant(queue: deque[W], may_be_served: Callable[[W], bool]) -> W | None:
    """Takes the first request out of a tenant's queue that may be served, and those before it, which may not now."""
    while queue:
        waiter = queue.popleft()
        if may_be_served(waiter):
            return waiter
    return None


def slot_of_target(target: Target) -> Slot:
    """The slot of a worker, or the slot itself."""
    return target.slot if isinstance(target, Worker) else target
