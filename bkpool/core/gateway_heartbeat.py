"""BuildKitGateway, in the shape of the custom resource: of which leases a gateway replica has connections.

A gateway writes this one object again and again, instead of its registration on every worker (rule 10,
docs/rules.md#r10). It only renews what is registered on a worker; it never registers anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import AwareDatetime, Field, StrictInt

from bkpool.core.names import Key
from bkpool.core.resource import OBSERVED, Model, Resource
from bkpool.core.worker import GatewayRegistration, PoolRef, Worker


class HeartbeatSpec(Model):
    """What the gateway serves."""

    pool_ref: PoolRef | None = None
    """The only pool that it serves; None: all of them."""


class HeartbeatStatus(Model):
    """What the gateway has said last."""

    renewed_at: AwareDatetime | None = None
    """On the gateway's own clock. It is compared with nothing but the times of the same gateway."""
    leases: Annotated[dict[str, StrictInt], Field(alias="allocations")] = Field(default_factory=dict)
    """The leases that it is registered for, by their id, with their open connections."""


class GatewayHeartbeat(Resource):
    """The heartbeat of one gateway replica."""

    KIND: ClassVar[str] = "BuildKitGateway"
    PLURAL: ClassVar[str] = "buildkitgateways"

    kind: Literal["BuildKitGateway"] = "BuildKitGateway"
    spec: HeartbeatSpec = HeartbeatSpec()
    status: Annotated[HeartbeatStatus, OBSERVED] = HeartbeatStatus()


class HeartbeatVersion(NamedTuple):
    """Which heartbeat was judged: none is written without getting another version."""

    uid: str
    resource_version: str | None

    @classmethod
    def of(cls, heartbeat: GatewayHeartbeat) -> HeartbeatVersion:
        """The version of this heartbeat."""
        return cls(heartbeat.uid, heartbeat.metadata.resource_version)


ABSENT = HeartbeatVersion("", None)
"""It is known that there is none, or none that can be read."""


def connections_of(entry: GatewayRegistration, heartbeat: GatewayHeartbeat | None) -> int:
    """How many connections a gateway has of a lease: what it has said last of them, there or on the worker."""
    told = heartbeat.status if heartbeat is not None else None
    if told is None or told.renewed_at is None or told.renewed_at <= entry.renewed_at:
        return entry.connections
    return told.leases.get(entry.lease_id, 0)


def open_connections(worker: Worker, heartbeats: Mapping[Key, GatewayHeartbeat]) -> int:
    """Open connections of the worker's lease, as its gateways have said last."""
    if worker.lease is None:
        return 0
    entries = (entry for entry in worker.status.gateways if entry.lease_id == worker.lease.id)
    return sum(
        connections_of(entry, heartbeats.get(entry.heartbeat_key) if entry.heartbeat_key else None)
        for entry in entries
    )
