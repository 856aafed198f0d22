"""Which token leads where: the leases as the gateway's loop needs them, built once a change from pools and workers.

Immutable, so that it can be handed from thread to thread; no I/O and no clock: whoever asks brings the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from bkpool.core.errors import BkpoolError, Gone, Unauthenticated, WorkerFailed
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolGateway
from bkpool.core.worker import EndReason, Lease, Worker

_AGAIN = "Run `bkpool allocate` again."


@dataclass(frozen=True, slots=True)
class LeaseRoute:
    """One lease and the way to its worker. Times are seconds since the epoch, durations seconds."""

    token_sha256: str
    allocation_id: str
    worker: Key
    worker_uid: str
    pool: Key
    endpoint: str | None
    """Where to dial; None while the worker is on its way."""
    waiting: str
    """Why there is no endpoint."""
    expires_at: float
    not_after: float
    drain_timeout: float
    ended: EndReason | None = None
    ended_message: str = ""

    def over(self, now: float) -> BkpoolError | None:
        """Why new connections of this lease are refused at this time; None while it lives."""
        if self.ended is not None:
            return _over(self.ended, self.ended_message)
        if now >= self.expires_at:
            return _over(
                EndReason.EXPIRED, f"it ran until {datetime.fromtimestamp(self.expires_at, UTC):%H:%M:%S} UTC"
            )
        return None


@dataclass(frozen=True, slots=True)
class PastLease:
    """A lease that is over and whose worker may be another's by now."""

    pool: Key
    reason: EndReason
    message: str

    def over(self) -> BkpoolError:
        """Why connections of this lease are refused."""
        return _over(self.reason, self.message)


@dataclass(frozen=True, slots=True)
class LeaseTable:
    """All leases that a gateway may be asked for, by the SHA-256 of their token, and the pools that there are."""

    routes: Mapping[str, LeaseRoute] = field(default_factory=lambda: MappingProxyType({}))
    past: Mapping[str, PastLease] = field(default_factory=lambda: MappingProxyType({}))
    pools: frozenset[Key] = frozenset()


def build(pools: Iterable[Pool], workers: Iterable[Worker]) -> LeaseTable:
    """The table for these pools and workers."""
    gateways = {pool.key: pool.spec.gateway for pool in pools}
    routes: dict[str, LeaseRoute] = {}
    past: dict[str, PastLease] = {}
    for worker in workers:
        for ended in worker.status.ended:
            past[ended.token_sha256] = PastLease(worker.pool, ended.reason, ended.message)
        if worker.lease is not None:
            gateway = gateways.get(worker.pool, PoolGateway())
            routes[worker.lease.token_sha256] = _route(worker, worker.lease, gateway)
    return LeaseTable(MappingProxyType(routes), MappingProxyType(past), frozenset(gateways))


def unknown_lease() -> BkpoolError:
    """Why a token that nobody knows is refused."""
    return Unauthenticated("no lease has the token of this client certificate", hint=_AGAIN, code="UnknownLease")


def _route(worker: Worker, lease: Lease, gateway: PoolGateway) -> LeaseRoute:
    endpoint = worker.routable_endpoint
    return LeaseRoute(
        token_sha256=lease.token_sha256,
        allocation_id=lease.id,
        worker=worker.key,
        worker_uid=worker.uid,
        pool=worker.pool,
        endpoint=endpoint,
        waiting="" if endpoint else worker.status.message or "its BuildKit daemon is being started",
        expires_at=lease.expires_at.timestamp(),
        not_after=lease.not_after.timestamp(),
        drain_timeout=gateway.drain_timeout.total_seconds(),
        ended=None if lease.ended_at is None else lease.end_reason or EndReason.RELEASED,
        ended_message=lease.end_message,
    )


def _over(reason: EndReason, message: str) -> BkpoolError:
    told = f": {message}" if message else ""
    if reason is EndReason.LOST:
        return WorkerFailed(f"the lease was lost with its worker{told}", hint=_AGAIN, code="LeaseLost")
    verb = {EndReason.EXPIRED: "has expired", EndReason.RELEASED: "was released"}.get(reason, "was given up")
    return Gone(f"the lease {verb}{told}", hint=_AGAIN, code=f"Lease{reason.value.capitalize()}")
