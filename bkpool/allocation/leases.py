"""What may be done with a lease: renew, look up, release; and the one way a lease is changed.

Every change is a compare-and-swap on the worker that the lease stands on. The right to ask is the token itself
(DESIGN rule 8), or to be who made the lease. Nothing here makes a lease or remembers one.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from bkpool.core import tokens
from bkpool.core.durations import render
from bkpool.core.errors import Conflict, Forbidden, Gone, InvalidInput, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.worker import EndedLease, EndReason, Lease, Worker
from bkpool.identity import Identity
from bkpool.identity.rules import is_theirs
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_CONFLICTS = 20
"""Tries of one compare-and-swap: more than any sane number of writers of one worker at once."""


@dataclass(frozen=True, slots=True)
class OwnLease:
    """The living lease on a worker, named by who made it instead of by its token."""

    worker: Key
    identities: tuple[Identity, ...]
    """Whom the caller may be."""


class LeaseService:
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

    async def renew(self, lease: str | OwnLease, ttl: timedelta | None) -> Worker:
        """Lets the lease run for `ttl` from now, at most to the end of its certificate.

        Args:
            lease: Its token, or what names it to its maker.
            ttl: None: the pool's tokenTTL.

        Returns:
            The worker with the lease as it is now.

        Raises:
            NotFound: No such lease, or not the caller's.
            Gone: It has ended.
            InvalidInput: The ttl is beyond the pool's maximum, or the lease has had that already.
        """
        worker = await self._find(lease)
        pool = find_pool(self._mirror, worker.pool)
        wanted = lifetime(pool, ttl)
        now = self._now()

        def renewed(lease: Lease) -> Lease:
            over = lease.ended(now)
            if over:
                raise _gone(over, lease.end_message)
            return lease.but(expires_at=min(now + wanted, _end_of_life(lease, pool, now)))

        worker = await self.change(worker, renewed)
        log.info("lease.renewed", **facts(worker), expires_at=worker.held_lease.expires_at.isoformat())
        return worker

    async def release(self, lease: str | OwnLease) -> Worker | None:
        """Ends the lease. Released already, or expired: nothing to do, and no error.

        Args:
            lease: Its token, or what names it to its maker.

        Returns:
            The worker with the ended lease; None where there was nothing to do.

        Raises:
            NotFound: No such lease, or not the caller's.
        """
        try:
            worker = await self._find(lease)
            worker = await self.change(worker, lambda lease: self._ended(lease, EndReason.RELEASED))
        except Gone:
            return None
        log.info("lease.released", **facts(worker))
        return worker

    async def lookup(self, token: str) -> Worker:
        """The worker of a living lease. Raises NotFound or Gone."""
        worker = await self._by_token(token)
        lease = worker.lease
        over = lease.ended(self._now()) if lease else EndReason.RELEASED
        if over:
            raise _gone(over, lease.end_message if lease else "")
        return worker

    async def abandon(self, worker: Worker) -> None:
        """Ends a lease that nobody was ever told of. Ended or gone already: nothing to do."""
        with suppress(Gone, NotFound):
            await self.change(worker, lambda lease: self._ended(lease, EndReason.ABANDONED))
        log.info("lease.abandoned", **facts(worker))

    def _ended(self, lease: Lease, reason: EndReason) -> Lease:
        if lease.ended_at is not None:
            raise _gone(lease.end_reason or reason, lease.end_message)
        return lease.but(ended_at=min(self._now(), lease.expires_at), end_reason=reason)

    async def _find(self, lease: str | OwnLease) -> Worker:
        return await (self._own(lease) if isinstance(lease, OwnLease) else self._by_token(lease))

    async def _own(self, named: OwnLease) -> Worker:
        """The worker with that lease. Whose it is not learns no more than if there were none. Raises NotFound."""
        with suppress(NotFound, Forbidden):  # Forbidden: bkpool itself has no rights in that namespace
            worker = await self._store.get(Worker, *named.worker)
            if worker.lease and is_theirs(worker.pool, named.identities, worker.lease.holder):
                return worker
        raise NotFound(
            f"workerName: there is no lease of yours on {named.worker.name}",
            hint="`bkpool allocate` makes a new lease.",
            code="NoSuchLease",
            field="workerName",
        )

    async def _by_token(self, token: str) -> Worker:
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

    async def change(self, worker: Worker, change: Callable[[Lease], Lease]) -> Worker:
        """Changes this worker's lease by compare-and-swap, on the worker as it is now if another writer was faster.

        Raises:
            Gone: The lease is no longer this worker's.
            NotFound: The worker is gone.
            Conflict: Others kept changing it.
        """
        allocation_id = worker.lease.id if worker.lease else ""
        for _ in range(MAX_CONFLICTS):
            if worker.lease is None or worker.lease.id != allocation_id:
                raise _gone(EndReason.RELEASED, "")
            try:
                changed = await self._store.replace(worker.with_lease(change(worker.lease)))
            except Conflict:
                worker = await self._store.get(Worker, worker.key.namespace, worker.key.name)
                continue
            self._mirror.apply(changed)
            return changed
        raise Conflict(f"{worker.key.name} is being changed by too many at once", hint="Try again.", retry_after=1)


def facts(worker: Worker) -> dict[str, str]:
    """What a log line about a worker's lease says of it."""
    lease = worker.lease
    about = {"worker": str(worker.key), "pool": str(worker.pool)}
    return about | ({"allocation": lease.id, "identity": lease.requested_by} if lease else {})


def living(workers: Iterable[Worker], now: datetime) -> list[Worker]:
    """Those of the workers that have a living lease."""
    return [worker for worker in workers if worker.lease and not worker.lease.ended(now)]


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
        if worker.lease is not None and _same(worker.lease.token_sha256, digest):
            return worker
    past = (ended for worker in workers for ended in worker.status.ended)
    return next((ended for ended in past if _same(ended.token_sha256, digest)), None)


def _same(stored: str, digest: str) -> bool:
    return hmac.compare_digest(stored.encode(), digest.encode())


def _end_of_life(lease: Lease, pool: Pool, now: datetime) -> datetime:
    """The latest end of a lease. The pool's maximum may have been lowered since the lease was made."""
    end = min(lease.not_after, lease.allocated_at + pool.spec.gateway.max_token_ttl)
    if end <= now:
        raise InvalidInput(
            f"ttl: this lease has run for the pool's maximum of {render(pool.spec.gateway.max_token_ttl)} already",
            hint=f"It ends at {lease.expires_at:%H:%M:%S} UTC; `bkpool allocate` makes a new lease.",
            field="ttl",
        )
    return end


def _gone(reason: EndReason, message: str) -> Gone:
    detail = f": {message}" if message else ""
    return Gone(
        f"this lease has ended ({reason.value}){detail}",
        hint="`bkpool allocate` makes a new lease.",
        code="LeaseEnded",
    )
