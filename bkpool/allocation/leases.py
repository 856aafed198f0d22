"""What can be done with a lease that exists: renew it, look it up, release it, revoke it.

Every change is a compare-and-swap on the worker that has the lease. A caller may change a lease if they have its
token (rule 8, docs/rules.md#r8), or if they asked for it. This module creates no lease and keeps none in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from bkpool.allocation.known_objects import missing_pool
from bkpool.core import tokens
from bkpool.core.durations import render
from bkpool.core.errors import BkpoolError, Conflict, Forbidden, Gone, InvalidInput, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import EndedLease, EndReason, Lease, Worker
from bkpool.identity import Identity
from bkpool.identity.rules import is_theirs
from bkpool.store import Store
from bkpool.store.lease_search import LeaseSearch
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)

MAX_CONFLICTS = 20
"""Attempts of one compare-and-swap: more than the writers that one worker ever has at the same time."""


MayRenew = Callable[[Worker, Pool], Awaitable[None]]
"""Asks today's rules about the worker's lease, which has not ended. Raises Forbidden or Unavailable."""


@dataclass(frozen=True, slots=True)
class OwnLease:
    """Names a lease by its worker, for the caller who asked for it and does not give its token."""

    worker: Key
    identities: tuple[Identity, ...]
    """The identities that the caller may act as."""


class LeaseService:
    """Changes and ends leases.

    Args:
        store: Where the workers are.
        mirror: The copy in memory. Where it is stale, the store decides.
        now: The clock.
        pause: Waits that many seconds, before the store is searched again for unknown tokens.
    """

    def __init__(
        self,
        *,
        store: Store,
        mirror: Mirror,
        now: Callable[[], datetime],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._now = now
        self._search = LeaseSearch(store, mirror.apply, pause=pause)

    async def renew(self, lease: str | OwnLease, ttl: timedelta | None, may_renew: MayRenew) -> Worker:
        """Makes the lease end `ttl` from now, at most when its certificate expires.

        Args:
            lease: Its token, or its worker.
            ttl: None: the pool's tokenTTL. Today's spec of the pool limits it.
            may_renew: Raises Forbidden if the caller who made the lease may not use its pool today.

        Returns:
            The worker with the lease as it is now.

        Raises:
            NotFound: There is no such lease, or it is not the caller's.
            Gone: It has ended.
            Forbidden: `may_renew` says so.
            InvalidInput: The ttl is above the pool's maximum, or the lease has already run for that long.
        """
        worker = await self._find(lease)
        pool = find_pool(self._mirror, worker.pool)
        if worker.lease is not None and not worker.lease.ended(self._now()):
            await may_renew(worker, pool)
        wanted = lease_duration(pool, ttl)
        now = self._now()

        def renewed(lease: Lease) -> Lease:
            over = lease.ended(now)
            if over:
                raise lease_over(over, lease.end_message)
            return lease.but(expires_at=min(now + wanted, _latest_end(lease, pool, now)), undelivered=None)

        worker = await self.change(worker, renewed)
        log.info("lease.renewed", **lease_facts(worker), expires_at=worker.held_lease.expires_at.isoformat())
        return worker

    async def release(self, lease: str | OwnLease, *, now: bool = False) -> Worker | None:
        """Ends the lease. A lease that was released before or has expired is no error.

        Args:
            lease: Its token, or its worker.
            now: Revoke it, also if it has ended: its connections and builds are cut instead of ending by themselves.

        Returns:
            The worker with the ended lease; None if it had ended before.

        Raises:
            NotFound: There is no such lease, or it is not the caller's.
        """
        try:
            worker = await self._find(lease)
            if now:
                return await self.revoke(worker, _revoked_by(lease))
            worker = await self.change(worker, lambda lease: self._ended(lease, EndReason.RELEASED))
        except Gone:
            return None
        log.info("lease.released", **lease_facts(worker))
        return worker

    async def revoke(self, worker: Worker, by: str) -> Worker:
        """Ends the worker's lease and has its connections and builds cut, also if the lease has ended and they drain.

        The end is in the store when this returns. Each gateway cuts when it sees the write.

        Args:
            worker: The worker with the lease, perhaps stale.
            by: Who revokes it, as its holder is told: "by the admin".

        Returns:
            The worker with the revoked lease. A lease that was revoked before is not changed.

        Raises:
            Gone: The lease has left its worker meanwhile, so nothing of it is open.
            NotFound: The worker was deleted.
            Conflict: Others changed it all the time.
        """
        if worker.held_lease.end_reason is EndReason.REVOKED:
            return worker
        worker = await self.change(worker, lambda lease: self._revoked(lease, by))
        log.info("lease.revoked", **lease_facts(worker), by=worker.held_lease.end_message)
        return worker

    async def lookup(self, token: str) -> Worker:
        """The worker of a live lease. Who looks it up has its token, so it counts as delivered.

        Raises:
            NotFound: There is no such lease.
            Gone: It has ended.
        """
        worker = await self._by_token(token)
        lease = worker.lease
        over = lease.ended(self._now()) if lease else EndReason.RELEASED
        if over:
            raise lease_over(over, worker.lease_end_message)
        if worker.undelivered is not None:
            with suppress(BkpoolError):  # the answer does not depend on it
                await self.mark_delivered(worker)
        return worker

    async def abandon(self, worker: Worker) -> None:
        """Ends a lease that no caller has. It is no error if it has ended already.

        Nothing ends if a caller has got it meanwhile, or if another replica answers a request for it now.

        Args:
            worker: The worker with the lease, as this replica claimed it.
        """
        claimed = worker.held_lease.undelivered

        def check(worker: Worker) -> None:
            now = worker.undelivered
            if claimed is not None and (now is None or now.replica != claimed.replica):
                raise lease_over(EndReason.ABANDONED, "")

        with suppress(Gone, NotFound):
            await self.change(worker, lambda lease: self._ended(lease, EndReason.ABANDONED), check)
            log.info("lease.abandoned", **lease_facts(worker))

    async def mark_delivered(self, worker: Worker) -> None:
        """Writes that a caller has the lease, unless the store has a sign of that already, or the lease is over.

        Args:
            worker: The worker with the lease, perhaps stale.
        """
        newest = self._mirror.workers.get(worker.key, worker)
        lease = newest.lease
        if lease is None or lease.id != worker.held_lease.id or newest.undelivered is None or lease.ended_at:
            return
        with suppress(Gone, NotFound):
            await self.change(newest, lambda lease: lease.but(undelivered=None))

    async def renew_undelivered(self, worker: Worker, replica: str, *, renewals: int = 1) -> None:
        """Writes that this replica answers a request for the lease, unless a caller has it.

        Args:
            worker: The worker with the lease, perhaps stale.
            replica: The replica.
            renewals: Added to the number of renewals; 0 only takes the request over from another replica.

        Raises:
            Gone: The lease is over.
            NotFound: The worker was deleted.
        """
        newest = self._mirror.workers.get(worker.key, worker)
        if newest.lease is None or newest.lease.id != worker.held_lease.id:
            newest = worker

        def renewed(lease: Lease) -> Lease:
            if lease.ended_at is not None:
                raise lease_over(lease.end_reason or EndReason.RELEASED, lease.end_message)
            earlier = lease.undelivered
            if earlier is None:
                return lease
            return lease.but(undelivered=earlier.but(replica=replica, renewals=earlier.renewals + renewals))

        await self.change(newest, renewed)

    def _ended(self, lease: Lease, reason: EndReason) -> Lease:
        if lease.ended_at is not None:
            raise lease_over(lease.end_reason or reason, lease.end_message)
        return lease.but(ended_at=min(self._now(), lease.expires_at), end_reason=reason)

    def _revoked(self, lease: Lease, by: str) -> Lease:
        if lease.end_reason is EndReason.REVOKED:  # another request was faster
            return lease
        ended_at = lease.ended_at or min(self._now(), lease.expires_at)
        return lease.but(ended_at=ended_at, end_reason=EndReason.REVOKED, end_message=by)

    async def _find(self, lease: str | OwnLease) -> Worker:
        return await (self._own(lease) if isinstance(lease, OwnLease) else self._by_token(lease))

    async def _own(self, named: OwnLease) -> Worker:
        """The worker with the caller's lease. Non-owners get the same NotFound as for a missing lease."""
        try:
            worker = await self._store.get(Worker, *named.worker)
            if worker.lease and is_theirs(worker.pool, named.identities, worker.lease.holder):
                return worker
        except UnreadableObject as error:
            if may_be_theirs(error.found, named.identities):
                raise
        except (NotFound, Forbidden):  # Forbidden: bkpool itself may not read workers in that namespace
            pass
        raise NotFound(
            f"there is no lease of yours on worker {named.worker.name!r} in namespace {named.worker.namespace!r}",
            hint="It has ended already, or it belongs to somebody else. `bkpool status -p POOL` shows the workers.",
            code="NoSuchLease",
            field="workerName",
        )

    async def _by_token(self, token: str) -> Worker:
        """The worker whose lease has this token.

        Raises:
            NotFound: There is none.
            Gone: The lease has ended, with the reason.
            UnreadableObject: The worker cannot be read.
            Unavailable: The lease is not known, and the store does not answer.
        """
        digest = tokens.digest(token)
        if tokens.well_formed(token):
            found = self._mirror.leases.find(digest)
            if found is None:  # another replica may have created it a moment ago
                await self._search.find(digest)
                found = self._mirror.leases.find(digest)
            if isinstance(found, Unreadable):  # the lease can neither be renewed nor be ended
                raise UnreadableObject(found)
            if isinstance(found, EndedLease):
                raise lease_over(found.reason, found.message_with_log)
            if found is not None:
                return found
        raise NotFound(
            "no lease has this token",
            hint="It has ended already, or it is of another appliance. `bkpool status -p POOL` shows the workers.",
            code="NoSuchLease",
            field="token",
        )

    async def change(
        self, worker: Worker, change: Callable[[Lease], Lease], check: Callable[[Worker], None] = lambda _worker: None
    ) -> Worker:
        """Changes this worker's lease by compare-and-swap, and retries if another writer was faster.

        Args:
            worker: The worker with the lease, perhaps stale.
            change: Returns the changed lease. It may be called several times.
            check: Raises an error if the lease of this worker must not be changed. It is called before each attempt.

        Raises:
            Gone: The worker does not have this lease any more.
            NotFound: The worker was deleted.
            Conflict: Others changed it at each of `MAX_CONFLICTS` attempts.
        """
        lease_id = worker.lease.id if worker.lease else ""
        for _ in range(MAX_CONFLICTS):
            if worker.lease is None or worker.lease.id != lease_id:
                raise lease_over(EndReason.RELEASED, "")
            check(worker)
            try:
                changed = await self._store.replace(worker.with_lease(change(worker.lease)))
            except Conflict:
                worker = await self._store.get(Worker, worker.key.namespace, worker.key.name)
                continue
            self._mirror.apply(changed)
            return changed
        raise Conflict(f"too many requests change {worker.key.name} at once", hint="Try again.", retry_after=1)


def may_be_theirs(found: Unreadable, identities: Iterable[Identity]) -> bool:
    """Whether a worker that cannot be read has a lease that these identities may change, as far as one can tell."""
    pool = found.pool
    return pool is not None and found.may_be_leased and is_theirs(pool, identities, found.of_lease("holder"))


def _revoked_by(lease: str | OwnLease) -> str:
    return "with its token" if isinstance(lease, str) else revoker(lease.identities)


def revoker(identities: Iterable[Identity]) -> str:
    """Who revokes a lease, as its holder is told: the admin, or the caller who made it. It names nobody."""
    return "by the admin" if any(one.admin for one in identities) else "by its maker"


def lease_facts(worker: Worker) -> dict[str, str]:
    """The fields of a log line about a worker's lease."""
    lease = worker.lease
    about = {"worker": str(worker.key), "pool": str(worker.pool)}
    return about | ({"allocation": lease.id, "identity": lease.requested_by} if lease else {})


def find_pool(mirror: Mirror, key: Key) -> Pool:
    """The pool with that name. Raises NotFound, or UnreadableObject."""
    pool = mirror.pools.get(key)
    if pool is None:
        raise missing_pool(mirror, key)
    return pool


def lease_duration(pool: Pool, wanted: timedelta | None) -> timedelta:
    """How long a lease of this pool runs.

    Args:
        pool: The pool.
        wanted: What the caller asked for; None: the pool's tokenTTL.

    Raises:
        InvalidInput: It is not above 0, or it is above the pool's maximum.
    """
    gateway = pool.spec.gateway
    if wanted is None:
        return gateway.token_ttl
    if not timedelta(0) < wanted <= gateway.max_token_ttl:
        longest = render(gateway.max_token_ttl)
        raise InvalidInput(
            f"a lease of pool {pool.key.name!r} can run for more than 0s and up to {longest}, "
            f"not for {render(wanted)}",
            hint="Ask for a shorter time, or raise spec.gateway.maxTokenTTL of the pool.",
            field="ttl",
        )
    return wanted


def _latest_end(lease: Lease, pool: Pool, now: datetime) -> datetime:
    """The latest possible end of a lease. The pool's maximum may have been lowered since the lease was created."""
    end = min(lease.not_after, lease.allocated_at + pool.spec.gateway.max_token_ttl)
    if end <= now:
        raise InvalidInput(
            f"this lease has already run for the pool's maximum of {render(pool.spec.gateway.max_token_ttl)}",
            hint=f"It ends at {lease.expires_at:%H:%M:%S} UTC. Get a new lease with `bkpool allocate`.",
            field="ttl",
        )
    return end


def lease_over(reason: EndReason, message: str) -> Gone:
    """The error for a lease that has ended."""
    detail = f": {message}" if message else ""
    return Gone(
        f"this lease has ended ({reason.value}){detail}",
        hint="Get a new lease with `bkpool allocate`.",
        code="LeaseEnded",
    )
