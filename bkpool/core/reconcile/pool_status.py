"""The status of a pool: how many workers it has, what is wrong, and which fields of its spec have no effect.

It composes the status; the controller writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

from bkpool.core.auth import MethodType
from bkpool.core.observation import WorkerCapacity
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.reconcile.pool_counts import PoolCounts
from bkpool.core.reconcile.pool_state import PoolState
from bkpool.core.reconcile.unneeded_caches import caches_beyond_max
from bkpool.core.registrations import NONE_SEEN, Expiries
from bkpool.core.removal import last_lease_at, removal_of, what_happens
from bkpool.core.resource import AS_WANTED, Condition, condition
from bkpool.core.unreadable import CONDITION, Unreadable, named
from bkpool.core.worker import Worker, with_log


@dataclass(frozen=True, slots=True)
class PoolStatusInputs:
    """What a pool's status shows besides its workers."""

    endpoint: str
    """Where clients reach the pool's gateway."""
    ignored: Sequence[str] = ()
    """Paths below `spec` of the fields that are set and have no effect here."""
    capacity: WorkerCapacity | None = None
    """How many workers can run here; None: there is no fixed limit."""
    gateway_problem: str = ""
    """What is wrong with the pool's gateway; empty if nothing is."""
    host_not_allowed: str | None = None
    """Which name for the gateway's certificate is not allowed; empty: all are. None: nothing is checked here."""
    not_allowed: str | None = None
    """What else of the pool is not allowed; empty: all is. None: nothing is checked here."""
    unreadable: Sequence[Unreadable] = ()
    """Its workers that cannot be read."""


_DOWN = "its buildkitd does not run"


def pool_status(
    state: PoolState, inputs: PoolStatusInputs, now: datetime, registered_until: Expiries = NONE_SEEN
) -> PoolStatus:
    """The status to write. It equals the stored one where nothing has changed.

    Args:
        state: The pool, after a plan has taken note of its changes.
        inputs: What else it shows.
        now: The time.
        registered_until: When the registrations of gateways expire.
    """
    pool, counts = state.pool, state.counts
    removal = removal_of(pool)
    refused = inputs.host_not_allowed or inputs.not_allowed or ""
    problem = inputs.gateway_problem or refused or named(inputs.unreadable)
    if failed := counts.failed:
        problem = f"{failed.key.name}: {_reason(failed)}"
    phase = "Removing" if removal else "Degraded" if problem else "Ready"
    beyond = state.caches.beyond(pool.spec.scaling.max)
    return pool.status.but(
        phase=phase,
        last_lease_at=last_lease_at(pool, counts.last_end, counts.workers.allocated, now),
        caches_beyond_max=() if removal else caches_beyond_max(pool, beyond, now),
        observed_generation=pool.metadata.generation,
        endpoint=inputs.endpoint,
        conditions=tuple(_conditions(pool, counts, inputs, problem, now)),
        connections=counts.connections(registered_until, now),
        **asdict(counts.workers),
    )


def _conditions(
    pool: Pool, counts: PoolCounts, inputs: PoolStatusInputs, problem: str, now: datetime
) -> Iterator[Condition]:
    """The pool's conditions; the problem is what keeps it from being ready, and empty if nothing does."""
    ignored = ", ".join(f"spec.{name}" for name in inputs.ignored)
    yield _condition(pool, now, "IgnoredFields", good="False", reason="NotImplemented", message=ignored)
    yield _condition(pool, now, "Ready", good="True", reason="NotAsWanted", message=problem)
    if any(pool.spec.auth.oidc):
        refused = "; ".join(_refused_issuers(pool))
        yield _condition(pool, now, "Issuers", good="True", reason="NeedsCondition", message=refused)
    if inputs.capacity is not None:
        too_many = _beyond_capacity(pool, inputs.capacity)
        yield _condition(pool, now, "Capacity", good="True", reason=inputs.capacity.reason, message=too_many)
    if unreadable := named(inputs.unreadable):
        yield _condition(pool, now, CONDITION, good="False", reason="CannotBeRead", message=unreadable)
    for kind, message in (("HostNotAllowed", inputs.host_not_allowed), ("NotAllowed", inputs.not_allowed)):
        if message is not None:
            yield _condition(pool, now, kind, good="False", reason="NotAllowed", message=message)
    if removal := removal_of(pool):
        what = what_happens(pool, removal, counts.workers.allocated, counts.last_end, now)
        yield _condition(pool, now, "Removing", good="False", reason="NotNamed", message=what)


def _reason(failed: Worker) -> str:
    """Why a worker failed. One that an earlier version wrote may have no words of its own."""
    status = failed.status
    return with_log(status.message.strip() or _DOWN, status.log_tail)


def _refused_issuers(pool: Pool) -> Iterator[str]:
    """Why tokens of the pool's own issuers are not accepted."""
    for number, method in enumerate(pool.spec.auth.methods):
        if method.type is MethodType.OIDC and method.oidc and (reason := method.oidc.rejection_reason):
            yield f"spec.auth.methods[{number}].oidc: {reason}"


def _beyond_capacity(pool: Pool, capacity: WorkerCapacity) -> str:
    wanted = pool.spec.scaling.max
    return f"spec.scaling.max is {wanted}, and {capacity.limit}" if wanted > capacity.workers else ""


def _condition(
    pool: Pool, now: datetime, kind: str, *, good: Literal["True", "False"], reason: str, message: str
) -> Condition:
    """A condition that has its good value while the message is empty."""
    bad: Literal["True", "False"] = "False" if good == "True" else "True"
    status = bad if message else good
    why = reason if message else AS_WANTED
    return condition(pool.status.conditions, kind, status, reason=why, message=message, now=now)
