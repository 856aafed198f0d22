"""Leases a worker to a caller: wait in the queue, claim the worker, wait until it is ready, offer it.

In memory it keeps only who waits and which requests are open, so a caller who goes away leaves nothing behind. It
never starts a worker: the controller does, when it sees the claim in the store.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial

from bkpool.allocation import no_worker
from bkpool.allocation.abandoning import Abandoner
from bkpool.allocation.caller_limits import CallerLimits
from bkpool.allocation.claiming import ClaimEnded, Claimer
from bkpool.allocation.deliveries import Deliveries
from bkpool.allocation.job_leases import JobLeases
from bkpool.allocation.keys_ahead import KeysAhead
from bkpool.allocation.known_caches import KnownCaches, ReportedCaches
from bkpool.allocation.known_objects import find_lending_pool
from bkpool.allocation.leased_workers import LeasedWorkers
from bkpool.allocation.leases import LeaseService, lease_duration
from bkpool.allocation.orders import AllocationRequest, Grant, MayStill, Offer, Order, StoreAsked, may_always
from bkpool.allocation.pool_queues import PoolQueues
from bkpool.allocation.presence import Answers, Presence, as_stored
from bkpool.allocation.wait_queue import MAX_WAITERS, Waiter
from bkpool.core import tokens
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.caller_share import most_waiting
from bkpool.core.claim_order import Request
from bkpool.core.errors import BkpoolError, Conflict, Gone, NoCapacity, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.queueing import Target
from bkpool.core.worker import Lease, Phase, Worker
from bkpool.identity import Identity
from bkpool.pki.authority import Authority, key_of_request
from bkpool.pki.rotation import Rotation
from bkpool.store import Store
from bkpool.store.mirror import Mirror, MirrorChange

_NOW = 5.0
"""Seconds that a request without a wait has for what a ready worker still takes: the writes of the claim."""
_SLOW_STORE = 0.1
"""Seconds after which a store that has not answered is the reason why a request got no worker."""
_TRUSTED = 1.0
"""Seconds for which a caller's right and the pool's settings count as those of now."""
_LONGEST_AFTER_TIE = 0.1
"""Seconds, at most, until a request claims again after it gave up a claim and found no other lease of its job."""


class Allocator:
    """Leases workers to callers.

    Args:
        store: Where the workers are.
        mirror: The copy in memory from which workers are chosen. A stale copy costs a conflict, never a double lease.
        leases: Changes and ends a lease once it is stored.
        authority: Signs the client certificates.
        rotation: Says which CA signs and is trusted after a rotation; None: there was none.
        token_key: Key of the HMAC of lease tokens.
        caches: The caches that exist, with their owners (`Runtime.caches`).
        now: The clock.
        answers: Whether a worker's buildkitd answers now (`Daemons.answers`).
        limits: Counts what each caller asks for; None: a new counter that is not shared.
        max_waiters: Requests that may wait for one pool at once.
        on_waiting: Called when a request begins to wait, because nothing was free.
        replica: The name of this replica, which no other has.
        pause: Waits that many seconds.
        jitter: Returns a number from 0 to 1.
    """

    def __init__(
        self,
        *,
        store: Store,
        mirror: Mirror,
        leases: LeaseService,
        authority: Authority,
        token_key: bytes,
        caches: ReportedCaches,
        now: Callable[[], datetime],
        answers: Answers = as_stored,
        limits: CallerLimits | None = None,
        max_waiters: int = MAX_WAITERS,
        rotation: Rotation | None = None,
        on_waiting: Callable[[], None] = lambda: None,
        replica: str = "api",
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._mirror = mirror
        self._rotation = rotation or Rotation(authority, None, now)
        self._caches = KnownCaches(caches)
        self._now = now
        self._limits = limits or CallerLimits()
        self._max_waiters = max_waiters
        self._queues = PoolQueues(mirror, self._caches, now, max_waiters, on_waiting)
        self._presence = Presence(store, mirror, now, answers)
        self._workers = LeasedWorkers(mirror, self._presence)
        self._leases = leases
        self._replica = f"{replica}/{uuid.uuid4().hex[:8]}"  # after a start it is another one
        self._abandoner = Abandoner(leases)
        self._deliveries = Deliveries(leases, self._abandoner.abandon, self._replica, pause=pause)
        self._claimer = Claimer(
            store=store, mirror=mirror, leases=leases, deliveries=self._deliveries, token_key=token_key
        )
        self._jobs = JobLeases(store, mirror, self._claimer, now)
        self._pause = pause
        self._jitter = jitter
        self._keys = KeysAhead()
        self._unsubscribe = mirror.subscribe(self._on_change)

    async def close(self) -> None:
        """Stops listening, and waits until everything that callers left behind is undone."""
        self._unsubscribe()
        self._workers.close()
        self._queues.close()
        self._jobs.close()
        self._caches.close()
        await self._claimer.close()
        await self._deliveries.close()
        await self._abandoner.close()
        self._keys.close()

    def refuse_all(self, error: BkpoolError) -> None:
        """Fails every request that waits, because this process is about to end."""
        self._queues.refuse_all(error)

    def waiting(self, pool: Key) -> int:
        """How many requests wait for this pool at this replica."""
        return self._queues.waiting(pool)

    @asynccontextmanager
    async def offer(
        self, caller: Identity, request: AllocationRequest, may_still: MayStill = may_always
    ) -> AsyncIterator[Offer]:
        """Leases a worker, and waits for one if necessary. The same caller and jobId get the same lease.

        The body sends the answer and calls `Offer.answered`. If it fails before that, no caller has the lease, and it
        ends. A request that has waited asks `may_still` before it claims, and gets what today's pool says.

        Raises:
            NotFound: There is no such pool.
            InvalidInput: The ttl is above the pool's maximum, or the CSR cannot be used.
            NoCapacity: No worker was ready within `request.wait`, too many requests wait, or a limit of the pool is
                reached (`LimitReached`).
            Unavailable: The store does not write the lease in time.
            Gone: The lease was revoked before its worker was ready, or the pool is being removed.
            WorkerFailed: The worker does not start; the message has the reason.
        """
        pool = find_lending_pool(self._mirror, request.pool)
        ttl = lease_duration(pool, request.ttl)
        if request.csr_pem is not None:
            key_of_request(request.csr_pem)  # refuses an unusable CSR before anything is leased
        key = tokens.request_key(caller.digest, request.job_id) if request.job_id else ""
        job = Request(pool.key, key) if key else None
        order = Order(caller, pool, ttl, request, job, may_still=may_still)
        offer: Offer | None = None
        try:
            worker = await self._ready_worker(order)
        except BaseException:
            self._mirror.rush.ends(id(order))
            raise
        try:
            offer = Offer(self._grant(worker, request.csr_pem))
            yield offer
        finally:
            self._mirror.rush.ends(id(order))
            if offer is None or offer.receipt is None:
                self._deliveries.give_up(worker)
            else:
                self._deliveries.answered(worker, offer.receipt)

    async def _ready_worker(self, order: Order) -> Worker:
        """A worker with a lease for this request, which is ready. `_deliveries` counts the request."""
        worker: Worker | None = None
        try:
            seconds = _NOW if order.request.only_ready else order.request.wait.total_seconds()
            async with asyncio.timeout(seconds):
                while True:
                    worker = await self._find_or_make_lease(order)
                    if worker.routable_endpoint is None:
                        self._mirror.rush.ends(id(order))  # the controller makes it ready
                    ready = await self._workers.until_ready(worker)
                    if ready is not None:
                        worker = None
                        return ready
                    self._deliveries.give_up(worker)
                    worker = None
        except TimeoutError:
            raise self._timed_out(order, worker) from None
        finally:
            if worker is not None:
                self._deliveries.give_up(worker)

    # --- a lease for a request --------------------------------------------------------------------------------------

    async def _find_or_make_lease(self, order: Order) -> Worker:
        """A worker with a lease for this request, made now or before. `_deliveries` counts the request."""
        earlier = await self._join_earlier(order)
        if earlier is not None:
            return earlier
        pool, held, now = order.pool, self._mirror.index_of(order.pool.key).leases, self._now()
        waiting = most_waiting(pool.spec, admin=order.caller.admin, places=self._max_waiters)
        with self._limits.one_more(
            pool, order.caller, order.request_key or object(), held, at=now, most_waiting=waiting
        ) as about_to_claim:
            return await self._lease_in_turn(order, about_to_claim)

    async def _lease_in_turn(self, order: Order, about_to_claim: Callable[[str], None]) -> Worker:
        """Waits for a turn, and takes what it brings: the job's lease, or one that is claimed.

        Where another replica was faster it waits again at the front. `_deliveries` counts the request.

        Args:
            order: The request.
            about_to_claim: Gets the id of each lease before it may be stored, so that it is not counted twice.
        """
        again = False
        while True:
            worker = await self._claim_in_turn(order, about_to_claim, again=again)
            if worker is not None and (order.job is None or await self._is_first(worker, order, order.job)):
                return worker
            earlier = await self._join_earlier(order)
            if earlier is not None:
                return earlier
            if worker is not None:  # each of several replicas may have given up its claim because of another
                await self._pause(_LONGEST_AFTER_TIE * self._jitter())
            again = True

    async def _is_first(self, claimed: Worker, order: Order, job: Request) -> bool:
        """Whether the claimed lease is the job's. If not, it is given up."""
        is_first = False
        try:
            with order.asking(StoreAsked.JOB):
                is_first = await self._jobs.is_first(claimed, job)
        finally:
            if not is_first:
                self._deliveries.give_up(claimed)
        return is_first

    async def _claim_in_turn(
        self, order: Order, about_to_claim: Callable[[str], None], *, again: bool
    ) -> Worker | None:
        """Waits for a turn and claims what it brings. `_deliveries` counts the request.

        Args:
            order: The request.
            about_to_claim: See `_lease_in_turn`.
            again: It has had its turn before, so it waits at the front.

        Returns:
            The worker; None if nothing was claimed: another was faster, or the job has a lease by now.
        """
        pool, caller, lease_id = order.pool, order.caller, str(uuid.uuid4())
        about_to_claim(lease_id)
        owner = _cache_owner(order, lease_id)
        waiter = Waiter(owner, order.request_key, caller.tenant, caller.digest, caller.admin)
        waiter.only_ready = order.request.only_ready
        self._mirror.rush.ends(id(order))  # its last claim was lost
        target = await self._queues.wait(pool.key, waiter, first=again)
        if target is None:
            raise self._none_free(order)
        if isinstance(target, Worker) and target.lease is not None:
            return None
        if order.job is None and isinstance(target, Worker) and target.phase is Phase.IDLE:
            self._mirror.rush.begins(id(order))
        ended = partial(self._queues.claim_ended, pool.key, waiter)
        asked = False
        try:
            there = await self._still_for(order, waiter, lease_id)
            asked = there
            there = there and await self._presence.of_target(target)
            lease = order.lease(lease_id, owner, self._replica, self._now())
        except BaseException as error:
            ended(failed=asked and isinstance(error, Exception))
            raise
        if not there:
            ended(failed=False)
            return None
        return await self._claim(order, target, lease, ended)

    async def _still_for(self, order: Order, waiter: Waiter, lease_id: str) -> bool:
        """Whether what a request was given is for it by today's rules too. They are asked only if it has waited.

        It is not if the cache has another owner today: then it was chosen for the wrong one.
        """
        if waiter.waited or asyncio.get_running_loop().time() - order.decided_at >= _TRUSTED:
            await order.decide_again(find_lending_pool(self._mirror, order.pool.key))
            held, now = self._mirror.index_of(order.pool.key).leases, self._now()
            if order.job is None or held.of_request(order.job.key, now) is None:  # else it gets the lease of its job
                self._limits.check_again(order.pool, order.caller, held, at=now)
        return waiter.owner == _cache_owner(order, lease_id)

    async def _claim(self, order: Order, target: Target, lease: Lease, ended: ClaimEnded) -> Worker | None:
        """Claims what the request was given; None if another was faster. `_deliveries` counts the request."""
        try:
            with order.asking(StoreAsked.CLAIM):
                return await self._claimer.claim(order.pool, target, lease, order.request_key, ended)
        except (Conflict, NotFound):
            return None

    async def _join_earlier(self, order: Order) -> Worker | None:
        """Counts this request for the lease that its job has already; None if it has none."""
        while order.job is not None:
            with order.asking(StoreAsked.JOB):
                earlier = await self._jobs.find(order.job)
                if earlier is None or await self._join(earlier):
                    return earlier
        return None

    async def _join(self, worker: Worker) -> bool:
        """Counts this request for a lease that exists. Returns False if the lease ends meanwhile."""
        if await self._abandoner.wait_if_ending(worker):
            return False
        self._deliveries.begin(worker, known=True)
        undelivered = worker.undelivered
        if undelivered is None or undelivered.replica == self._replica:
            return True
        try:  # the other replica must not end it, or was killed
            await self._leases.renew_undelivered(worker, self._replica, renewals=0)
        except (Gone, NotFound):
            self._deliveries.give_up(worker)
            return False
        except BaseException:
            self._deliveries.give_up(worker)
            raise
        return True

    # --- the answer -------------------------------------------------------------------------------------------------

    def _grant(self, worker: Worker, csr_pem: bytes | None) -> Grant:
        lease = worker.held_lease
        token = self._claimer.token(worker)
        leaf = self._rotation.lease_signer.issue_client(
            token, lease.allocated_at, lease.not_after, csr_pem, make_key=self._keys.take
        )
        trusted = self._rotation.trusted_by_callers(self._mirror.all_workers())
        return Grant(worker, token, lease.expires_at, trusted, leaf.cert_pem, leaf.key_pem)

    def _timed_out(self, order: Order, worker: Worker | None) -> NoCapacity | Unavailable:
        """The error for a request that waited too long: the pool is full, the worker not ready, or the store slow."""
        request, waited = order.request, asyncio.get_running_loop().time() - order.asked_at
        if order.asks is StoreAsked.CLAIM and waited >= _SLOW_STORE:
            return no_worker.store_is_slow(request.pool, request.wait)
        if order.asks is StoreAsked.JOB and waited >= _SLOW_STORE:
            return no_worker.job_is_unknown(request.pool, request.wait)
        if order.request_key and self._queues.is_claiming(request.pool, order.request_key):
            return no_worker.store_is_slow(request.pool, request.wait)
        if worker is not None:
            return no_worker.not_ready(self._mirror.workers.get(worker.key, worker), request.wait, self._now())
        return self._none_free(order)

    def _none_free(self, order: Order) -> NoCapacity:
        request = order.request
        return no_worker.none_free(self._mirror, order.caller, request.pool, request.wait, self._now())

    def _on_change(self, change: MirrorChange) -> None:
        self._queues.serve(change.pool)


def _cache_owner(order: Order, lease_id: str) -> str:
    spec, pool = order.pool.spec, order.pool
    return cache_owner_digest(
        spec.reuse, order.caller.tenant, pool.uid, lease_id, keep_history=spec.cache.keep_history
    )
