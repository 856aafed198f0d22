"""BuildKitWorker, in the shape of the custom resource: one buildkitd in one slot, and the lease on it.

A lease is the `allocation` in a worker's spec: it is made, changed and ended by compare-and-swap only.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AwareDatetime, Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.errors import InvalidInput
from bkpool.core.names import (
    FINALIZER,
    LABEL_MANAGED,
    LABEL_POOL,
    LABEL_PURPOSE,
    LABEL_WORKER,
    MANAGER,
    PURPOSE_WORKER,
    Key,
    Slot,
    slot_of,
)
from bkpool.core.pool import Pool
from bkpool.core.resource import Condition, Metadata, Model, OwnerReference, Resource


class EndReason(StrEnum):
    """Why a lease is over."""

    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    ABANDONED = "abandoned"


class Lease(Model):
    """A lease: one worker, one holder. It is made, changed and ended by compare-and-swap only."""

    id: StrictStr
    job_id: StrictStr = ""
    token_sha256: Annotated[StrictStr, Field(alias="tokenSHA256")]
    requested_by: StrictStr
    holder: StrictStr = ""
    """Digest of who made it (Identity.digest), who may end and renew it without its token."""
    owner: StrictStr
    """Digest of whom the cache belongs to while and after this lease (policy.owner_of)."""
    allocated_at: AwareDatetime
    expires_at: AwareDatetime
    not_after: AwareDatetime
    """allocatedAt + maxTokenTTL: the client certificate's end, beyond which nothing renews."""
    ended_at: AwareDatetime | None = None
    end_reason: EndReason | None = None
    end_message: StrictStr = ""
    metadata: dict[str, str] = Field(default_factory=dict)

    def ended(self, now: datetime) -> EndReason | None:
        """Why this lease is over at this time, or None while it lives."""
        if self.ended_at is not None:
            return self.end_reason or EndReason.RELEASED
        return EndReason.EXPIRED if now >= self.expires_at else None

    def over_since(self) -> datetime:
        """When the lease ended, or will."""
        return self.ended_at or self.expires_at


class EndedLease(Model):
    """A lease that is over, remembered so that a late caller is told why."""

    token_sha256: Annotated[StrictStr, Field(alias="tokenSHA256")]
    ended_at: AwareDatetime
    reason: EndReason
    message: StrictStr = ""


class GatewayRegistration(Model):
    """A gateway replica that may hold connections of an allocation (DESIGN rule 10)."""

    gateway: StrictStr
    allocation_id: StrictStr
    renewed_at: AwareDatetime
    connections: StrictInt = 0
    """Open at that moment."""


class Phase(StrEnum):
    """Where a worker is in its life; the Go controller's names, and Draining."""

    PENDING = "Pending"
    PROVISIONING = "Provisioning"
    IDLE = "Idle"
    ALLOCATED = "Allocated"
    DRAINING = "Draining"
    FAILED = "Failed"
    TERMINATING = "Terminating"


class PoolRef(Model):
    """The pool of a worker."""

    name: StrictStr
    namespace: StrictStr | None = None


class WorkerSpec(Model):
    """Whose worker it is and who holds it."""

    pool_ref: PoolRef
    allocation: Lease | None = None


class WorkerStatus(Model):
    """What is known of the worker."""

    phase: Phase = Phase.PENDING
    endpoint: StrictStr | None = None
    """Where the gateway reaches buildkitd (`unix:///…` or `tcp://…`); None while it does not answer."""
    cache_owner: StrictStr | None = None
    """Digest of whom the cache in use belongs to; None while nobody has used it."""
    ephemeral_cache: StrictBool = False
    """The cache ends with the worker: it needs no mark of its owner before its first use."""
    pod_name: StrictStr | None = None
    pod_ip: Annotated[StrictStr | None, Field(alias="podIP")] = None
    created_at: AwareDatetime | None = None
    ready_at: AwareDatetime | None = None
    last_activity_at: AwareDatetime | None = None
    allocation_count: StrictInt = 0
    failures: StrictInt = 0
    """Failures in a row; a worker that stayed up for policy.STABLE begins at 0 again."""
    failed_at: AwareDatetime | None = None
    message: StrictStr = ""
    gateways: tuple[GatewayRegistration, ...] = ()
    ended: tuple[EndedLease, ...] = ()
    conditions: tuple[Condition, ...] = ()


class Worker(Resource):
    """One buildkitd in one slot. The object outlives its process or pod (DESIGN rule 4)."""

    KIND: ClassVar[str] = "BuildKitWorker"
    PLURAL: ClassVar[str] = "buildkitworkers"

    kind: Literal["BuildKitWorker"] = "BuildKitWorker"
    spec: WorkerSpec
    status: WorkerStatus = WorkerStatus()

    @model_validator(mode="after")
    def _in_a_slot(self) -> Self:
        try:
            slot_of(self.key)
        except InvalidInput as error:
            raise ValueError(error.message) from None
        return self

    @property
    def slot(self) -> Slot:
        """The slot this worker stands in."""
        return slot_of(self.key)

    @property
    def pool(self) -> Key:
        """The pool this worker belongs to."""
        return Key(self.metadata.namespace, self.spec.pool_ref.name)

    @property
    def lease(self) -> Lease | None:
        """The lease on it, if any."""
        return self.spec.allocation

    @property
    def routable_endpoint(self) -> str | None:
        """Where the holder of its lease may be led now; None while there is no lease, or its worker is not ready.

        A worker that stood idle is ready the moment it is claimed, if its cache is the holder's already, or needs no
        mark of its owner (DESIGN rule 3); any other is once the controller has seen to its cache.
        """
        lease, status = self.spec.allocation, self.status
        if lease is None or status.phase not in {Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING}:
            return None
        unmarked = status.cache_owner is None and status.ephemeral_cache
        return status.endpoint if status.cache_owner == lease.owner or unmarked else None

    @property
    def held_lease(self) -> Lease:
        """The lease on it, for whoever knows that there is one. Raises RuntimeError where there is none."""
        if self.spec.allocation is None:
            raise RuntimeError(f"{self.key} is not leased")
        return self.spec.allocation

    def with_lease(self, lease: Lease | None) -> Worker:
        """This worker, held by that lease (or by nobody). While it is held, a finalizer keeps its object."""
        others = tuple(name for name in self.metadata.finalizers if name != FINALIZER)
        finalizers = others if lease is None else (*others, FINALIZER)
        return self.but(metadata=self.metadata.but(finalizers=finalizers), spec=self.spec.but(allocation=lease))

    def with_status(self, **changes: Any) -> Worker:
        """This worker with these fields of its status changed."""
        return self.but(status=self.status.but(**changes))


def new_worker(slot: Slot, pool: Pool, lease: Lease | None, labels: Mapping[str, str]) -> Worker:
    """The worker object for a slot, owned by its pool."""
    name = slot.worker.name
    own = {LABEL_MANAGED: MANAGER, LABEL_POOL: slot.pool, LABEL_PURPOSE: PURPOSE_WORKER, LABEL_WORKER: name}
    return Worker(
        metadata=Metadata(
            name=name,
            namespace=slot.namespace,
            labels={**own, **labels},
            owner_references=(OwnerReference(kind=Pool.KIND, name=pool.key.name, uid=pool.uid, controller=True),),
        ),
        spec=WorkerSpec(pool_ref=PoolRef(name=slot.pool)),
    ).with_lease(lease)
