"""The objects: BuildKitPool and BuildKitWorker, in the shape of the custom resources.

A lease is the `allocation` in a worker's spec. Fields of a spec that nobody reads are kept, and named in the pool's
`IgnoredFields` condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AwareDatetime, Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.errors import InvalidInput
from bkpool.core.names import LABEL_POOL, Key, Slot, slot_of
from bkpool.core.resource import Condition, Duration, Metadata, Model, OwnerReference, Resource

# --- BuildKitPool ---------------------------------------------------------------------------------------------------


class Scaling(Model):
    """How many workers there are."""

    min: Annotated[StrictInt, Field(ge=0, le=10_000)] = 0
    """Idle workers kept ready beside the leased ones (the Go controller's meaning), never beyond `max` in all."""
    max: Annotated[StrictInt, Field(ge=1, le=10_000)] = 10
    scale_down_delay: Duration = timedelta(minutes=15)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is greater than max ({self.max})")
        return self


class CacheGC(Model):
    """What buildkitd's own garbage collection keeps; sizes with a unit ("10GB") or a percentage of the disk."""

    enabled: StrictBool = True
    keep_storage: Annotated[StrictStr, Field(pattern=r"^\d+(\.\d+)?\s?([kKMGTP]i?B?|B|%)$")] | None = None
    keep_duration: Duration | None = None
    reserved_space: Annotated[StrictStr, Field(pattern=r"^\d+(\.\d+)?\s?([kKMGTP]i?B?|B|%)$")] | None = None
    min_free_space: Annotated[StrictStr, Field(pattern=r"^\d+(\.\d+)?\s?([kKMGTP]i?B?|B|%)$")] | None = None


class Reuse(StrEnum):
    """Who may get a worker's cache after a lease."""

    IDENTITY = "identity"
    POOL = "pool"
    NEVER = "never"


class Cache(Model):
    """Caches of the workers."""

    reuse: Reuse = Reuse.IDENTITY
    gc: CacheGC = CacheGC()


class PoolGateway(Model):
    """Leases and the way in."""

    token_ttl: Annotated[Duration, Field(alias="tokenTTL", gt=timedelta(0))] = timedelta(hours=1)
    max_token_ttl: Annotated[Duration, Field(alias="maxTokenTTL", gt=timedelta(0))] = timedelta(hours=24)
    drain_timeout: Duration = timedelta(hours=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.token_ttl > self.max_token_ttl:
            raise ValueError("tokenTTL is greater than maxTokenTTL")
        return self


class PoolSpec(Model):
    """What the user wants. Fields of the contract that no room reads yet are kept and reported as ignored."""

    scaling: Scaling = Scaling()
    buildkit_config: StrictStr | None = None
    """A whole buildkitd.toml; only root, address and the runtime's own paths are set over it."""
    cache: Cache = Cache()
    gateway: PoolGateway = PoolGateway()


class PoolStatus(Model):
    """What is."""

    phase: StrictStr | None = None
    observed_generation: StrictInt | None = None
    workers: StrictInt = 0
    ready: StrictInt = 0
    idle: StrictInt = 0
    allocated: StrictInt = 0
    endpoint: StrictStr | None = None
    conditions: tuple[Condition, ...] = ()


class Pool(Resource):
    """A pool of workers."""

    KIND: ClassVar[str] = "BuildKitPool"
    PLURAL: ClassVar[str] = "buildkitpools"

    kind: Literal["BuildKitPool"] = "BuildKitPool"
    spec: PoolSpec = PoolSpec()
    status: PoolStatus = PoolStatus()


# --- BuildKitWorker -------------------------------------------------------------------------------------------------


class EndReason(StrEnum):
    """Why a lease is over."""

    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    ABANDONED = "abandoned"


class Allocation(Model):
    """A lease: one worker, one holder. It is made, changed and ended by compare-and-swap only."""

    id: StrictStr
    job_id: StrictStr = ""
    token_sha256: Annotated[StrictStr, Field(alias="tokenSHA256")]
    requested_by: StrictStr
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
    allocation: Allocation | None = None


class WorkerStatus(Model):
    """What is known of the worker."""

    phase: Phase = Phase.PENDING
    endpoint: StrictStr | None = None
    """Where the gateway reaches buildkitd (`unix:///…` or `tcp://…`); None while it does not answer."""
    cache_owner: StrictStr | None = None
    """Digest of whom the cache in use belongs to; None while nobody has used it."""
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
    def allocation(self) -> Allocation | None:
        """The lease on it, if any."""
        return self.spec.allocation

    @property
    def lease(self) -> Allocation:
        """The lease on it, for whoever knows that there is one. Raises RuntimeError where there is none."""
        if self.spec.allocation is None:
            raise RuntimeError(f"{self.key} is not leased")
        return self.spec.allocation

    def with_allocation(self, allocation: Allocation | None) -> Worker:
        """This worker, held by that lease (or by nobody)."""
        return self.but(spec=self.spec.but(allocation=allocation))

    def with_status(self, **changes: Any) -> Worker:
        """This worker with these fields of its status changed."""
        return self.but(status=self.status.but(**changes))


def new_worker(slot: Slot, pool: Pool, allocation: Allocation | None, labels: Mapping[str, str]) -> Worker:
    """The worker object for a slot, owned by its pool."""
    return Worker(
        metadata=Metadata(
            name=slot.worker.name,
            namespace=slot.namespace,
            labels={LABEL_POOL: slot.pool, **labels},
            owner_references=(OwnerReference(kind=Pool.KIND, name=pool.key.name, uid=pool.uid, controller=True),),
        ),
        spec=WorkerSpec(pool_ref=PoolRef(name=slot.pool), allocation=allocation),
    )
