"""Finds the one lease of a job: rule 2 (docs/rules.md#r2). A job is a caller and their jobId in one pool.

It goes by the changes of the workers, which every replica gets in the same order. Where these do not come, it asks
the store. It never claims a worker and never ends a lease.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from bkpool.allocation.claiming import Claimer
from bkpool.core.backoff import Backoff
from bkpool.core.claim_order import Request
from bkpool.core.errors import NotFound
from bkpool.core.live_leases import with_live_lease
from bkpool.core.names import LABEL_REQUEST
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror

LONGEST_DELAY = 1.0
"""Seconds that a change of a job's leases may take to come. After that the store is asked."""
_LONGEST_PAUSE = 10.0
"""Seconds, at most, between two lists of a job's leases while several have no caller: their replicas may be dead."""


@dataclass(slots=True)
class _Look:
    """What the requests of one job wait for together."""

    task: asyncio.Task[list[Worker] | None]
    requests: int = 0


class JobLeases:
    """The leases of requests with a jobId.

    Args:
        store: Where the workers are.
        mirror: Knows the order of claims, and gets what was read.
        claimer: Completes a lease whose claim was interrupted.
        now: The clock.
    """

    def __init__(self, store: Store, mirror: Mirror, claimer: Claimer, now: Callable[[], datetime]) -> None:
        self._store = store
        self._mirror = mirror
        self._claimer = claimer
        self._now = now
        self._waiting: defaultdict[Request, set[asyncio.Future[None]]] = defaultdict(set)
        self._looks: dict[Request, _Look] = {}
        self._unsubscribe = mirror.on_claims(self._on_claims)

    def close(self) -> None:
        """Stops listening."""
        self._unsubscribe()
        for look in self._looks.values():
            look.task.cancel()

    async def find(self, request: Request) -> Worker | None:
        """The worker with the lease of a job, as the store has it now; None if the job has none.

        While there are several leases and it is not known which was claimed first, it waits: the replicas that have
        claimed them end all but one.

        Raises:
            UnreadableObject: The worker with the lease cannot be read.
            Unavailable: The store does not answer.
        """
        while True:
            first = self._first(request)
            known = self._mirror.index_of(request.pool).leases.of_request(request.key, self._now())
            if first is None and known is None:
                return None
            if first is None and (live := await self._look(request)) is not None:
                if not live:
                    if known is not None:
                        await self._claimer.refresh(known)
                    return None
                first = _delivered_or_only(live)
            if first is None:
                continue
            if (worker := await self._stored(first)) is not None:
                return worker
            same = self._first(request)
            if same is not None and same.held_lease.id == first.held_lease.id:  # this replica has not seen its end
                await self._change_of(request, LONGEST_DELAY)

    async def is_first(self, claimed: Worker, request: Request) -> bool:
        """Whether a lease that this replica has claimed is the job's lease. If not, it must end before it is used.

        It returns when this replica has seen its own claim among the changes: then it has seen every earlier one.
        Where the claims do not say which was earlier, the answer is no. A lease that has ended meanwhile is as good
        as any.

        Raises:
            Unavailable: The changes do not come, and the store does not answer.
        """
        lease_id = claimed.held_lease.id
        while self._is_live(self._now(), claimed):
            if self._mirror.claims_in(request.pool.namespace).knows(request, lease_id):
                first = self._first(request)
                return first is not None and first.held_lease.id == lease_id
            if not await self._change_of(request, LONGEST_DELAY):
                return all(worker.held_lease.id == lease_id for worker in await self._live(request))
        return True

    def _first(self, request: Request) -> Worker | None:
        return self._mirror.claims_in(request.pool.namespace).first(request, partial(self._is_live, self._now()))

    def _is_live(self, now: datetime, leased: Worker) -> bool:
        """Whether the lease on this worker is live as far as is known. One that cannot be read may have it still."""
        newest = self._mirror.workers.get(leased.key)
        if newest is None and leased.key in self._mirror.unreadable_workers:
            newest = leased
        if newest is None or newest.lease is None or newest.lease.id != leased.held_lease.id:
            return False
        return newest.lease.ended(now) is None

    async def _stored(self, leased: Worker) -> Worker | None:
        """This worker as the store has it, with a token's digest; None if its lease is not live any more."""
        try:
            worker = await self._store.get(Worker, *leased.key)
        except NotFound:
            return None
        except UnreadableObject as error:
            self._mirror.apply(error.found)
            raise
        self._mirror.apply(worker)
        if worker.lease is None or worker.lease.id != leased.held_lease.id or worker.lease.ended(self._now()):
            return None
        return await self._claimer.completed(worker)

    async def _live(self, request: Request) -> list[Worker]:
        """The workers with live leases of the job, from the store itself."""
        labels = {LABEL_REQUEST: request.key}
        listing = await self._store.list(Worker, namespace=request.pool.namespace, labels=labels)
        for worker in listing.items:
            self._mirror.apply(worker)
        return [worker for worker in with_live_lease(listing.items, self._now()) if worker.pool == request.pool]

    async def _look(self, request: Request) -> list[Worker] | None:
        """Waits until a change of the job's leases has come (None), or a list tells which one is its lease.

        All requests of the job that wait here share that.
        """
        look = self._looks.get(request)
        if look is None:
            look = self._looks[request] = _Look(asyncio.create_task(self._change_or_list(request)))
        look.requests += 1
        try:
            return await asyncio.shield(look.task)
        finally:
            look.requests -= 1
            if look.task.done() or not look.requests:
                look.task.cancel()
                if self._looks.get(request) is look:
                    del self._looks[request]

    async def _change_or_list(self, request: Request) -> list[Worker] | None:
        pauses = Backoff(_LONGEST_PAUSE, first=LONGEST_DELAY)
        while not await self._change_of(request, pauses.failed()):
            live = await self._live(request)
            if not live or _delivered_or_only(live) is not None:
                return live
        return None

    async def _change_of(self, request: Request, seconds: float) -> bool:
        """Waits for the next change of the job's leases. Returns whether it came in time."""
        change = asyncio.get_running_loop().create_future()
        self._waiting[request].add(change)
        try:
            async with asyncio.timeout(seconds):
                await change
        except TimeoutError:
            return False
        finally:
            self._waiting[request].discard(change)
            if not self._waiting[request]:
                del self._waiting[request]
        return True

    def _on_claims(self, request: Request) -> None:
        for change in self._waiting.get(request, ()):
            if not change.done():
                change.set_result(None)


def _delivered_or_only(live: list[Worker]) -> Worker | None:
    """Of all live leases of a job the one that a caller has, else the only one; None if there are several.

    Where a caller has a lease, no caller has another one.
    """
    delivered = [worker for worker in live if worker.undelivered is None]
    return delivered[0] if delivered else live[0] if len(live) == 1 else None
