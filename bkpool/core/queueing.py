"""Who gets a worker next: requests in the order of their arrival, each with the worker or slot that suits it best.

`assign` is a pure function of the queue and the pool. It claims nothing: the claim is a compare-and-swap that may
fail, and then the request is put at the front of the queue and `assign` is called again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from bkpool.core.names import LABEL_REQUEST, Slot
from bkpool.core.placement import choose
from bkpool.core.pool import Pool
from bkpool.core.worker import Worker, with_live_lease

Target = Worker | Slot
"""What a request gets: a worker to claim, a slot to create a worker in, or a worker that it has leased already."""


class QueuedRequest(Protocol):
    """What `assign` reads of a request that waits."""

    @property
    def owner(self) -> str:
        """Digest of the owner of the cache that the lease will use."""

    @property
    def request_key(self) -> str | None:
        """Digest of the caller and their jobId. A live lease with the same key is this request's as well."""


W = TypeVar("W", bound=QueuedRequest)


@dataclass(frozen=True, slots=True)
class Assignment(Generic[W]):
    """One request and what it is given."""

    waiter: W
    target: Target


def assign(
    waiters: Sequence[W],
    pool: Pool,
    workers: Collection[Worker],
    caches: Mapping[Slot, str | None],
    *,
    claiming: Collection[Slot] = (),
    now: datetime,
) -> list[Assignment[W]]:
    """Gives workers and slots to the requests that wait for a pool.

    1. A request whose key has a live lease gets the worker with that lease, wherever it is in the queue: it repeats
       an earlier request, and takes nothing from the others.
    2. All others are served first come, first served. The first one for which there is nothing stops the rest, so
       that no request overtakes another. Which worker or slot a request gets is the choice of `placement.choose`.

    Args:
        waiters: The requests, in the order of their arrival.
        pool: The pool that they wait for.
        workers: All workers of the pool.
        caches: The caches that exist, each with the digest of its owner (None: clean).
        claiming: Slots that earlier requests were given and are still claiming.
        now: The time.

    Returns:
        The requests that are served now. All others go on waiting.
    """
    leased = {key: w for w in with_live_lease(workers, now) if (key := w.metadata.labels.get(LABEL_REQUEST))}
    repeated = [Assignment(w, leased[w.request_key]) for w in waiters if w.request_key in leased]
    served: list[Assignment[W]] = []
    taken = set(claiming)
    for waiter in (w for w in waiters if w.request_key not in leased):
        target = choose(pool, workers, caches, waiter.owner, taken)
        if target is None:
            break
        served.append(Assignment(waiter, target))
        taken.add(slot_of_target(target))
    return repeated + served


def slot_of_target(target: Target) -> Slot:
    """The slot of a worker, or the slot itself."""
    return target.slot if isinstance(target, Worker) else target
