"""The objects: BuildKitPool and BuildKitWorker, in the shape of the custom resources.

A lease is the `allocation` in a worker's spec. Fields of a spec that nobody reads are kept, and named in the pool's
`IgnoredFields` condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AwareDatetime, BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

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


_QUANTITY = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
Quantity = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(pattern=_QUANTITY)]
"""As Kubernetes writes amounts (500m, 2, 4Gi): kept as given."""
Port = Annotated[StrictInt, Field(ge=1, le=65_535)]
ImageName = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class ResourceRequirements(Model):
    """As a container of a pod has them."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    limits: dict[str, Quantity] = Field(default_factory=dict)


class Resources(Model):
    """What the pods of the workers get."""

    buildkit: ResourceRequirements = ResourceRequirements()


class LocalCache(Model):
    """A volume for each slot."""

    size: Annotated[StrictStr, Field(pattern=_QUANTITY)] = "20Gi"
    storage_class: StrictStr | None = None
    """None: the cluster's default."""


class CacheBackend(Model):
    """One place for caches; only `local` is read so far."""

    type: Literal["registry", "s3", "local"]
    local: LocalCache | None = None


class Cache(Model):
    """Caches of the workers."""

    reuse: Reuse = Reuse.IDENTITY
    gc: CacheGC = CacheGC()
    backends: tuple[CacheBackend, ...] = ()

    @model_validator(mode="after")
    def _one_volume(self) -> Self:
        if sum(backend.type == "local" for backend in self.backends) > 1:
            raise ValueError("backends: there is more than one of the type local")
        return self

    @property
    def local(self) -> LocalCache | None:
        """The volume that each slot gets; None: a worker's cache ends with its pod."""
        wanted = next((backend for backend in self.backends if backend.type == "local"), None)
        return None if wanted is None else wanted.local or LocalCache()


class ServiceType(StrEnum):
    """How a pool's Service is reached."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


_HOST = r"^[A-Za-z0-9:]([A-Za-z0-9.:-]*[A-Za-z0-9])?$"


class External(Model):
    """The name by which callers outside the cluster reach the gateway. What makes it resolve is the user's."""

    enabled: StrictBool | None = None
    """Only an explicit false turns the hostname off."""
    hostname: Annotated[StrictStr, Field(max_length=253, pattern=_HOST)] | None = None
    annotations: dict[str, str] = Field(default_factory=dict)
    """For the Service, beside networking.annotations: external-dns, load balancers."""


def _read_network(value: object) -> object:
    if isinstance(value, str):
        if "/" not in value:
            raise ValueError("write a network with its length, such as 10.0.0.0/8")
        ip_network(value, strict=False)
    return value


class Networking(Model):
    """The pool's Service."""

    service_type: ServiceType | None = None
    port: Port | None = None
    annotations: dict[str, str] = Field(default_factory=dict)
    allowed_cidrs: tuple[Annotated[StrictStr, BeforeValidator(_read_network)], ...] = Field((), alias="allowedCIDRs")
    external: External = External()


class GatewayResources(ResourceRequirements):
    """Of a gateway's pod; `cpu` and `memory` are limits, as the Go controller had them."""

    cpu: Quantity | None = None
    memory: Quantity | None = None


class PoolGateway(Model):
    """Leases and the way in."""

    token_ttl: Annotated[Duration, Field(alias="tokenTTL", gt=timedelta(0))] = timedelta(hours=1)
    max_token_ttl: Annotated[Duration, Field(alias="maxTokenTTL", gt=timedelta(0))] = timedelta(hours=24)
    drain_timeout: Duration = timedelta(hours=1)
    replicas: Annotated[StrictInt, Field(ge=1, le=100)] | None = None
    resources: GatewayResources = GatewayResources()
    service_type: ServiceType | None = None
    """Wins over networking.serviceType."""
    port: Port | None = None
    """Wins over networking.port."""
    node_port: Port | None = None
    load_balancer_class: StrictStr | None = None

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
    buildkit_image: ImageName | None = None
    gateway_image: ImageName | None = None
    resources: Resources = Resources()
    cache: Cache = Cache()
    networking: Networking = Networking()
    gateway: PoolGateway = PoolGateway()


class PoolStatus(Model):
    """What is."""

    phase: StrictStr | None = None
    observed_generation: StrictInt | None = None
    workers: StrictInt = 0
    ready: StrictInt = 0
    idle: StrictInt = 0
    allocated: StrictInt = 0
    connections: StrictInt = 0
    """Open at the gateways, as of their last registration."""
    endpoint: StrictStr | None = None
    conditions: tuple[Condition, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_the_go_controller(cls, told: Any) -> Any:
        """Its `workers` is an object: what it has left is not ours, and is written anew."""
        return {} if isinstance(told, Mapping) and isinstance(told.get("workers"), Mapping) else told


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
    allocation: Allocation | None = None


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
    def allocation(self) -> Allocation | None:
        """The lease on it, if any."""
        return self.spec.allocation

    @property
    def way(self) -> str | None:
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
    def lease(self) -> Allocation:
        """The lease on it, for whoever knows that there is one. Raises RuntimeError where there is none."""
        if self.spec.allocation is None:
            raise RuntimeError(f"{self.key} is not leased")
        return self.spec.allocation

    def with_allocation(self, allocation: Allocation | None) -> Worker:
        """This worker, held by that lease (or by nobody). While it is held, a finalizer keeps its object."""
        others = tuple(name for name in self.metadata.finalizers if name != FINALIZER)
        finalizers = others if allocation is None else (*others, FINALIZER)
        return self.but(metadata=self.metadata.but(finalizers=finalizers), spec=self.spec.but(allocation=allocation))

    def with_status(self, **changes: Any) -> Worker:
        """This worker with these fields of its status changed."""
        return self.but(status=self.status.but(**changes))


def new_worker(slot: Slot, pool: Pool, allocation: Allocation | None, labels: Mapping[str, str]) -> Worker:
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
    ).with_allocation(allocation)
