"""Making a lease: choose, claim by compare-and-swap, wait until the worker is ready, answer.

Nothing of it is kept in memory but who waits and which answers are still owed, so that a caller who goes away leaves
nothing behind. It never starts a worker: that is the controller's, who sees the claim in the store.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog

from bkpool.allocation.caller_limits import CallerLimits
from bkpool.allocation.leases import LeaseService, facts, find_pool, lifetime, living
from bkpool.allocation.wait_queue import Waiter, WaitQueue
from bkpool.core import tokens
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.durations import render
from bkpool.core.errors import BkpoolError, Conflict, Gone, NoCapacity, NotFound, WorkerFailed
from bkpool.core.names import LABEL_REQUEST, Key, Slot
from bkpool.core.placement import choose
from bkpool.core.pool import Pool
from bkpool.core.worker import EndReason, Lease, Worker, new_worker
from bkpool.identity import Identity
from bkpool.pki.authority import Authority, key_of_request
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AllocationRequest:
    """What a caller asks for."""

    pool: Key
    wait: timedelta
    """How long to wait for a worker."""
    ttl: timedelta | None = None
    """None: the pool's tokenTTL."""
    job_id: str = ""
    csr_pem: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease as its holder gets it. The token and the key are here and in the answer, and nowhere else."""

    worker: Worker
    token: str
    expires_at: datetime
    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes | None
    """None where the caller brought a CSR."""


@dataclass(slots=True)
class _Owed:
    """Answers still owed for one lease; with the last one gone unanswered, nobody knows the lease."""

    requests: int = 0
    answered: bool = False


class Allocator:
    """Leases workers to callers.

    Args:
        store: Where the workers are.
        mirror: The copy in memory that choices are made from; a stale one costs a conflict, never a double lease.
        leases: Changes a lease once it is made.
        authority: Signs the client certificates.
        token_key: Key of the tokens' HMAC.
        caches: The caches that exist, with their owners (a runtime's `caches`).
        now: The clock.
        limits: Counts what each caller asks for; None: an account of its own.
    """

    def __init__(
        self,
        *,
        store: Store,
        mirror: Mirror,
        leases: LeaseService,
        authority: Authority,
        token_key: bytes,
        caches: Callable[[], Mapping[Slot, str | None]],
        now: Callable[[], datetime],
        limits: CallerLimits | None = None,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._leases = leases
        self._authority = authority
        self._token_key = token_key
        self._caches = caches
        self._now = now
        self._limits = limits or CallerLimits()
        self._lines: dict[Key, WaitQueue] = {}
        self._owed: dict[str, _Owed] = {}
        self._changed: dict[Key, asyncio.Event] = {}
        self._undoing: set[asyncio.Future[Any]] = set()
        """Claims whose caller has gone, and their undoing."""
        self._unsubscribe = mirror.subscribe(self._on_change)

    async def close(self) -> None:
        """Stops listening and finishes undoing what callers left behind."""
        self._unsubscribe()
        while self._undoing:
            await asyncio.gather(*self._undoing, return_exceptions=True)

    def turn_away(self, error: BkpoolError) -> None:
        """Sends everybody in line away: this appliance is ending."""
        for line in self._lines.values():
            line.dismiss(error)

    def waiting(self, pool: Key) -> int:
        """How many requests wait for this pool here."""
        line = self._lines.get(pool)
        return len(line) if line else 0

    async def allocate(self, caller: Identity, request: AllocationRequest) -> Grant:
        """Leases a worker, waiting for one if need be. The same caller and job get the same lease.

        Raises:
            NotFound: No such pool.
            InvalidInput: The ttl is beyond the pool's maximum, or the CSR is unusable.
            NoCapacity: No worker was ready within `request.wait`, too many wait, or a limit of the pool is reached
                (`LimitReached`).
            WorkerFailed: The worker does not come up; the message says why.
        """
        pool = find_pool(self._mirror, request.pool)
        ttl = lifetime(pool, request.ttl)
        if request.csr_pem is not None:
            key_of_request(request.csr_pem)  # a bad one is told before anything is leased
        worker: Worker | None = None
        try:
            async with asyncio.timeout(request.wait.total_seconds()):
                while True:
                    worker = await self._obtain(caller, pool, ttl, request)
                    ready = await self._ready(worker)
                    if ready is not None:
                        break
                    self._settle(worker)
                    worker = None
            return self._grant(ready, request.csr_pem)
        except TimeoutError:
            raise self._too_long(request, worker) from None
        finally:
            if worker is not None:
                self._settle(worker)

    async def _obtain(self, caller: Identity, pool: Pool, ttl: timedelta, request: AllocationRequest) -> Worker:
        """A worker with a lease for this request, made now or before; an answer is owed for it from here on."""
        request_key = tokens.request_key(caller.digest, request.job_id) if request.job_id else None
        if request_key is not None:
            earlier = await self._held(pool, request_key)
            if earlier is not None:
                return self._owe(earlier, answered=True)
        held = [w.held_lease for w in living(self._mirror.workers_of(pool.key), self._now())]
        with self._limits.one_more(pool, caller, request_key or object(), held) as claiming:
            claimed = await self._claim(caller, pool, ttl, request, request_key, claiming=claiming)
        if request_key is None:
            return claimed
        # Another replica may have claimed for the same job at the same moment: the oldest lease wins everywhere.
        try:
            oldest = await self._held(pool, request_key)
        except BaseException:
            self._settle(claimed)
            raise
        if oldest is None or oldest.uid == claimed.uid:
            return claimed
        self._settle(claimed)
        return self._owe(oldest, answered=True)

    async def _held(self, pool: Pool, request_key: str) -> Worker | None:
        """The oldest living lease of that request, read live."""
        listing = await self._store.list(Worker, namespace=pool.key.namespace, labels={LABEL_REQUEST: request_key})
        found = [w for w in living(listing.items, self._now()) if w.pool == pool.key]
        if not found:
            return None
        oldest = min(found, key=lambda worker: (worker.held_lease.allocated_at, worker.key.name))
        self._mirror.apply(oldest)
        if oldest.held_lease.token_sha256:
            return oldest
        # Whoever created it was killed, or is just about to write its token: the same one, so both may.
        try:
            return await self._leases.change(oldest, lambda lease: self._signed(oldest, lease))
        except (Gone, NotFound):
            return None

    async def _claim(
        self,
        caller: Identity,
        pool: Pool,
        ttl: timedelta,
        request: AllocationRequest,
        request_key: str | None,
        *,
        claiming: Callable[[str], None],
    ) -> Worker:
        """Waits in line for a place and takes it by compare-and-swap; when another was faster, waits at the front."""
        line = self._line(pool.key)
        first = False
        while True:
            allocation_id = str(uuid.uuid4())
            claiming(allocation_id)
            owner = cache_owner_digest(pool.spec.reuse, caller.tenant, pool.uid, allocation_id)
            spot = await self._stand(line, pool.key, Waiter(owner, request_key), first=first)
            if isinstance(spot, Worker) and spot.lease is not None:
                return self._owe(spot, answered=True)  # the lease of the same job, made while this request waited
            now = self._now()
            allocation = Lease(
                id=allocation_id,
                job_id=request.job_id,
                token_sha256="",
                requested_by=caller.name,
                holder=caller.digest,
                owner=owner,
                allocated_at=now,
                expires_at=now + ttl,
                not_after=now + pool.spec.gateway.max_token_ttl,
                metadata=dict(request.metadata),
            )
            try:
                return self._owe(await self._take(pool, spot, allocation, request_key))
            except (Conflict, NotFound):
                first = True
                await self._refresh(spot)
            finally:
                line.claimed(spot)

    async def _stand(self, line: WaitQueue, pool: Key, waiter: Waiter, *, first: bool) -> Worker | Slot:
        line.join(waiter, first=first)
        self._serve(pool)
        try:
            return await waiter.served
        except asyncio.CancelledError:
            line.leave(waiter)
            self._serve(pool)
            raise

    async def _refresh(self, spot: Worker | Slot) -> None:
        """After a lost claim: look at the store itself, so as not to choose the same again."""
        key = spot.worker if isinstance(spot, Slot) else spot.key
        with suppress(NotFound):
            self._mirror.apply(await self._store.get(Worker, *key))

    async def _take(self, pool: Pool, spot: Worker | Slot, allocation: Lease, request_key: str | None) -> Worker:
        """The claim itself. A caller who goes away does not stop it: it is finished, and then undone."""
        labels = {LABEL_REQUEST: request_key} if request_key else {}
        writing = asyncio.ensure_future(
            self._create(pool, spot, allocation, labels)
            if isinstance(spot, Slot)
            else self._replace(spot, allocation, labels)
        )
        try:
            worker = await asyncio.shield(writing)
        except asyncio.CancelledError:
            self._undoing.add(writing)
            writing.add_done_callback(self._undo)
            raise
        self._mirror.apply(worker)
        log.info("lease.claimed", **facts(worker))
        return worker

    async def _replace(self, worker: Worker, allocation: Lease, labels: Mapping[str, str]) -> Worker:
        metadata = worker.metadata.but(labels={**worker.metadata.labels, **labels})
        return await self._store.replace(worker.but(metadata=metadata).with_lease(self._signed(worker, allocation)))

    async def _create(self, pool: Pool, slot: Slot, allocation: Lease, labels: Mapping[str, str]) -> Worker:
        """Creation is the claim. The token is made of the uid, which is the store's to give: hence a second write."""
        worker = await self._store.create(new_worker(slot, pool, allocation, labels))
        try:
            return await self._leases.change(worker, lambda lease: self._signed(worker, lease))
        except BaseException:
            self._abandon(worker)
            raise

    def _signed(self, worker: Worker, allocation: Lease) -> Lease:
        token = tokens.derive(self._token_key, worker.uid, allocation.id)
        return allocation.but(token_sha256=tokens.digest(token))

    def _undo(self, writing: asyncio.Future[Worker]) -> None:
        self._undoing.discard(writing)
        if not writing.cancelled() and writing.exception() is None:
            self._abandon(writing.result())

    async def _ready(self, worker: Worker) -> Worker | None:
        """Waits until the leased worker is up: one that stood idle is at once, else the controller brings it up.

        Returns:
            The worker; None if this was another request's lease, of the same job, and that one gave it up.
        """
        while True:
            event = self._changed.setdefault(worker.pool, asyncio.Event())
            current = self._mirror.workers.get(worker.key)
            over = _outcome(current, worker.held_lease)
            if over is not None:
                if over.end_reason is EndReason.ABANDONED:
                    return None
                raise WorkerFailed(
                    f"{worker.key.name} did not come up: {over.end_message or 'its lease has ended before'}",
                    hint=f"Look at `bkpool logs {worker.key.name}`, and run `bkpool doctor`.",
                )
            if current and current.routable_endpoint is not None:
                return current
            await event.wait()

    def _grant(self, worker: Worker, csr_pem: bytes | None) -> Grant:
        lease = worker.held_lease
        token = tokens.derive(self._token_key, worker.uid, lease.id)
        leaf = self._authority.issue_client(
            token, not_before=lease.allocated_at, not_after=lease.not_after, csr_pem=csr_pem
        )
        self._owed[lease.id].answered = True
        return Grant(worker, token, lease.expires_at, self._authority.cert_pem, leaf.cert_pem, leaf.key_pem)

    def _too_long(self, request: AllocationRequest, worker: Worker | None) -> NoCapacity:
        """Why nothing came in time: the full pool, or the worker that did not get ready."""
        where = f"pool {request.pool.name!r}"
        if worker is not None:
            current = self._mirror.workers.get(worker.key, worker)
            why = current.status.message or f"it is {current.status.phase.value}"
            message = f"{worker.key.name} of {where} was not ready within {render(request.wait)}: {why}"
        else:
            message = f"no worker of {where} came free within {render(request.wait)}"
        return NoCapacity(
            message, hint="Wait longer (`wait`), or raise spec.scaling.max of the pool.", retry_after=30
        )

    # --- answers owed -----------------------------------------------------------------------------------------------

    def _owe(self, worker: Worker, *, answered: bool = False) -> Worker:
        """One more answer is owed. `answered`: the lease was not made just now, so somebody may have it already."""
        owed = self._owed.setdefault(worker.held_lease.id, _Owed(answered=answered))
        owed.requests += 1
        return worker

    def _settle(self, worker: Worker) -> None:
        """One answer fewer is owed. If it was the last and nobody ever got one, nobody knows the lease: it ends."""
        owed = self._owed[worker.held_lease.id]
        owed.requests -= 1
        if owed.requests:
            return
        del self._owed[worker.held_lease.id]
        if not owed.answered:
            self._abandon(worker)

    def _abandon(self, worker: Worker) -> None:
        task = asyncio.get_running_loop().create_task(self._leases.abandon(worker))
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    # --- the line ---------------------------------------------------------------------------------------------------

    def _line(self, pool: Key) -> WaitQueue:
        if pool not in self._lines:
            self._lines[pool] = WaitQueue(lambda waiter, taken: self._choose(pool, waiter, taken))
        return self._lines[pool]

    def _choose(self, pool: Key, waiter: Waiter, taken: frozenset[Slot]) -> Worker | Slot | None:
        current = self._mirror.pools.get(pool)
        if current is None:
            return None
        return choose(current, self._mirror.workers_of(pool), self._caches(), waiter.owner, taken)

    def _serve(self, pool: Key) -> None:
        line = self._lines.get(pool)
        if not line:
            return
        if pool not in self._mirror.pools:
            line.dismiss(NotFound(f"pool {pool.name!r} was deleted", hint="`bkpool status` lists the pools."))
            return
        line.serve(self._mirror.workers_of(pool), self._now())

    def _on_change(self, pool: Key) -> None:
        event = self._changed.pop(pool, None)
        if event is not None:
            event.set()
        self._serve(pool)


def _outcome(worker: Worker | None, lease: Lease) -> Lease | None:
    """How a lease ended, from the worker it stood on; None while it stands."""
    if worker is None:
        return lease.but(end_message="the worker was removed while it was being prepared")
    if worker.lease is not None and worker.lease.id == lease.id:
        return worker.lease if worker.lease.ended_at is not None else None
    past = next((ended for ended in worker.status.ended if ended.token_sha256 == lease.token_sha256), None)
    return lease.but(end_reason=past.reason, end_message=past.message) if past else lease
