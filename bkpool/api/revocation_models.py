"""The request and response bodies of `POST /api/v1/workers/revoke`.

They say how leases may be named, and never which of them a caller may end.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, StrictStr
from pydantic.alias_generators import to_camel

from bkpool.allocation import LeaseSelector, Revocation
from bkpool.allocation.revocation import unread_leases
from bkpool.api.models import Body, Namespace, ObjectName
from bkpool.core.errors import InvalidInput
from bkpool.core.names import DEFAULT_NAMESPACE, Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker

Selected = Annotated[StrictStr, Field(min_length=1, max_length=256)]

_SELECTORS = ("lease_id", "worker_name", "identity", "tenant", "pool_name")


class RevokeBody(Body):
    """The leases to end at once: one by its id or its worker, or all of a caller, a tenant or a pool."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [to_camel(field)]} for field in _SELECTORS]})

    lease_id: Selected = ""
    worker_name: ObjectName = ""
    identity: Selected = ""
    tenant: Selected = ""
    pool_name: ObjectName = ""
    namespace: Namespace | None = None
    """Of the worker or the pool: `default` if it is not given. For the others: all namespaces if it is not given."""

    def selector(self) -> LeaseSelector:
        """The selection in the form that the lease service takes.

        Raises:
            InvalidInput: Not exactly one of the five is given.
        """
        given = [field for field in _SELECTORS if getattr(self, field)]
        if len(given) != 1:
            raise InvalidInput(
                "the request must name the leases in exactly one way",
                hint="Give one of leaseId, workerName, identity, tenant and poolName.",
                field=to_camel(given[1] if given else _SELECTORS[0]),
            )
        namespace = self.namespace or DEFAULT_NAMESPACE
        return LeaseSelector(
            lease_id=self.lease_id,
            worker=Key(namespace, self.worker_name) if self.worker_name else None,
            identity=self.identity,
            tenant=self.tenant,
            pool=Key(namespace, self.pool_name) if self.pool_name else None,
            namespace=self.namespace,
        )


class RevokedView(Body):
    """A lease that is revoked now."""

    lease_id: str
    worker_name: str
    namespace: str
    pool_name: str
    job_id: str | None = None
    requested_by: str
    tenant: str | None = None

    @classmethod
    def of(cls, worker: Worker, **more: str) -> Self:
        """The view of the lease on this worker."""
        lease = worker.held_lease
        return cls(
            lease_id=lease.id,
            worker_name=worker.key.name,
            namespace=worker.key.namespace,
            pool_name=worker.pool.name,
            job_id=lease.job_id or None,
            requested_by=lease.requested_by,
            tenant=lease.tenant or None,
            **more,
        )


class NotRevokedView(RevokedView):
    """A lease that could not be revoked, and why. The request may be sent again."""

    reason: str

    @classmethod
    def of_unreadable(cls, found: Unreadable) -> Self:
        """The view of a lease on a worker that cannot be read, with what can be told of it."""
        namespace, name = found.key
        return cls(
            lease_id=found.of_lease("id"),
            worker_name=name,
            namespace=namespace,
            pool_name=found.pool.name if found.pool else "",
            job_id=found.of_lease("jobId") or None,
            requested_by=found.of_lease("requestedBy"),
            tenant=found.of_lease("tenant") or None,
            reason=found.message,
        )

    @classmethod
    def of_refused(cls, namespace: str) -> Self:
        """The view of all leases in a namespace that bkpool may not read. No lease has an empty id."""
        return cls(
            lease_id="",
            worker_name="",
            namespace=namespace,
            pool_name="",
            requested_by="",
            reason=unread_leases(namespace),
        )


class RevokeAnswer(Body):
    """The leases that were selected. The list is empty if a caller, tenant or pool has none."""

    revoked: tuple[RevokedView, ...]
    failed: tuple[NotRevokedView, ...] = ()

    @classmethod
    def of(cls, done: Revocation) -> RevokeAnswer:
        """The response for what was done."""
        failed = [NotRevokedView.of(worker, reason=error.message) for worker, error in done.failed]
        failed += [NotRevokedView.of_unreadable(found) for found in done.unreadable]
        failed += [NotRevokedView.of_refused(namespace) for namespace in done.refused]
        return cls(revoked=tuple(map(RevokedView.of, done.revoked)), failed=tuple(failed))
