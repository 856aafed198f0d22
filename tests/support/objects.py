"""Small builders of objects for the tests of the pure rooms."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from bkpool.core.names import Slot
from bkpool.core.observation import DaemonState, Observation, Snapshot
from bkpool.core.pool import Pool, PoolSpec, PoolStatus
from bkpool.core.pool_index import PoolIndex
from bkpool.core.reconcile.decide import state_of
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.reconcile.pool_status import pool_status as status_to_write
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.registrations import SeenRegistrations
from bkpool.core.resource import Metadata
from bkpool.core.worker import Lease, Phase, PoolRef, Worker, WorkerSpec, WorkerStatus

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def pool(**spec: Any) -> Pool:
    return Pool(
        metadata=Metadata(name="p", uid="pool-uid", resource_version="1", generation=1),
        spec=PoolSpec.model_validate(spec),
    )


def slot(number: int) -> Slot:
    return Slot("default", "p", number)


def indexed(workers: Iterable[Worker]) -> PoolIndex:
    """The workers of one pool as allocation sees them. They have changed in this order."""
    index = PoolIndex()
    for one in workers:
        index.put(one.slot, one)
    return index


def lease(identity: str = "a", *, id: str = "lease", now: datetime = NOW, **changes: Any) -> Lease:
    given = {
        "id": id,
        "token_sha256": f"digest-{id}",
        "requested_by": identity,
        "owner": f"owner-{identity}",
        "allocated_at": now,
        "expires_at": now + timedelta(hours=1),
        "not_after": now + timedelta(hours=24),
    }
    return Lease(**{**given, **changes})


def worker(number: int, allocation: Lease | None = None, *, phase: Phase = Phase.IDLE, **status: Any) -> Worker:
    metadata = Metadata(
        name=f"p-worker-{number}",
        uid=f"uid-{number}",
        resource_version="1",
        creation_timestamp=NOW - timedelta(minutes=1),
    )
    given = {"phase": phase, "endpoint": f"unix:///{number}" if phase in {Phase.IDLE, Phase.ALLOCATED} else None}
    return Worker(
        metadata=metadata,
        spec=WorkerSpec(pool_ref=PoolRef(name="p"), allocation=allocation),
        status=WorkerStatus(**{**given, **status}),
    )


def seen(
    number: int, owner: str | None = None, state: DaemonState = DaemonState.READY, message: str = ""
) -> Observation:
    return Observation(f"uid-{number}", state, f"unix:///{number}", owner, message)


def pool_status(
    p: Pool,
    workers: Iterable[Worker],
    inputs: PoolStatusInputs,
    now: datetime,
    *,
    caches: dict[Slot, str | None] | None = None,
) -> PoolStatus:
    """The status of a pool with these workers, from scratch."""
    state = state_of(Snapshot(p, tuple(workers), {}, caches or {}))
    state.plan(Moment(now))
    return status_to_write(state, inputs, now)


def snapshot(p: Pool, *workers: Worker, observed: dict[int, Observation] | None = None, **more: Any) -> Snapshot:
    by_slot = {slot(number): observation for number, observation in (observed or {}).items()}
    seen_now = SeenRegistrations()
    for one in workers:
        seen_now.look(one.key, one, 0)
    more.setdefault("registered_until", seen_now.at(NOW, 0))
    return Snapshot(p, workers, by_slot, more.pop("caches", {}), **more)
