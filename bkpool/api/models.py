"""The request and response bodies of the API.

They define what is valid and are the source of `/openapi.json`. They do not know about HTTP. Their names and fields
are part of the contract with clients.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from pydantic.alias_generators import to_camel

from bkpool.allocation import AllocationRequest, Grant
from bkpool.core import durations
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.names import DEFAULT_NAMESPACE, DEFAULT_WAIT, DNS_LABEL, Key
from bkpool.core.plain_words import BEARER
from bkpool.core.pool import Pool
from bkpool.core.resource import Condition, Duration, Name
from bkpool.core.shown_worker import shown_message, shown_phase
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.identity import Caller, Identity
from bkpool.identity.access import LONGEST_BEARER
from bkpool.identity.rules import AccessDecision

MAX_METADATA = 64

NAME_PATTERN = f"^{DNS_LABEL}$"
ObjectName = Annotated[Name, Field(json_schema_extra={"pattern": NAME_PATTERN})]
Namespace = Annotated[
    Name,
    BeforeValidator(lambda given: DEFAULT_NAMESPACE if given == "" else given),
    Field(json_schema_extra={"pattern": f"^$|{NAME_PATTERN}"}),
]
"""A namespace; an empty one means the default namespace."""
Text = Annotated[StrictStr, Field(max_length=256)]
Token = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class Body(BaseModel):
    """The base of all bodies: fields are in camelCase, and an unknown field is an error."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class AllocateBody(Body):
    """A request for a worker."""

    pool_name: ObjectName
    namespace: Namespace = DEFAULT_NAMESPACE
    job_id: Text = ""
    ttl: Duration | None = None
    wait: Duration = DEFAULT_WAIT
    csr: Annotated[StrictStr, Field(max_length=16_384)] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=MAX_METADATA)] = Field(default_factory=dict)

    def request(self, max_wait: timedelta) -> AllocationRequest:
        """The request in the form that the lease service takes.

        Args:
            max_wait: The longest wait. A request that names none has at most this one.

        Raises:
            InvalidInput: The request names a longer wait.
        """
        if self.wait > max_wait and "wait" in self.model_fields_set:
            raise InvalidInput(
                f"the request is not valid: must be at most {durations.render(max_wait)}",
                hint="Ask for a shorter wait, or raise api.max_wait of the appliance.",
                field="wait",
            )
        return AllocationRequest(
            pool=Key(self.namespace, self.pool_name),
            wait=min(self.wait, max_wait),
            ttl=self.ttl,
            job_id=self.job_id,
            csr_pem=self.csr.encode() if self.csr else None,
            metadata=self.metadata,
        )


class AllocateAnswer(Body):
    """A lease with everything that is needed to use it. clientKey is absent if the caller sent a CSR."""

    worker_name: str
    token: str
    endpoint: str
    gateway_endpoint: str
    expires_at: AwareDatetime
    ca_cert: str
    client_cert: str
    client_key: str | None = None

    @classmethod
    def of(cls, grant: Grant, gateway_endpoint: str) -> AllocateAnswer:
        """The response for a new lease."""
        return cls(
            worker_name=grant.worker.key.name,
            token=grant.token,
            endpoint=grant.worker.status.endpoint or "",
            gateway_endpoint=gateway_endpoint,
            expires_at=grant.expires_at,
            ca_cert=base64.b64encode(grant.ca_pem).decode(),
            client_cert=base64.b64encode(grant.certificate_pem).decode(),
            client_key=base64.b64encode(grant.key_pem).decode() if grant.key_pem else None,
        )


class TokenBody(Body):
    """A lease's token. Who has it may ask."""

    token: Token


class LeaseBody(Body):
    """A lease: its token, or the name of its worker if the caller allocated it."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["token"]}, {"required": ["workerName"]}]})

    token: Token = ""
    worker_name: ObjectName = ""
    namespace: Namespace = DEFAULT_NAMESPACE
    """The namespace of the worker and its pool."""

    @property
    def worker(self) -> Key | None:
        """The worker, if the body names the lease by it; None if it names the lease by its token.

        Raises:
            InvalidInput: Both or neither of the two are given.
        """
        if bool(self.token) == bool(self.worker_name):
            raise InvalidInput(
                "the request must name the lease in exactly one way",
                hint="Give either token or workerName.",
                field="token",
            )
        return Key(self.namespace, self.worker_name) if self.worker_name else None


class RenewBody(LeaseBody):
    """A lease, and how long it should last from now on. Without ttl: the pool's default."""

    ttl: Duration | None = None


class ReleaseBody(LeaseBody):
    """A lease to end. With now, its connections and builds are cut; without, they may finish."""

    now: StrictBool = False


class RenewAnswer(Body):
    """The new end of the lease."""

    worker_name: str
    expires_at: AwareDatetime


class LookupAnswer(Body):
    """The worker of a lease."""

    worker_endpoint: str
    worker_name: str
    pool_name: str


class StatusAnswer(Body):
    """A status in one word."""

    status: str


class WorkerView(Body):
    """A worker. Callers who do not own its lease see only its name and phase."""

    name: str
    phase: str
    lease_id: str | None = None
    job_id: str | None = None
    requested_by: str | None = None
    allocated_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    connections: int | None = None
    message: str | None = None
    failures: int | None = None
    allocation_count: int | None = None
    created_at: AwareDatetime | None = None
    last_activity_at: AwareDatetime | None = None

    @classmethod
    def of(cls, worker: Worker, now: datetime, *, whole: bool, connections: int = 0) -> WorkerView:
        """The view of a worker.

        Args:
            worker: The worker.
            now: The time.
            whole: Whether the caller may see more than name and phase.
            connections: The worker's open connections.
        """
        name, phase = worker.key.name, shown_phase(worker, now).value
        if not whole:
            return cls(name=name, phase=phase)
        lease = worker.lease
        return cls(
            name=name,
            phase=phase,
            lease_id=lease.id if lease else None,
            job_id=(lease.job_id or None) if lease else None,
            requested_by=lease.requested_by if lease else None,
            allocated_at=lease.allocated_at if lease else None,
            expires_at=lease.expires_at if lease else None,
            connections=connections,
            message=shown_message(worker, now),
            failures=worker.status.failures,
            allocation_count=worker.allocation_count,
            created_at=worker.metadata.creation_timestamp,
            last_activity_at=worker.last_activity_at,
        )


class PoolView(Body):
    """A pool with its counts."""

    name: str
    namespace: str
    phase: str
    min: int
    max: int
    workers: int
    ready: int
    idle: int
    allocated: int
    waiting: int
    connections: int
    gateway_endpoint: str
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def of(cls, pool: Pool, **live: Any) -> Self:
        """The view of a pool; `live` are the values that change too fast to be in its stored status."""
        return cls(
            name=pool.key.name,
            namespace=pool.key.namespace,
            phase=pool.status.phase or "Pending",
            min=pool.spec.scaling.min,
            max=pool.spec.scaling.max,
            conditions=pool.status.conditions,
            **live,
        )

    @classmethod
    def of_unreadable(cls, found: Unreadable, **live: Any) -> Self:
        """The view of a pool that cannot be read: its name, and why."""
        return cls(
            name=found.key.name,
            namespace=found.key.namespace,
            phase="Degraded",
            min=0,
            max=0,
            conditions=(found.condition(datetime.now(UTC)),),
            **live,
        )


class PoolsAnswer(Body):
    """All pools that the caller may use."""

    pools: tuple[PoolView, ...]


class PoolAnswer(PoolView):
    """One pool with its workers."""

    members: tuple[WorkerView, ...]


class CheckBody(Body):
    """A bearer token and a pool. Who has the token may ask."""

    token: Annotated[StrictStr, Field(min_length=1, max_length=LONGEST_BEARER, pattern=BEARER)]
    pool_name: ObjectName
    namespace: Namespace = DEFAULT_NAMESPACE


class IdentityView(Body):
    """The identity that a token proves."""

    name: str
    authority: str
    source: str
    groups: tuple[str, ...]
    pools: tuple[str, ...]
    tenant: str | None = None

    @classmethod
    def of(cls, identity: Identity) -> IdentityView:
        """The view of an identity."""
        return cls(
            name=identity.name,
            authority=identity.authority,
            source=identity.source,
            groups=identity.groups,
            pools=identity.pools,
            tenant=identity.tenant_name,
        )


class VerdictView(Body):
    """What one authenticator says about the token."""

    source: str
    known: bool
    reason: str = ""


class CheckAnswer(Body):
    """Whether the token may use the pool, and why. Only the admin sees all verdicts."""

    allowed: bool
    reason: str
    identity: IdentityView | None = None
    verdicts: tuple[VerdictView, ...] | None = None

    @classmethod
    def of(cls, decision: AccessDecision, caller: Caller, *, all_verdicts: bool) -> CheckAnswer:
        """The response for a decision about a caller."""
        verdicts = tuple(
            VerdictView(source=one.source, known=one.identity is not None, reason=one.refusal)
            for one in caller.verdicts
        )
        return cls(
            allowed=decision.allowed,
            reason=decision.reason,
            identity=IdentityView.of(decision.identity) if decision.identity else None,
            verdicts=verdicts if all_verdicts else None,
        )


class IssuerView(Body):
    """A BuildKitOIDCConfig and whether it works."""

    name: str
    namespace: str
    issuer: str
    audience: str
    enabled: bool
    ready: bool
    message: str

    @classmethod
    def of(cls, config: OIDCConfig, audience: str) -> Self:
        """The view of a config; the audience is for one that names none."""
        spec, status = config.spec, config.status
        return cls(
            name=config.key.name,
            namespace=config.key.namespace,
            issuer=spec.issuer,
            audience=spec.audience or audience,
            enabled=spec.enabled,
            ready=status.ready,
            message=status.message,
        )


class AudienceAnswer(Body):
    """What ID tokens for this API must be made for."""

    audience: str


class IssuersAnswer(Body):
    """All issuers."""

    issuers: tuple[IssuerView, ...]


class ErrorDetail(Body):
    """What is wrong, and what to do."""

    code: str
    message: str
    hint: str = ""
    field: str | None = None


class ErrorAnswer(Body):
    """Every error has this shape."""

    error: ErrorDetail
