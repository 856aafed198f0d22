"""Claims a worker for a lease by compare-and-swap.

A claim that has begun is finished even if its caller goes away. It counts as a request for its lease from before the
write on, so the lease ends afterwards only if nobody else has asked for it. It never chooses a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import structlog

from bkpool.allocation.deliveries import Deliveries
from bkpool.allocation.leases import LeaseService, lease_facts
from bkpool.core import tokens
from bkpool.core.errors import Conflict, Gone, NotFound
from bkpool.core.names import LABEL_REQUEST, Slot
from bkpool.core.pool import Pool
from bkpool.core.queueing import Target
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Lease, Worker, new_worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror

log = structlog.get_logger(__name__)


class ClaimEnded(Protocol):
    """Called when a claim is over, also if its caller has gone."""

    def __call__(self, *, failed: bool) -> None:
        """Gets whether the store could not say whether the claim succeeded."""


class Claimer:
    """Writes leases to workers.

    Args:
        store: Where the workers are.
        mirror: Gets what was written.
        leases: Changes a lease once it is stored.
        deliveries: Counts the requests for each lease.
        token_key: Key of the HMAC of lease tokens.
    """

    def __init__(
        self, *, store: Store, mirror: Mirror, leases: LeaseService, deliveries: Deliveries, token_key: bytes
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._leases = leases
        self._deliveries = deliveries
        self._token_key = token_key
        self._left: set[asyncio.Future[Worker]] = set()
        """Claims whose caller has gone."""

    async def close(self) -> None:
        """Waits until the claims whose callers have gone are over."""
        while self._left:
            await asyncio.gather(*self._left, return_exceptions=True)
            # Their callbacks remove them, and since Python 3.12 gather does not pause if all are done already.
            await asyncio.sleep(0)

    def token(self, worker: Worker) -> str:
        """The token of the worker's lease."""
        return tokens.derive(self._token_key, worker.uid, worker.held_lease.id)

    async def claim(
        self, pool: Pool, target: Target, lease: Lease, request_key: str | None, ended: ClaimEnded
    ) -> Worker:
        """Puts the lease on the worker, or creates a worker with it in the slot. `Deliveries` counts the request.

        Args:
            pool: The worker's pool.
            target: The worker or slot that the request was given.
            lease: The new lease, without its token's digest.
            request_key: Digest of the caller and their jobId, if they gave one.
            ended: Called once the store has answered.

        Raises:
            Conflict: Somebody else was faster.
            NotFound: The worker was deleted.
        """
        labels = {LABEL_REQUEST: request_key} if request_key else {}
        self._deliveries.claiming(lease.id)
        writing = asyncio.ensure_future(self._carry_out(pool, target, lease, labels, ended))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            self._left.add(writing)
            writing.add_done_callback(self._give_up)
            raise

    async def completed(self, worker: Worker) -> Worker | None:
        """The worker with the digest of its lease's token in the store; None if the lease has gone meanwhile.

        It is missing if the process that created the worker was killed, or is about to write it. Both would write the
        same digest, so it may be written here as well.
        """
        if worker.held_lease.token_sha256:
            return worker
        try:
            return await self._leases.change(worker, lambda lease: self._with_digest(worker, lease))
        except (Gone, NotFound):
            return None

    async def refresh(self, target: Target) -> None:
        """Reads a worker from the store after a lost claim, so that the same choice is not made again."""
        key = target.worker if isinstance(target, Slot) else target.key
        try:
            self._mirror.apply(await self._store.get(Worker, *key))
        except NotFound:
            return
        except UnreadableObject as error:  # its slot is out of use from now on
            self._mirror.apply(error.found)

    async def _carry_out(
        self, pool: Pool, target: Target, lease: Lease, labels: Mapping[str, str], ended: ClaimEnded
    ) -> Worker:
        """Writes the claim. Until the store has answered, nobody else of this replica is given the target."""
        failed = True
        try:
            worker = await self._write(pool, target, lease, labels)
            failed = False
        except (Conflict, NotFound):
            await self.refresh(target)
            failed = False
            raise
        finally:
            ended(failed=failed)
        return worker

    async def _write(self, pool: Pool, target: Target, lease: Lease, labels: Mapping[str, str]) -> Worker:
        """The creation of a worker is a claim, too. Its token needs the uid, so it takes a second write."""
        try:
            if isinstance(target, Slot):
                worker = await self._store.create(new_worker(target, pool, lease, labels))
            else:
                others = {name: value for name, value in target.metadata.labels.items() if name != LABEL_REQUEST}
                metadata = target.metadata.but(labels={**others, **labels})
                claimed = target.but(metadata=metadata).with_lease(self._with_digest(target, lease))
                worker = await self._store.replace(claimed)
        except BaseException:
            self._deliveries.not_claimed(lease.id)
            raise
        self._deliveries.claimed(worker)
        try:
            if isinstance(target, Slot):
                worker = await self._leases.change(worker, partial(self._with_digest, worker))
            self._mirror.apply(worker)
            log.info("lease.claimed", **lease_facts(worker))
        except BaseException:
            self._deliveries.give_up(worker)
            raise
        return worker

    def _with_digest(self, worker: Worker, lease: Lease) -> Lease:
        token = tokens.derive(self._token_key, worker.uid, lease.id)
        return lease.but(token_sha256=tokens.digest(token))

    def _give_up(self, writing: asyncio.Future[Worker]) -> None:
        self._left.discard(writing)
        if not writing.cancelled() and writing.exception() is None:
            self._deliveries.give_up(writing.result())
