"""All leases as the gateway's loops need them: which token leads to which worker.

A table is built from pools and workers after each change. It is immutable, so threads can share it. Nothing here does
I/O or has a clock; the caller passes the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from bkpool.core.errors import BkpoolError, Gone, Unauthenticated, WorkerFailed
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolGateway
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import EndReason, Lease, Worker

_ALLOCATE_AGAIN = "Run `bkpool allocate` again."


@dataclass(frozen=True, slots=True)
class LeaseRoute:
    """One lease and the address of its worker. Times are seconds since the epoch, durations are seconds."""

    token_sha256: str
    lease_id: str
    worker: Key
    worker_uid: str
    pool: Key
    endpoint: str | None
    """The address to dial; None while the worker is not ready."""
    wait_reason: str
    """Why there is no endpoint."""
    expires_at: float
    not_after: float
    drain_timeout: float
    end_reason: EndReason | None = None
    end_message: str = ""
    ends_when_unused: bool = False
    """The gateway tells when the last connection has closed, because the lease then ends soon."""
    silent: bool = False
    """Whether the worker is noted as silent (`WorkerStatus.silent_since`)."""

    @property
    def revoked(self) -> bool:
        """Whether its connections must be cut, and not only new ones be refused."""
        return self.end_reason is EndReason.REVOKED

    def end_error(self, now: float) -> BkpoolError | None:
        """Returns the error for new connections after the lease's end; None while the lease is valid."""
        if self.end_reason is not None:
            return _end_error(self.end_reason, self.end_message)
        if now >= self.expires_at:
            expired_at = datetime.fromtimestamp(self.expires_at, UTC)
            return _end_error(EndReason.EXPIRED, f"it was valid until {expired_at:%H:%M:%S} UTC")
        return None


@dataclass(frozen=True, slots=True)
class PastLease:
    """A lease that has ended and no longer holds its worker, which may have another lease by now."""

    pool: Key
    end_reason: EndReason
    end_message: str

    @property
    def revoked(self) -> bool:
        """Whether a connection that is still open must be cut."""
        return self.end_reason is EndReason.REVOKED

    def end_error(self) -> BkpoolError:
        """Returns the error for new connections."""
        return _end_error(self.end_reason, self.end_message)


@dataclass(frozen=True, slots=True)
class UnreadableLease:
    """A lease on a worker that cannot be read. Nobody is connected by it, and whoever is connected stays so."""

    pool: Key
    worker: Unreadable

    def end_error(self) -> BkpoolError:
        """Returns the error for new connections."""
        return UnreadableObject(self.worker)


@dataclass(frozen=True, slots=True)
class LeaseTable:
    """All known leases by the SHA-256 of their token, and the existing pools."""

    routes: Mapping[str, LeaseRoute] = field(default_factory=lambda: MappingProxyType({}))
    past: Mapping[str, PastLease] = field(default_factory=lambda: MappingProxyType({}))
    pools: frozenset[Key] = frozenset()
    """The pools that exist, also those that cannot be read."""
    unreadable: Mapping[str, UnreadableLease] = field(default_factory=lambda: MappingProxyType({}))
    unreadable_workers: frozenset[Key] = frozenset()


def build_lease_table(
    pools: Iterable[Pool],
    workers: Iterable[Worker],
    unreadable_pools: Iterable[Key] = (),
    unreadable_workers: Iterable[Unreadable] = (),
) -> LeaseTable:
    """Returns the table for these pools and workers, and for those that cannot be read."""
    gateways = {pool.key: pool.spec.gateway for pool in pools}
    routes: dict[str, LeaseRoute] = {}
    past: dict[str, PastLease] = {}
    for worker in workers:
        for ended in worker.status.ended:
            past[ended.token_sha256] = PastLease(worker.pool, ended.reason, ended.message_with_log)
        if worker.lease is not None:
            gateway = gateways.get(worker.pool, PoolGateway())
            routes[worker.lease.token_sha256] = _route(worker, worker.lease, gateway)
    unreadable = tuple(unreadable_workers)
    return LeaseTable(
        MappingProxyType(routes),
        MappingProxyType(past),
        frozenset({*gateways, *unreadable_pools}),
        MappingProxyType(
            {
                digest: UnreadableLease(found.pool, found)
                for found in unreadable
                if found.pool and (digest := found.of_lease("tokenSHA256"))
            }
        ),
        frozenset(found.key for found in unreadable),
    )


def unknown_lease() -> BkpoolError:
    """Returns the error for a token that no lease has."""
    return Unauthenticated(
        "no lease has the token of this client certificate", hint=_ALLOCATE_AGAIN, code="UnknownLease"
    )


def _route(worker: Worker, lease: Lease, gateway: PoolGateway) -> LeaseRoute:
    endpoint = worker.routable_endpoint
    return LeaseRoute(
        token_sha256=lease.token_sha256,
        lease_id=lease.id,
        worker=worker.key,
        worker_uid=worker.uid,
        pool=worker.pool,
        endpoint=endpoint,
        wait_reason="" if endpoint else worker.status.message_with_log or "its BuildKit daemon is being started",
        expires_at=lease.expires_at.timestamp(),
        not_after=lease.not_after.timestamp(),
        drain_timeout=gateway.drain_timeout.total_seconds(),
        end_reason=None if lease.ended_at is None else lease.end_reason or EndReason.RELEASED,
        end_message=worker.lease_end_message,
        ends_when_unused=lease.ends_when_unused,
        silent=worker.status.silent_since is not None,
    )


def _end_error(reason: EndReason, message: str) -> BkpoolError:
    detail = f": {message}" if message else ""
    if reason is EndReason.LOST:
        return WorkerFailed(
            f"the lease ended because its worker failed{detail}", hint=_ALLOCATE_AGAIN, code="LeaseLost"
        )
    if reason is EndReason.REVOKED:  # the message says by whom
        return Gone(f"the lease was revoked {message}".rstrip(), hint=_ALLOCATE_AGAIN, code="LeaseRevoked")
    verb = {EndReason.EXPIRED: "has expired", EndReason.RELEASED: "was released"}.get(reason, "was abandoned")
    return Gone(f"the lease {verb}{detail}", hint=_ALLOCATE_AGAIN, code=f"Lease{reason.value.capitalize()}")
