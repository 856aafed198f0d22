"""BuildKitWorker, in the shape of the custom resource: one buildkitd in one slot, and the lease on it.

A lease is the `allocation` in a worker's spec. It is created, changed and ended by compare-and-swap only.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from bkpool.core.errors import InvalidInput
from bkpool.core.names import (
    END_WHEN_UNUSED,
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
from bkpool.core.remembered_caller import RememberedCaller
from bkpool.core.resource import Condition, FieldProblem, Metadata, Model, OwnerReference, Resource, Time

_SILENT = "buildkitd does not answer"

REMEMBERED_LEASES = 16
"""Ended leases that a worker remembers, so that a client that comes too late learns why its lease ended."""

UNDELIVERED_RENEWAL = timedelta(seconds=30)
"""How often an API replica notes on a lease that a request still waits for it."""
UNDELIVERED_LIFE = timedelta(minutes=2)
"""A lease that no caller has ends when its replica has not renewed it for so long (rule 14, docs/rules.md#r14)."""


class EndReason(StrEnum):
    """Why a lease ended."""

    RELEASED = "released"
    EXPIRED = "expired"
    LOST = "lost"
    ABANDONED = "abandoned"
    REVOKED = "revoked"
    """Its connections and builds are cut at once; every other end lets builds finish (rule 8, docs/rules.md#r8)."""


class Undelivered(Model):
    """Says that no caller is known to have a lease yet: its answer is still being made, or on its way."""

    replica: StrictStr
    """The API replica that answers. It has another name after each start."""
    renewals: StrictInt = 0
    """Grows every `UNDELIVERED_RENEWAL` while that replica still has a request for the lease."""


class Lease(Model):
    """A lease: one worker, one holder."""

    id: StrictStr
    job_id: StrictStr = ""
    token_sha256: Annotated[StrictStr, Field(alias="tokenSHA256")]
    requested_by: StrictStr
    holder: StrictStr = ""
    """Digest of the caller who asked for it (Identity.digest). They may renew and end it without its token."""
    owner: StrictStr
    """Digest of the cache's owner during and after this lease (`cache_owner.cache_owner_digest`)."""
    tenant: StrictStr = ""
    """Name of the tenant whose cache it uses, for people; empty in a lease of an earlier version."""
    caller: RememberedCaller | None = None
    """What is remembered of the caller, for renewals; None in a lease of an earlier version."""
    allocated_at: Time
    expires_at: Time
    not_after: Time
    """allocatedAt + maxTokenTTL: when the client certificate expires. The lease cannot be renewed beyond it."""
    ended_at: Time | None = None
    end_reason: EndReason | None = None
    end_message: StrictStr = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    undelivered: Undelivered | None = None
    """None once a caller has the lease; also in a lease of an earlier version, which did not note this."""

    def ended(self, now: datetime) -> EndReason | None:
        """Why this lease is over at this time; None while it runs."""
        if self.ended_at is not None:
            return self.end_reason or EndReason.RELEASED
        return EndReason.EXPIRED if now >= self.expires_at else None

    @property
    def ends_when_unused(self) -> bool:
        """Whether the lease ends soon after its last connection has closed."""
        return self.metadata.get(END_WHEN_UNUSED) == "true"

    def over_since(self) -> datetime:
        """When the lease ended or, if nothing ends it earlier, when it will expire."""
        return self.ended_at or self.expires_at


def with_log(message: str, log_tail: str) -> str:
    """A message as a person is shown it, followed by the end of buildkitd's log where there is one."""
    return f"{message}\nThe end of its log:\n{log_tail}" if log_tail else message


class EndedLease(Model):
    """A lease that is over. It is remembered so that a client that comes too late learns why.

    Its reason is shown only to callers who have its token. The log tail is forgotten when the cache gets another
    owner, or when the next lease ends.
    """

    token_sha256: Annotated[StrictStr, Field(alias="tokenSHA256")]
    ended_at: Time
    reason: EndReason
    message: StrictStr = ""
    """What happened, without text from buildkitd's log."""
    log_tail: StrictStr = ""
    """The last lines of buildkitd's log, if the lease was lost because of it."""

    @property
    def message_with_log(self) -> str:
        """The message as its holder is shown it."""
        return with_log(self.message, self.log_tail)


class GatewayRegistration(Model):
    """A gateway replica that may have connections of a lease (rule 10, docs/rules.md#r10)."""

    gateway: StrictStr
    lease_id: Annotated[StrictStr, Field(alias="allocationId")]
    renewed_at: Time
    """On the gateway's own clock. It changes with each renewal, and is compared with no other clock
    (`core.registrations`)."""
    connections: StrictInt = 0
    """Open connections when it was renewed."""
    heartbeat: StrictStr = ""
    """`NAMESPACE/NAME` of the BuildKitGateway that may renew it, too (`core.gateway_heartbeat`); empty: none does."""

    @property
    def heartbeat_key(self) -> Key | None:
        """The name of that BuildKitGateway."""
        namespace, _, name = self.heartbeat.partition("/")
        return Key(namespace, name) if name else None


class Phase(StrEnum):
    """The state of a worker. The names are those of the Go controller, and Draining."""

    PENDING = "Pending"
    PROVISIONING = "Provisioning"
    IDLE = "Idle"
    ALLOCATED = "Allocated"
    DRAINING = "Draining"
    FAILED = "Failed"
    TERMINATING = "Terminating"


_LEASED = frozenset({Phase.PROVISIONING, Phase.ALLOCATED, Phase.DRAINING})
"""The phases that are only written while a worker has a lease."""


class PoolRef(Model):
    """Names the pool of a worker."""

    name: StrictStr
    namespace: StrictStr | None = None


class WorkerSpec(Model):
    """The pool of the worker, its lease, and what is remembered of the leases before.

    A lease leaves the worker and is remembered in one write, so both are in the spec.
    """

    pool_ref: PoolRef
    allocation: Lease | None = None
    ended: tuple[EndedLease, ...] = ()
    """The leases that left it, the last one at the end. Read `Worker.ended_leases`."""
    last_activity_at: Time | None = None
    """When the last lease left it. Read `Worker.last_activity_at`."""
    allocation_count: StrictInt = 0
    """How many leases have left it. Read `Worker.allocation_count`."""


class WorkerStatus(Model):
    """The observed state of the worker."""

    phase: Phase = Phase.PENDING
    """It follows a lease about a second later, or not at all if the lease was shorter. Read `Worker.phase`."""
    endpoint: StrictStr | None = None
    """Where the gateway reaches buildkitd (`unix:///…` or `tcp://…`); None while buildkitd does not answer."""
    cache_owner: StrictStr | None = None
    """Digest of the owner of the cache; None while nobody has used it."""
    spec_digest: StrictStr | None = None
    """Digest of what of the pool's spec buildkitd was started with (`workers.spec_digest`); None: not known."""
    ephemeral_cache: StrictBool = False
    """The cache is deleted together with the worker, so its owner need not be recorded before its first use."""
    pod_name: StrictStr | None = None
    pod_ip: Annotated[StrictStr | None, Field(alias="podIP")] = None
    created_at: Time | None = None
    ready_at: Time | None = None
    last_activity_at: Time | None = None
    """When the last lease left it, as far as it was known at this write. Read `Worker.last_activity_at`."""
    allocation_count: StrictInt = 0
    """How many leases had left it, as far as it was known at this write. Read `Worker.allocation_count`."""
    failures: StrictInt = 0
    """Failures in a row. A worker that was ready for `FailureLimits.stable_after` starts again at 0."""
    failures_of: StrictStr = ""
    """Id of the lease in which they were counted; empty without a lease, and in a status of an earlier version."""
    silent_since: Time | None = None
    """Since when nobody has heard from buildkitd: it did not answer a probe, or a gateway could not reach it or got
    no byte from it. Whoever hears from it sets None. None: it answers, as far as is known."""
    failed_at: Time | None = None
    message: StrictStr = ""
    """What happened, in bkpool's own words: without text from buildkitd's log."""
    log_tail: StrictStr = ""
    """The last lines of buildkitd's log after a failure; empty if they may be of somebody else's builds."""
    gateways: tuple[GatewayRegistration, ...] = ()
    connected_lease: Annotated[StrictStr, Field(alias="connectedAllocationId")] = ""
    """The last lease that somebody connected with. It stays here when the gateways are gone."""
    ended: tuple[EndedLease, ...] = ()
    """Leases that ended while an earlier version took them off. Read `Worker.ended_leases`."""
    conditions: tuple[Condition, ...] = ()

    @property
    def message_with_log(self) -> str:
        """The message as a person is shown it, followed by the end of the log where there is one."""
        return with_log(self.message, self.log_tail)


class Worker(Resource):
    """One buildkitd in one slot. The object outlives its process or pod (rule 4, docs/rules.md#r4)."""

    KIND: ClassVar[str] = "BuildKitWorker"
    PLURAL: ClassVar[str] = "buildkitworkers"

    kind: Literal["BuildKitWorker"] = "BuildKitWorker"
    spec: WorkerSpec
    status: WorkerStatus = WorkerStatus()

    @model_validator(mode="after")
    def _in_a_slot(self) -> Self:
        try:
            slot = slot_of(self.key)
        except InvalidInput as error:
            raise FieldProblem("metadata.name", error.message.removeprefix("metadata.name: ")) from None
        if self.spec.pool_ref.name != slot.pool:
            raise FieldProblem("spec.poolRef.name", f"must be {slot.pool!r}, as the worker's name says")
        return self

    @property
    def slot(self) -> Slot:
        """The slot that this worker is in."""
        return slot_of(self.key)

    @property
    def pool(self) -> Key:
        """The pool this worker belongs to."""
        return Key(self.metadata.namespace, self.spec.pool_ref.name)

    @property
    def lease(self) -> Lease | None:
        """The lease on this worker, if there is one."""
        return self.spec.allocation

    @property
    def phase(self) -> Phase:
        """The stored phase. Without a lease it is that of a free worker, although it is stored only later."""
        lease, status = self.spec.allocation, self.status
        if lease is not None or status.phase not in _LEASED:
            return status.phase
        if status.endpoint is not None:
            return Phase.IDLE
        return Phase.FAILED if status.failures else Phase.PENDING

    @property
    def ended_leases(self) -> tuple[EndedLease, ...]:
        """The leases that the worker remembers, the last one at the end; also those that an earlier version wrote."""
        ended, only_there = self.spec.ended, self._only_in_status
        if not only_there:
            return ended
        return tuple(sorted((*only_there, *ended), key=attrgetter("ended_at"))[-REMEMBERED_LEASES:])

    @property
    def _only_in_status(self) -> list[EndedLease]:
        if not self.status.ended:
            return []
        known = {past.token_sha256 for past in self.spec.ended}
        return [past for past in self.status.ended if past.token_sha256 not in known]

    @property
    def _ended_since(self) -> int:
        """How many leases an earlier version has taken off since this one wrote the spec, as far as it is known."""
        ended = self.spec.ended
        if len(ended) < REMEMBERED_LEASES:
            return len(self._only_in_status)
        return sum(past.ended_at > ended[0].ended_at for past in self._only_in_status)  # not those that were left out

    @property
    def last_activity_at(self) -> datetime | None:
        """When the last lease left the worker; None: it never had one."""
        spec, status = self.spec, self.status
        earlier_version_was_last = self._ended_since or status.allocation_count > spec.allocation_count
        if spec.last_activity_at is None or (earlier_version_was_last and status.last_activity_at is not None):
            return status.last_activity_at
        return spec.last_activity_at

    @property
    def allocation_count(self) -> int:
        """How many leases have left the worker."""
        return max(self.spec.allocation_count + self._ended_since, self.status.allocation_count)

    @property
    def undelivered(self) -> Undelivered | None:
        """What the lease says while no caller is known to have it. Who has connected with it has it."""
        lease = self.lease
        return None if lease is None or self.status.connected_lease == lease.id else lease.undelivered

    @property
    def routable_endpoint(self) -> str | None:
        """The endpoint to which the holder's connections may go now; None without a lease or while it is not ready.

        An idle worker is ready as soon as it is claimed if its cache belongs to the holder already, or if the cache
        needs no recorded owner (rule 3, docs/rules.md#r3). Any other worker is ready once the controller has prepared
        its cache.
        """
        lease, status = self.spec.allocation, self.status
        if lease is None or status.phase not in {Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING}:
            return None
        needs_no_owner = status.cache_owner is None and status.ephemeral_cache
        return status.endpoint if status.cache_owner == lease.owner or needs_no_owner else None

    @property
    def held_lease(self) -> Lease:
        """The lease on this worker, for code that knows that there is one. Raises RuntimeError if there is none."""
        if self.spec.allocation is None:
            raise RuntimeError(f"{self.key} is not leased")
        return self.spec.allocation

    @property
    def counted_failures(self) -> int:
        """Failures in a row that count for the lease on the worker. Those before it count only without a lease."""
        status = self.status
        return status.failures if self.lease is None or status.failures_of == self.lease.id else 0

    @property
    def lease_end_message(self) -> str:
        """Why the lease on the worker ended, as its holder is shown it; empty if there is no lease or no message."""
        lease = self.lease
        if lease is None:
            return ""
        for past in self.ended_leases:  # one that was lost is remembered before it leaves; its log tail moves with it
            if past.token_sha256 == lease.token_sha256:
                return past.message_with_log
        return with_log(lease.end_message, self.status.log_tail if lease.end_reason is EndReason.LOST else "")

    def with_lease(self, lease: Lease | None) -> Worker:
        """A copy with this lease, or without one. A finalizer keeps the object exactly while it has a lease."""
        others = tuple(name for name in self.metadata.finalizers if name != FINALIZER)
        finalizers = others if lease is None else (*others, FINALIZER)
        return self.but(metadata=self.metadata.but(finalizers=finalizers), spec=self.spec.but(allocation=lease))

    def noted_silent(self, since: datetime) -> Worker:
        """A copy that says since when nobody has heard from buildkitd, unless it says so already."""
        if self.status.silent_since is not None:
            return self
        return self.with_status(silent_since=since, message=_SILENT, log_tail="")

    def noted_answering(self) -> Worker:
        """A copy that says that buildkitd was heard."""
        message = "" if self.status.message == _SILENT else self.status.message
        return self.with_status(silent_since=None, message=message)

    def with_status(self, **changes: Any) -> Worker:
        """A copy with these fields of its status changed."""
        return self.but(status=self.status.but(**changes))


def new_worker(slot: Slot, pool: Pool, lease: Lease | None, labels: Mapping[str, str]) -> Worker:
    """A new worker object for a slot. Its pool owns it."""
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
