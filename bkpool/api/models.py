"""What goes over the wire: the request and answer bodies of the contract (DESIGN section 2).

They say what is allowed and are the source of `/openapi.json`; they know nothing of HTTP.
"""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr
from pydantic.alias_generators import to_camel

from bkpool.allocation import AllocationRequest, Grant
from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.names import DEFAULT_NAMESPACE, DNS_LABEL, Key
from bkpool.core.pool import Pool
from bkpool.core.resource import Condition, Duration, Name
from bkpool.core.worker import Worker
from bkpool.identity import Caller, Identity
from bkpool.identity.access import LONGEST_BEARER
from bkpool.identity.rules import AccessDecision

MAX_WAIT = timedelta(hours=1)
MAX_METADATA = 64


NAME_PATTERN = f"^{DNS_LABEL}$"
ObjectName = Annotated[Name, Field(json_schema_extra={"pattern": NAME_PATTERN})]
Namespace = Annotated[
    Name,
    BeforeValidator(lambda given: DEFAULT_NAMESPACE if given == "" else given),
    Field(json_schema_extra={"pattern": f"^$|{NAME_PATTERN}"}),
]
"""Empty: the default one."""
Text = Annotated[StrictStr, Field(max_length=256)]
Token = Annotated[StrictStr, Field(min_length=1, max_length=512)]


class Body(BaseModel):
    """The habits of all bodies: camelCase, and a misspelt field is an error rather than silently dropped."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class AllocateBody(Body):
    """A request for a worker."""

    pool_name: ObjectName
    namespace: Namespace = DEFAULT_NAMESPACE
    job_id: Text = ""
    ttl: Duration | None = None
    wait: Annotated[Duration, Field(le=MAX_WAIT)] = timedelta(minutes=5)
    csr: Annotated[StrictStr, Field(max_length=16_384)] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=MAX_METADATA)] = Field(default_factory=dict)

    def request(self) -> AllocationRequest:
        """The same, as the lease service takes it."""
        return AllocationRequest(
            pool=Key(self.namespace, self.pool_name),
            wait=self.wait,
            ttl=self.ttl,
            job_id=self.job_id,
            csr_pem=self.csr.encode() if self.csr else None,
            metadata=self.metadata,
        )


class AllocateAnswer(Body):
    """A lease with everything needed to use it. clientKey is absent where the caller sent a CSR."""

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
        """The answer for a lease that was just made."""
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
    """A token; having it is the right to ask."""

    token: Token


class LeaseBody(Body):
    """A lease: its token, or, for who made it, the worker that it is on."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["token"]}, {"required": ["workerName"]}]})

    token: Token = ""
    worker_name: ObjectName = ""
    namespace: Namespace = DEFAULT_NAMESPACE
    """The worker's, and its pool's."""

    @property
    def worker(self) -> Key | None:
        """The worker, where it is that which names the lease.

        Raises:
            InvalidInput: Not exactly one of the two is given.
        """
        if bool(self.token) == bool(self.worker_name):
            raise InvalidInput(
                "token: give either the lease's token or workerName", hint="Give exactly one.", field="token"
            )
        return Key(self.namespace, self.worker_name) if self.worker_name else None


class RenewBody(LeaseBody):
    """A lease and how long it shall run from now; without ttl the pool's default."""

    ttl: Duration | None = None


class RenewAnswer(Body):
    """When the lease ends now."""

    worker_name: str
    expires_at: AwareDatetime


class LookupAnswer(Body):
    """Where a lease leads."""

    worker_endpoint: str
    worker_name: str
    pool_name: str


class StatusAnswer(Body):
    """One word."""

    status: str


class WorkerView(Body):
    """A worker as people want to see it. Whose it is not sees its name and phase only."""

    name: str
    phase: str
    job_id: str | None = None
    requested_by: str | None = None
    expires_at: AwareDatetime | None = None
    message: str | None = None
    failures: int | None = None
    allocation_count: int | None = None
    created_at: AwareDatetime | None = None
    last_activity_at: AwareDatetime | None = None

    @classmethod
    def of(cls, worker: Worker, *, whole: bool) -> WorkerView:
        """The view of a worker.

        Args:
            worker: The worker.
            whole: Whether more than name and phase may be seen.
        """
        name, phase = worker.key.name, worker.status.phase.value
        if not whole:
            return cls(name=name, phase=phase)
        lease = worker.lease
        return cls(
            name=name,
            phase=phase,
            job_id=(lease.job_id or None) if lease else None,
            requested_by=lease.requested_by if lease else None,
            expires_at=lease.expires_at if lease else None,
            message=worker.status.message,
            failures=worker.status.failures,
            allocation_count=worker.status.allocation_count,
            created_at=worker.metadata.creation_timestamp,
            last_activity_at=worker.status.last_activity_at,
        )


class PoolView(Body):
    """A pool as people want to see it."""

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
        """The view of a pool; `live` is what changes too fast for its stored status."""
        return cls(
            name=pool.key.name,
            namespace=pool.key.namespace,
            phase=pool.status.phase or "Pending",
            min=pool.spec.scaling.min,
            max=pool.spec.scaling.max,
            conditions=pool.status.conditions,
            **live,
        )


class PoolsAnswer(Body):
    """All pools that the caller may see."""

    pools: tuple[PoolView, ...]


class PoolAnswer(PoolView):
    """One pool, with its workers one by one."""

    members: tuple[WorkerView, ...]


class CheckBody(Body):
    """Somebody's bearer token, and the pool that it is about; having the token is the right to ask."""

    token: Annotated[StrictStr, Field(min_length=1, max_length=LONGEST_BEARER, pattern=r"^[A-Za-z0-9._~+/-]+=*$")]
    pool_name: ObjectName
    namespace: Namespace = DEFAULT_NAMESPACE


class IdentityView(Body):
    """Whom a token stands for."""

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
    """What one way of knowing a caller says of the token."""

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
        """The answer for a decision about a caller."""
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
    """A BuildKitOIDCConfig as people want to see it."""

    name: str
    namespace: str
    issuer: str
    audience: str
    enabled: bool
    ready: bool
    message: str

    @classmethod
    def of(cls, config: OIDCConfig) -> Self:
        """The view of a config."""
        spec, status = config.spec, config.status
        return cls(
            name=config.key.name,
            namespace=config.key.namespace,
            issuer=spec.issuer,
            audience=spec.audience,
            enabled=spec.enabled,
            ready=status.ready,
            message=status.message,
        )


class IssuersAnswer(Body):
    """All issuers."""

    issuers: tuple[IssuerView, ...]


class ErrorDetail(Body):
    """What is wrong and what to do."""

    code: str
    message: str
    hint: str = ""
    field: str | None = None


class ErrorAnswer(Body):
    """Every error has this shape."""

    error: ErrorDetail
