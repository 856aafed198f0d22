"""All leases as the gateway's loops need them: which token leads to which worker.

What the table has of one worker is an immutable value, so threads can share it. Each loop keeps its own table and
applies changes to it. Nothing here does I/O or has a clock; the caller passes the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TypeVar

from bkpool.core.errors import BkpoolError, Gone, Unauthenticated, WorkerFailed
from bkpool.core.names import Key
from bkpool.core.pool import PoolGateway
from bkpool.core.shown_worker import wait_message
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.core.worker import EndReason, Lease, Worker

_ALLOCATE_AGAIN = "Run `bkpool allocate` again."
_Found = TypeVar("_Found")


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

    token_sha256: str
    pool: Key
    worker: Unreadable

    def end_error(self) -> BkpoolError:
        """Returns the error for new connections."""
        return UnreadableObject(self.worker)


@dataclass(frozen=True, slots=True)
class WorkerLeases:
    """What the table has of one worker. Without arguments: there is no such worker, or it has and had no lease."""

    route: LeaseRoute | None = None
    past: Mapping[str, PastLease] = field(default_factory=lambda: MappingProxyType({}))
    """The leases that it had, by the SHA-256 of their token."""
    unreadable: UnreadableLease | None = None
    """Its lease if it cannot be read; None if not even the lease's token can be read."""
    can_be_read: bool = True

    @property
    def digests(self) -> frozenset[str]:
        """The SHA-256 of the token of each of these leases."""
        present = (lease.token_sha256 for lease in (self.route, self.unreadable) if lease is not None)
        return frozenset({*self.past, *present})


@dataclass(frozen=True, slots=True)
class TableChange:
    """What a table takes over: the workers that have changed, and the pools."""

    workers: Mapping[Key, WorkerLeases]
    """An empty WorkerLeases for a worker that is gone."""
    pools: frozenset[Key]
    """All pools that exist, also those that cannot be read."""


class LeaseTable:
    """All known leases by the SHA-256 of their token, and the existing pools. It belongs to one loop."""

    def __init__(self) -> None:
        self.pools: frozenset[Key] = frozenset()
        """The pools that exist, also those that cannot be read."""
        self._workers: dict[Key, WorkerLeases] = {}
        self._holders: dict[str, tuple[Key, ...]] = {}  # by digest, in order; almost always one worker
        self._last_read: dict[Key, frozenset[str]] = {}  # of unreadable workers: the digests since they could be read

    def apply(self, change: TableChange) -> frozenset[str]:
        """Takes over a change.

        Returns:
            The digests of the leases that it concerns. A worker that cannot be read keeps concerning the leases that
            it had when it could be read.
        """
        self.pools = change.pools
        return frozenset().union(*(self._replace(worker, leases) for worker, leases in change.workers.items()))

    def route(self, token_sha256: str) -> LeaseRoute | None:
        """Returns the lease with this token, if a worker has it."""

        def of(leases: WorkerLeases) -> LeaseRoute | None:
            return leases.route if leases.route and leases.route.token_sha256 == token_sha256 else None

        return self._first(token_sha256, of)

    def past(self, token_sha256: str) -> PastLease | None:
        """Returns the past lease with this token, if a worker remembers it."""
        return self._first(token_sha256, lambda leases: leases.past.get(token_sha256))

    def unreadable(self, token_sha256: str) -> UnreadableLease | None:
        """Returns the lease with this token, if it is on a worker that cannot be read."""
        return self._first(token_sha256, lambda leases: leases.unreadable)

    def can_be_read(self, worker: Key) -> bool:
        """Whether this worker can be read, or does not exist."""
        return worker not in self._last_read

    def has(self, worker: Key) -> bool:
        """Whether it has anything of this worker: a present or past lease."""
        return worker in self._workers

    def _first(self, token_sha256: str, of: Callable[[WorkerLeases], _Found | None]) -> _Found | None:
        for worker in self._holders.get(token_sha256, ()):
            found = of(self._workers[worker])
            if found is not None:
                return found
        return None

    def _replace(self, worker: Key, leases: WorkerLeases) -> frozenset[str]:
        before, after = self._workers.pop(worker, WorkerLeases()).digests, leases.digests
        concerned = before | after | self._last_read.pop(worker, frozenset())
        if not leases.can_be_read:
            self._last_read[worker] = concerned
        for digest in before - after:
            self._set_holders(digest, {*self._holders[digest]} - {worker})
        if after:
            self._workers[worker] = leases
        for digest in after - before:
            self._set_holders(digest, {*self._holders.get(digest, ()), worker})
        return concerned

    def _set_holders(self, digest: str, workers: set[Key]) -> None:
        if workers:
            self._holders[digest] = tuple(sorted(workers))
        else:
            del self._holders[digest]


def leases_of(worker: Worker, gateway: PoolGateway) -> WorkerLeases:
    """Returns what the table has of a worker.

    Args:
        worker: The worker.
        gateway: `spec.gateway` of its pool, or the default if the pool does not exist or cannot be read.
    """
    pool = worker.pool
    past = {one.token_sha256: PastLease(pool, one.reason, one.message_with_log) for one in worker.ended_leases}
    route = _route(worker, worker.lease, gateway) if worker.lease is not None else None
    return WorkerLeases(route, MappingProxyType(past))


def unreadable_leases(found: Unreadable) -> WorkerLeases:
    """Returns what the table has of a worker that cannot be read."""
    pool, digest = found.pool, found.of_lease("tokenSHA256")
    lease = UnreadableLease(digest, pool, found) if pool and digest else None
    return WorkerLeases(unreadable=lease, can_be_read=False)


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
        wait_reason="" if endpoint else wait_message(worker) or "its BuildKit daemon is being started",
        expires_at=lease.expires_at.timestamp(),
        not_after=lease.not_after.timestamp(),
        drain_timeout=gateway.drain_timeout.total_seconds(),
        end_reason=None if lease.ended_at is None else lease.end_reason or EndReason.RELEASED,
        end_message="" if lease.ended_at is None else worker.lease_end_message,
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
