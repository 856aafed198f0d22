"""BuildKitPool, in the shape of the custom resource: what a user wants of a pool, and its observed state.

Fields of a spec that nothing reads are kept, and named in the pool's `IgnoredFields` condition.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from ipaddress import ip_network
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.auth import Auth
from bkpool.core.names import LONGEST_NAME, longest_pool_name
from bkpool.core.plain_words import HOST, LOG_SIZE, QUANTITY, SIZE
from bkpool.core.resource import OBSERVED, Condition, Duration, FieldProblem, Model, Resource, Time


class Scaling(Model):
    """How many workers a pool has."""

    min: Annotated[StrictInt, Field(ge=0, le=10_000)] = 0
    """Idle workers to keep ready in addition to the leased ones (as in the Go controller), within `max` in all."""
    max: Annotated[StrictInt, Field(ge=1, le=10_000)] = 10
    scale_down_delay: Duration = timedelta(minutes=15)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is greater than max ({self.max})")
        return self


class CacheGC(Model):
    """What buildkitd's garbage collection keeps. Sizes have a unit ("10GB") or are a percentage of the disk."""

    enabled: StrictBool = True
    keep_storage: Annotated[StrictStr, Field(pattern=SIZE)] | None = None
    keep_duration: Duration | None = None
    reserved_space: Annotated[StrictStr, Field(pattern=SIZE)] | None = None
    min_free_space: Annotated[StrictStr, Field(pattern=SIZE)] | None = None


class Reuse(StrEnum):
    """Who may get the cache of a worker after a lease."""

    IDENTITY = "identity"
    POOL = "pool"
    NEVER = "never"


Quantity = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictStr, Field(pattern=QUANTITY)]
"""An amount as in Kubernetes (500m, 2, 4Gi), kept as the user wrote it."""
Port = Annotated[StrictInt, Field(ge=1, le=65_535)]
ImageName = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class ResourceRequirements(Model):
    """As for a container of a pod."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    limits: dict[str, Quantity] = Field(default_factory=dict)


class Resources(Model):
    """The resources of the workers: of their pods, or of the cgroups of slots."""

    buildkit: ResourceRequirements = ResourceRequirements()


class LocalCache(Model):
    """A volume of each slot."""

    size: Annotated[StrictStr, Field(pattern=QUANTITY)] = "20Gi"
    storage_class: Annotated[StrictStr, Field(max_length=253)] | None = None
    """None: the cluster's default."""


class CacheBackend(Model):
    """One place for caches. Only the type `local` has an effect so far."""

    type: Literal["registry", "s3", "local"]
    local: LocalCache | None = None


class Cache(Model):
    """The caches of the workers."""

    reuse: Reuse = Reuse.IDENTITY
    keep_history: StrictBool = False
    """With reuse `pool`: callers may read the build history of callers before them."""
    gc: CacheGC = CacheGC()
    backends: tuple[CacheBackend, ...] = ()

    @model_validator(mode="after")
    def _one_volume(self) -> Self:
        if sum(backend.type == "local" for backend in self.backends) > 1:
            raise ValueError("backends: there is more than one of the type local")
        return self

    @property
    def local(self) -> LocalCache | None:
        """The volume of each slot; None: a worker's cache is deleted with its pod."""
        wanted = next((backend for backend in self.backends if backend.type == "local"), None)
        return None if wanted is None else wanted.local or LocalCache()


class ServiceType(StrEnum):
    """The type of a pool's Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


class External(Model):
    """The name by which callers outside the cluster reach the gateway. The user must make it resolve."""

    enabled: StrictBool | None = None
    """Only an explicit false turns the hostname off."""
    hostname: Annotated[StrictStr, Field(max_length=253, pattern=HOST)] | None = None
    annotations: dict[str, str] = Field(default_factory=dict)
    """For the Service, in addition to networking.annotations: external-dns, load balancers."""


def _read_network(value: object) -> object:
    if isinstance(value, str):
        if "/" not in value:
            raise ValueError("write a network with its length, such as 10.0.0.0/8")
        ip_network(value, strict=False)
    return value


class Egress(StrEnum):
    """Where a pool's workers may connect to."""

    OPEN = "open"
    PUBLIC = "public"
    """All networks except private and link-local ones; DNS works."""
    LISTED = "listed"
    """Only the networks in `allowedCIDRs`; DNS works."""


class EgressPolicy(Model):
    """Where a NetworkPolicy lets the workers connect to."""

    policy: Egress | None = None
    """None: `public` for an untrusted pool, else `open`."""
    allowed_cidrs: tuple[Annotated[StrictStr, BeforeValidator(_read_network)], ...] = Field((), alias="allowedCIDRs")
    """Networks that are always allowed, such as a registry's."""


class Networking(Model):
    """The pool's Service, and where its workers may connect to."""

    service_type: ServiceType | None = None
    port: Port | None = None
    annotations: dict[str, str] = Field(default_factory=dict)
    allowed_cidrs: tuple[Annotated[StrictStr, BeforeValidator(_read_network)], ...] = Field((), alias="allowedCIDRs")
    external: External = External()
    egress: EgressPolicy = EgressPolicy()
    host_ports: tuple[Port, ...] = ()
    """TCP ports of the machine's loopback that workers reach at 127.0.0.1 and ::1. Only for processes."""


class GatewayResources(ResourceRequirements):
    """The resources of a gateway's pod; `cpu` and `memory` are limits, as in the Go controller."""

    cpu: Quantity | None = None
    memory: Quantity | None = None


class PoolGateway(Model):
    """The leases of the pool, and its gateway."""

    token_ttl: Annotated[Duration, Field(alias="tokenTTL", gt=timedelta(0))] = timedelta(hours=1)
    max_token_ttl: Annotated[Duration, Field(alias="maxTokenTTL", gt=timedelta(0))] = timedelta(hours=24)
    drain_timeout: Duration = timedelta(hours=1)
    replicas: Annotated[StrictInt, Field(ge=1, le=100)] | None = None
    resources: GatewayResources = GatewayResources()
    service_type: ServiceType | None = None
    """Takes precedence over networking.serviceType."""
    port: Port | None = None
    """Takes precedence over networking.port."""
    node_port: Port | None = None
    load_balancer_class: Annotated[StrictStr, Field(max_length=317)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.token_ttl > self.max_token_ttl:
            raise ValueError("tokenTTL is greater than maxTokenTTL")
        return self


class Security(Model):
    """What build steps may do beyond what every build needs."""

    net_raw: StrictBool | None = None
    """CAP_NET_RAW: raw sockets, with which a step can read all traffic of its worker's network.

    None is like false. If false were the default, the API server would set it, and every pool in a cluster would
    report it as ignored."""


LogSize = Annotated[StrictStr, Field(pattern=LOG_SIZE)]
UNLIMITED = "unlimited"
"""The `LogSize` of a log that is never clipped."""


class StepLog(Model):
    """How much of a build step's output is shown. Where a field is None, BuildKit's own limit holds.

    On processes a variable of the appliance (`BUILDKIT_STEP_LOG_MAX_SIZE`, `_SPEED`) takes the place of that limit.
    """

    max_size: LogSize | None = None
    """Of one step."""
    max_speed: LogSize | None = None
    """Per second, on average since the step began."""


class PoolSpec(Model):
    """What the user wants. Fields of the contract that nothing reads yet are kept and reported as ignored."""

    scaling: Scaling = Scaling()
    buildkit_config: StrictStr | None = None
    """A buildkitd.toml that is merged into bkpool's own, except for what the pool's safety depends on."""
    buildkit_image: ImageName | None = None
    gateway_image: ImageName | None = None
    resources: Resources = Resources()
    cache: Cache = Cache()
    auth: Auth = Auth()
    networking: Networking = Networking()
    security: Security = Security()
    step_log: StepLog = StepLog()
    untrusted: StrictBool = False
    """Its callers are not trusted: no cache is used twice, and workers reach only public addresses."""
    gateway: PoolGateway = PoolGateway()

    @property
    def reuse(self) -> Reuse:
        """Who may get a used cache: nobody, if the pool is untrusted."""
        return Reuse.NEVER if self.untrusted else self.cache.reuse

    @property
    def local_cache(self) -> LocalCache | None:
        """The volume of each slot; None: a worker's cache is deleted with its pod."""
        return None if self.untrusted else self.cache.local

    @property
    def egress(self) -> Egress:
        """Where the workers may connect to."""
        return self.networking.egress.policy or (Egress.PUBLIC if self.untrusted else Egress.OPEN)


class CachesBeyondMax(Model):
    """Caches of slots beyond `scaling.max`, which nobody can get at present."""

    since: Time
    """When the controller first saw them there without a lease."""
    slots: tuple[StrictInt, ...]
    """The numbers of the slots."""


class PoolStatus(Model):
    """The observed state of a pool."""

    phase: StrictStr | None = None
    observed_generation: StrictInt | None = None
    workers: StrictInt = 0
    ready: StrictInt = 0
    idle: StrictInt = 0
    allocated: StrictInt = 0
    connections: StrictInt = 0
    """Open connections, as the gateways last reported them."""
    endpoint: StrictStr | None = None
    last_lease_at: Time | None = None
    """When a lease of the pool last left its worker; None: it never had one, or that was in an earlier version."""
    caches_beyond_max: tuple[CachesBeyondMax, ...] = ()
    conditions: tuple[Condition, ...] = ()


class Pool(Resource):
    """A pool of workers."""

    KIND: ClassVar[str] = "BuildKitPool"
    PLURAL: ClassVar[str] = "buildkitpools"

    kind: Literal["BuildKitPool"] = "BuildKitPool"
    spec: PoolSpec = PoolSpec()
    status: Annotated[PoolStatus, OBSERVED] = PoolStatus()

    @model_validator(mode="after")
    def _has_room_for_workers(self) -> Self:
        name, most = self.metadata.name, self.spec.scaling.max
        limit = longest_pool_name(most)
        if len(name) > limit:
            raise FieldProblem(
                "metadata.name",
                f"{name!r} has {len(name)} characters, and a pool with scaling.max {most} may have {limit}, because "
                f"its workers are called {name[:8]}...-worker-{most - 1}, in at most {LONGEST_NAME}",
            )
        return self
