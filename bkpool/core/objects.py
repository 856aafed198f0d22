"""The objects: BuildKitPool and BuildKitWorker, in the shape of the custom resources.

They are frozen; a change is a new object. Fields we do not know are kept and written back (an older or newer
program's), and named in a pool's `IgnoredFields` condition; nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from bkpool.core import durations
from bkpool.core.errors import InvalidInput
from bkpool.core.names import API_VERSION, DEFAULT_NAMESPACE, LABEL_POOL, Key, Slot, check_name, slot_of


def _read_duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str):
        raise ValueError("write a duration as text, such as 30m or 1h30m")  # noqa: TRY004 - pydantic reads ValueError
    try:
        return durations.parse(value)
    except InvalidInput as error:
        raise ValueError(f"{error.message.removeprefix('duration: ')}. {error.hint}") from None


Duration = Annotated[timedelta, BeforeValidator(_read_duration), PlainSerializer(durations.render, return_type=str)]


class Model(BaseModel):
    """The common habits of everything stored: frozen, camelCase outside, unknown fields kept."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=to_camel, populate_by_name=True)

    def but(self, **changes: Any) -> Self:
        """A copy with these fields changed."""
        return self.model_copy(update=changes)


class OwnerReference(Model):
    """Whose end is also this object's end."""

    api_version: StrictStr = API_VERSION
    kind: StrictStr
    name: StrictStr
    uid: StrictStr
    controller: StrictBool | None = None


class Metadata(Model):
    """As the Kubernetes API has it; the store fills in what is None."""

    name: StrictStr
    namespace: StrictStr = DEFAULT_NAMESPACE
    uid: StrictStr | None = None
    resource_version: StrictStr | None = None
    generation: StrictInt | None = None
    creation_timestamp: AwareDatetime | None = None
    deletion_timestamp: AwareDatetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: tuple[StrictStr, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()

    @field_validator("name", "namespace")
    @classmethod
    def _dns_label(cls, value: str) -> str:
        try:
            return check_name(value, field="name")
        except InvalidInput as error:
            raise ValueError(f"{error.message.removeprefix('name: ')}. {error.hint}") from None


class Condition(Model):
    """One observation about an object, as Kubernetes writes them."""

    type: StrictStr
    status: Literal["True", "False", "Unknown"]
    reason: StrictStr
    message: StrictStr = ""
    last_transition_time: AwareDatetime
    observed_generation: StrictInt | None = None


class Resource(Model):
    """Anything the store keeps."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]

    api_version: Literal["buildkit.smrt-devops.net/v1alpha1"] = "buildkit.smrt-devops.net/v1alpha1"
    metadata: Metadata

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return Key(self.metadata.namespace, self.metadata.name)

    @property
    def uid(self) -> str:
        """The uid that the store gave it; empty before it is stored."""
        return self.metadata.uid or ""

    def to_json(self) -> dict[str, Any]:
        """The object as the API and the store write it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


R = TypeVar("R", bound=Resource)


# --- BuildKitPool ---------------------------------------------------------------------------------------------------


class Scaling(Model):
    """How many workers there are."""

    mode: Literal["auto", "manual", "dynamic"] = "auto"
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

    def with_allocation(self, allocation: Allocation | None) -> Worker:
        """This worker, held by that lease (or by nobody)."""
        return self.but(spec=self.spec.but(allocation=allocation))

    def with_status(self, **changes: Any) -> Worker:
        """This worker with these fields of its status changed."""
        return self.but(status=self.status.but(**changes))


KINDS: Mapping[str, type[Resource]] = {kind.KIND: kind for kind in (Pool, Worker)}
"""The kinds that the store keeps, by name."""


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


def parse_object(kind: type[R], data: object, *, source: str = "") -> R:
    """Reads an object from JSON or YAML data.

    Args:
        kind: The class it should be.
        data: What a JSON or YAML parser returned.
        source: Where it came from (a file and document number), for the error.

    Raises:
        InvalidInput: A field is wrong; the message names the first one and says how many more there are.
    """
    try:
        return kind.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise explain(error, source=source) from None


def explain(error: ValidationError, *, source: str = "") -> InvalidInput:
    """Turns pydantic's findings into one sentence that names the first wrong field as the user wrote it."""
    found = error.errors(include_url=False, include_context=False, include_input=True)
    first = found[0]
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    told = first["msg"].removeprefix("Value error, ")
    given = repr(first["input"]) if isinstance(first["input"], str | int | float | bool) else ""
    shown = f" (given: {given[:60]})" if given else ""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    where = f"{source}: " if source else ""
    return InvalidInput(f"{where}{field}: {told}{shown}{more}", hint=f"Correct {field}.", field=field)


def unknown_fields(model: BaseModel, prefix: str = "") -> Iterator[str]:
    """The dotted paths of the fields that nobody here reads."""
    for name in model.model_extra or {}:
        yield f"{prefix}{name}"
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from unknown_fields(value, f"{prefix}{info.alias or name}.")
