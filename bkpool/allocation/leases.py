"""What the holder of a token may do with its lease: renew, look up, release; and the one way a lease is changed.

Every change is a compare-and-swap on the worker that the lease stands on. The token itself is the right to ask
(DESIGN rule 8). Nothing here makes a lease or remembers one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta

import structlog

from bkpool.core import tokens
from bkpool.core.durations import render
from bkpool.core.errors import Conflict, Gone, InvalidInput, NotFound
from bkpool.core.names import Key
from bkpool.core.objects import Allocation, EndedLease, EndReason, Pool, Worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_CONFLICTS = 20
"""Tries of one compare-and-swap: more than any sane number of writers of one worker at once."""


class Leases:
    """Changes and ends leases.

    Args:
        store: Where the workers are.
        mirror: The copy in memory; where it is stale the store's answer decides.
        now: The clock.
    """

    def __init__(self, *, store: Store, mirror: Mirror, now: Callable[[], datetime]) -> None:
        self._store = store
        self._mirror = mirror
        self._now = now

    async def renew(self, token: str, ttl: timedelta | None) -> tuple[Worker, datetime]:
        """Lets the lease run for `ttl` from now, at most to the end of its certificate.

        Raises:
            NotFound: No such lease.
            Gone: It has ended.
            InvalidInput: The ttl is beyond the pool's maximum.
        """
        worker = await self._find(token)
        wanted = lifetime(find_pool(self._mirror, worker.pool), ttl)
        now = self._now()

        def renewed(lease: Allocation) -> Allocation:
            over = lease.ended(now)
            if over:
                raise _gone(over, lease.end_message)
            return lease.but(expires_at=min(now + wanted, lease.not_after))

        worker = await self.change(worker, renewed)
        log.info("lease.renewed", worker=str(worker.key), allocation=worker.lease.id)
        return worker, worker.lease.expires_at

    async def release(self, token: str) -> None:
        """Ends the lease. Released already, or expired: nothing to do, and no error.

        Raises:
            NotFound: No such lease.
        """
        try:
            worker = await self._find(token)
            worker = await self.change(worker, lambda lease: self._ended(lease, EndReason.RELEASED))
        except Gone:
            return
        log.info("lease.released", worker=str(worker.key))

    async def lookup(self, token: str) -> Worker:
        """The worker of a living lease. Raises NotFound or Gone."""
        worker = await self._find(token)
        lease = worker.allocation
        over = lease.ended(self._now()) if lease else EndReason.RELEASED
        if over:
            raise _gone(over, lease.end_message if lease else "")
        return worker

    async def abandon(self, worker: Worker) -> None:
        """Ends a lease that nobody was ever told of. Ended or gone already: nothing to do."""
        with suppress(Gone, NotFound):
            await self.change(worker, lambda lease: self._ended(lease, EndReason.ABANDONED))
        log.info(
            "lease.abandoned", worker=str(worker.key), allocation=worker.allocation.id if worker.allocation else ""
        )

    def _ended(self, lease: Allocation, reason: EndReason) -> Allocation:
        if lease.ended_at is not None:
            raise _gone(lease.end_reason or reason, lease.end_message)
        return lease.but(ended_at=min(self._now(), lease.expires_at), end_reason=reason)

    async def _find(self, token: str) -> Worker:
        """The worker that this token leases. Raises NotFound, or Gone with the reason."""
        digest = tokens.digest(token)
        if tokens.well_formed(token):
            found = _by_digest(self._mirror.workers.values(), digest)
            if found is None:  # made by another replica a moment ago?
                found = _by_digest((await self._store.list(Worker)).items, digest)
            if isinstance(found, EndedLease):
                raise _gone(found.reason, found.message)
            if found is not None:
                return found
        raise NotFound(
            "token: no lease has this token",
            hint="`bkpool allocate` makes a new lease.",
            code="NoSuchLease",
            field="token",
        )

    async def change(self, worker: Worker, change: Callable[[Allocation], Allocation]) -> Worker:
        """Changes this worker's lease by compare-and-swap, on the worker as it is now if another writer was faster.

        Raises:
            Gone: The lease is no longer this worker's.
            NotFound: The worker is gone.
            Conflict: Others kept changing it.
        """
        allocation_id = worker.allocation.id if worker.allocation else ""
        for _ in range(MAX_CONFLICTS):
            if worker.allocation is None or worker.allocation.id != allocation_id:
                raise _gone(EndReason.RELEASED, "")
            try:
                changed = await self._store.replace(worker.with_allocation(change(worker.allocation)))
            except Conflict:
                worker = await self._store.get(Worker, worker.key.namespace, worker.key.name)
                continue
            self._mirror.apply(changed)
            return changed
        raise Conflict(f"{worker.key.name} is being changed by too many at once", hint="Try again.", retry_after=1)


def find_pool(mirror: Mirror, key: Key) -> Pool:
    """The pool of that name. Raises NotFound."""
    pool = mirror.pools.get(key)
    if pool is None:
        raise NotFound(
            f"poolName: there is no pool {key.name!r} in namespace {key.namespace!r}",
            hint="`bkpool status` lists the pools.",
            field="poolName",
        )
    return pool


def lifetime(pool: Pool, wanted: timedelta | None) -> timedelta:
    """How long a lease of this pool runs. Raises InvalidInput beyond the pool's maximum."""
    gateway = pool.spec.gateway
    if wanted is None:
        return gateway.token_ttl
    if not timedelta(0) < wanted <= gateway.max_token_ttl:
        raise InvalidInput(
            f"ttl: {render(wanted)} is not between 0 and this pool's maximum of {render(gateway.max_token_ttl)}",
            hint="Ask for less, or raise spec.gateway.maxTokenTTL of the pool.",
            field="ttl",
        )
    return wanted


def _by_digest(workers: Iterable[Worker], digest: str) -> Worker | EndedLease | None:
    workers = tuple(workers)
    for worker in workers:
        if worker.allocation is not None and worker.allocation.token_sha256 == digest:
            return worker
    past = (ended for worker in workers for ended in worker.status.ended)
    return next((ended for ended in past if ended.token_sha256 == digest), None)


def _gone(reason: EndReason, message: str) -> Gone:
    detail = f": {message}" if message else ""
    return Gone(
        f"this lease has ended ({reason.value}){detail}",
        hint="`bkpool allocate` makes a new lease.",
        code="LeaseEnded",
    )
