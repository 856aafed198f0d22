"""What a caller asks for, and what they get: the values that an allocate request passes through.

They are plain values. Nothing here claims a worker or waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, auto

from bkpool.allocation.deliveries import Receipt
from bkpool.allocation.leases import lease_duration
from bkpool.core.claim_order import Request
from bkpool.core.errors import NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.worker import Lease, Undelivered, Worker
from bkpool.identity import Identity
from bkpool.identity.remembering import remembered


@dataclass(frozen=True, slots=True)
class AllocationRequest:
    """What a caller asks for."""

    pool: Key
    wait: timedelta
    """How long to wait for a worker. Zero: only a worker that is ready now will do."""
    ttl: timedelta | None = None
    """None: the pool's tokenTTL."""
    job_id: str = ""
    csr_pem: bytes | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def only_ready(self) -> bool:
        """Whether the request does not wait: it gets a worker that is ready now, or none."""
        return self.wait <= timedelta(0)


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease as its holder gets it. The token and the key are in this object and in the answer, and nowhere else."""

    worker: Worker
    token: str
    expires_at: datetime
    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes | None
    """None if the caller sent a CSR."""


class Offer:
    """A lease whose caller gets it now.

    Args:
        grant: What the caller gets.
    """

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.receipt: Receipt | None = None

    def answered(self, receipt: Receipt) -> None:
        """Notes that the whole answer was written."""
        self.receipt = receipt


MayStill = Callable[[Pool], Awaitable[None]]
"""Raises an error if the caller of a request may not use the pool, as it is now, any more."""


async def may_always(_pool: Pool) -> None:
    """For a caller whose right nobody takes away."""


class StoreAsked(Enum):
    """What a request waits for the store for."""

    CLAIM = auto()
    """Its claim is being written."""
    JOB = auto()
    """Which lease its job has."""


@dataclass(slots=True)
class Order:
    """A request that has been checked."""

    caller: Identity
    pool: Pool
    ttl: timedelta
    request: AllocationRequest
    job: Request | None
    """The pool and the digest of the caller and their jobId; None without a jobId."""
    asks: StoreAsked | None = None
    """What it waits for the store for; None where it waits for something else."""
    asked_at: float = 0.0
    """The loop's time at which that began."""
    may_still: MayStill = may_always
    decided_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    """The loop's time at which the caller's right was asked last."""

    async def decide_again(self, pool: Pool) -> None:
        """Asks whether the caller may still have a lease, and takes over the pool as it is now.

        Raises:
            NotFound: It is another pool of the same name.
            InvalidInput: The ttl is above the pool's maximum now.
            BkpoolError: The caller may not use it any more (`may_still`).
        """
        if pool.uid != self.pool.uid:
            raise NotFound(f"pool {pool.key} was deleted and made again while the request waited", hint="Ask again.")
        await self.may_still(pool)
        self.ttl, self.pool = lease_duration(pool, self.request.ttl), pool
        self.decided_at = asyncio.get_running_loop().time()

    @contextmanager
    def asking(self, what: StoreAsked) -> Iterator[None]:
        """Notes that it waits for the store. If it is cut off meanwhile, the note stays: it is the reason."""
        self.asks, self.asked_at = what, asyncio.get_running_loop().time()
        try:
            yield
        except Exception:
            self.asks = None
            raise
        self.asks = None

    @property
    def request_key(self) -> str | None:
        """Digest of the caller and their jobId; None without a jobId."""
        return self.job.key if self.job else None

    def lease(self, lease_id: str, owner: str, replica: str, now: datetime) -> Lease:
        """The lease that this request asks for, without its token's digest."""
        return Lease(
            id=lease_id,
            job_id=self.request.job_id,
            token_sha256="",
            requested_by=self.caller.name,
            holder=self.caller.digest,
            owner=owner,
            tenant=self.caller.tenant_name or self.caller.name,
            caller=remembered(self.caller),
            allocated_at=now,
            undelivered=Undelivered(replica=replica),
            expires_at=now + self.ttl,
            not_after=now + self.pool.spec.gateway.max_token_ttl,
            metadata=dict(self.request.metadata),
        )
