"""What the controller should do next, as a pure function of what is.

`decide(snapshot, now)` returns actions and the next moment at which time alone would change the answer. It is level
triggered: it looks at the state, never at how the state came about, so it may be asked again at any time. It never
does anything itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

from bkpool.core.names import Slot
from bkpool.core.placement import free_slot, last_used
from bkpool.core.pool import Pool, PoolStatus, Reuse
from bkpool.core.resource import Condition
from bkpool.core.worker import EndedLease, EndReason, GatewayRegistration, Lease, Phase, Worker

MAX_FAILURES = 5
"""Failures in a row after which a lease is lost (DESIGN rule 4)."""
STABLE = timedelta(minutes=1)
"""A worker that was ready for so long counts its failures from the beginning."""
BACKOFF = timedelta(milliseconds=500)
BACKOFF_MAX = timedelta(minutes=2)
REGISTRATION_LIFE = timedelta(seconds=60)
"""A gateway's registration that was not renewed for so long is dead (DESIGN rule 10)."""
UNTOLD = timedelta(minutes=1)
"""A lease that has no token after so long never will: whoever was making it has been killed."""
REMEMBERED = 16
"""Ended leases that a worker remembers, so that a late caller is told why."""


class Running(StrEnum):
    """What a runtime sees in a slot."""

    STARTING = "starting"
    """There, but it has not answered yet, or does so no more."""
    READY = "ready"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Observation:
    """A slot as the runtime sees it now. A slot with nothing in it has no observation."""

    worker_uid: str
    """For which worker object buildkitd was started."""
    state: Running
    endpoint: str
    cache_owner: str | None
    message: str = ""
    """After an exit: how it ended. It never contains text from buildkitd's log."""
    log_tail: str = ""
    """After an exit: the last lines of buildkitd's log, which may tell of somebody's build."""
    ephemeral: bool = False
    """Its cache ends with the worker."""
    held: bool | None = None
    """Whether others are asked to leave it alone; None where there are no others."""
    pod_name: str | None = None
    pod_ip: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One pool and all that concerns it at one moment."""

    pool: Pool
    workers: tuple[Worker, ...]
    observed: Mapping[Slot, Observation]
    caches: Mapping[Slot, str | None]
    busy: frozenset[Slot] = frozenset()
    """Slots in which an action is still under way; nothing is decided about them."""


@dataclass(frozen=True, slots=True)
class Create:
    """Make a worker for the idle floor."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Start:
    """Bring buildkitd up, with a cache of this owner (None: nobody holds the worker yet)."""

    worker: Worker
    owner: str | None


@dataclass(frozen=True, slots=True)
class OwnCache:
    """Give the clean cache its owner."""

    worker: Worker
    owner: str


@dataclass(frozen=True, slots=True)
class Protect:
    """Ask whoever manages the machines to leave the worker alone, or no longer."""

    worker: Worker
    held: bool


@dataclass(frozen=True, slots=True)
class Wipe:
    """Empty the slot's cache; nobody may have it again. Whatever runs on it ends."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class Report:
    """Write this status."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Lose:
    """End the lease: its worker can't be kept up."""

    worker: Worker
    message: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The lease is over and no gateway holds a connection of it: take it off the worker, and remember it."""

    worker: Worker
    ended: EndedLease
    phase: Phase


@dataclass(frozen=True, slots=True)
class Remove:
    """Stop buildkitd and delete the worker; the slot keeps its cache."""

    worker: Worker


Action = Create | Start | OwnCache | Protect | Wipe | Report | Lose | Finish | Remove


def slot_in(action: Action) -> Slot:
    """The slot that an action is about."""
    return action.slot if isinstance(action, Create | Wipe) else action.worker.slot


@dataclass(frozen=True, slots=True)
class Plan:
    """At most one action a slot, and when to ask again if nothing changes before."""

    actions: tuple[Action, ...]
    wake_at: datetime | None


def decide(snapshot: Snapshot, now: datetime) -> Plan:
    """What to do now for one pool."""
    actions: list[Action] = []
    deadlines: list[datetime] = []
    surplus, next_surplus = _surplus(snapshot, now)
    deadlines += next_surplus
    spent = _spent(snapshot)
    actions += [Wipe(slot) for slot in spent]
    for worker in snapshot.workers:
        if worker.slot in snapshot.busy or worker.slot in spent:
            continue
        if worker in surplus:
            actions.append(Remove(worker))
            continue
        seen = snapshot.observed.get(worker.slot)
        lease = worker.lease
        step = _idle(worker, seen, now) if lease is None else _leased(worker, lease, seen, snapshot.pool, now)
        if isinstance(step, datetime):
            deadlines.append(step)
        elif step is not None:
            actions.append(step)
    actions += _floor(snapshot, spent)
    return Plan(tuple(actions), min(deadlines, default=None))


def _spent(snapshot: Snapshot) -> list[Slot]:
    """With reuse `never`: the slots that nobody holds and whose cache has been used, before all else."""
    if snapshot.pool.spec.reuse is not Reuse.NEVER:
        return []
    seen = {slot: snapshot.observed[slot].cache_owner for slot in snapshot.observed}
    used = {slot for slot, owner in {**snapshot.caches, **seen}.items() if owner is not None}
    held = {worker.slot for worker in snapshot.workers if worker.lease is not None}
    ours = {slot for slot in used if (slot.namespace, slot.pool) == snapshot.pool.key}
    return sorted(ours - held - snapshot.busy)


def _leased(
    worker: Worker, lease: Lease, seen: Observation | None, pool: Pool, now: datetime
) -> Action | datetime | None:
    over = lease.ended(now)
    if over is not None:
        return _wind_up(worker, lease, over, seen, now)
    if worker.metadata.deletion_timestamp or pool.metadata.deletion_timestamp:
        return Lose(worker, "the pool was deleted" if pool.metadata.deletion_timestamp else "the worker was deleted")
    if not lease.token_sha256 and now >= lease.allocated_at + UNTOLD:
        return Lose(worker, "it was never answered")
    up = _up(worker, seen)
    if up is None:
        if worker.status.failures >= MAX_FAILURES:
            return Lose(worker, worker.status.message)
        return _bring_up(worker, seen, lease.owner, now)
    failures = 0 if worker.status.phase is Phase.IDLE else worker.status.failures
    step = _made_the_holders(worker, lease.owner, up) or _report(worker, up, Phase.ALLOCATED, now, failures)
    return step or (lease.expires_at if lease.token_sha256 else lease.allocated_at + UNTOLD)


def _made_the_holders(worker: Worker, owner: str, up: Observation) -> Action | None:
    """What is still to be done so that the cache, and the worker, are the holder's and nobody else's."""
    if up.cache_owner is None:
        return OwnCache(worker, owner)
    if up.cache_owner != owner:
        return Start(worker, owner)
    return Protect(worker, held=True) if up.held is False else None


def _wind_up(
    worker: Worker, lease: Lease, over: EndReason, seen: Observation | None, now: datetime
) -> Action | datetime | None:
    live = [r.renewed_at + REGISTRATION_LIFE for r in _living(worker, now) if r.allocation_id == lease.id]
    if _unmarked(worker, seen):
        return OwnCache(
            worker, lease.owner
        )  # its holder did not have to wait for this, and whoever comes next must know
    up = _up(worker, seen)
    if not live:
        if up:  # with the end of the lease, or the next one would be led in before it is seen whose the cache is
            worker = worker.with_status(cache_owner=up.cache_owner)
        ended = EndedLease(
            token_sha256=lease.token_sha256,
            ended_at=lease.over_since(),
            reason=over,
            message=lease.end_message,
        )
        down = Phase.FAILED if worker.status.failures else Phase.PENDING
        return Finish(worker, ended, Phase.IDLE if up else down)
    if worker.status.phase is not Phase.DRAINING:
        return Report(worker.with_status(phase=Phase.DRAINING, message=f"the lease is {over}; builds may finish"))
    return min(live)


def _unmarked(worker: Worker, seen: Observation | None) -> bool:
    """Whether there is a cache that may have been used, without a mark of its owner; ready just now or not."""
    if seen is None or seen.worker_uid != worker.uid or seen.state is Running.EXITED:
        return False
    return seen.ephemeral and seen.cache_owner is None


def _living(worker: Worker, now: datetime) -> list[GatewayRegistration]:
    """The registrations that have not run out."""
    return [entry for entry in worker.status.gateways if entry.renewed_at + REGISTRATION_LIFE > now]


def _idle(worker: Worker, seen: Observation | None, now: datetime) -> Action | datetime | None:
    up = _up(worker, seen)
    if up is None:
        return _bring_up(worker, seen, None, now)
    if up.held:
        return Protect(worker, held=False)
    return _report(worker, up, Phase.IDLE, now, worker.status.failures)


def _up(worker: Worker, seen: Observation | None) -> Observation | None:
    """What is seen, if that is this worker's own buildkitd, and it is ready."""
    return seen if seen and seen.state is Running.READY and seen.worker_uid == worker.uid else None


def _bring_up(worker: Worker, seen: Observation | None, owner: str | None, now: datetime) -> Action | datetime:
    """Starts what is down: at once after a reboot, with a growing pause after failures."""
    if seen is not None and seen.state is Running.EXITED and worker.status.endpoint is not None:
        return Report(failed(worker, failure_message(worker, seen.message, seen.log_tail), now))
    if worker.status.failed_at is not None and worker.status.failures:
        retry_at = worker.status.failed_at + min(BACKOFF * (1 << (worker.status.failures - 1)), BACKOFF_MAX)
        if now < retry_at:
            return retry_at
    return Start(worker, owner)


def failure_message(worker: Worker, message: str, log_tail: str) -> str:
    """Composes the text about a failure that is written on the worker, where everybody with access to it reads it.

    The log tail may tell of the build of the last holder. While they hold the worker, they read it. After their lease
    it is left out. A worker whose cache was never used has no build to tell of, so its log tail is shown as well.

    Args:
        worker: The worker as it is stored.
        message: What happened, without text from buildkitd's log.
        log_tail: The last lines of buildkitd's log; empty if there are none.
    """
    used_by_somebody_else = worker.lease is None and worker.status.cache_owner is not None
    if not log_tail or used_by_somebody_else:
        return message
    return f"{message}\nThe end of its log:\n{log_tail}"


def failed(worker: Worker, message: str, now: datetime) -> Worker:
    """The worker with one failure more.

    Args:
        worker: The worker as it is stored.
        message: The text from `failure_message`.
        now: The time.
    """
    ready_at = worker.status.ready_at
    was_stable = worker.status.endpoint is not None and ready_at is not None and now - ready_at >= STABLE
    return worker.with_status(
        phase=Phase.FAILED if worker.lease is None else Phase.PROVISIONING,
        endpoint=None,
        pod_ip=None,
        failures=1 if was_stable else min(worker.status.failures + 1, 20),
        failed_at=now,
        message=message,
    )


def _report(worker: Worker, seen: Observation, phase: Phase, now: datetime, failures: int) -> Report | None:
    """A status write, if the stored status is not what is seen."""
    status = worker.status
    is_so = {
        "phase": phase,
        "endpoint": seen.endpoint,
        "cache_owner": seen.cache_owner,
        "ephemeral_cache": seen.ephemeral,
        "pod_name": seen.pod_name,
        "pod_ip": seen.pod_ip,
    }
    if all(getattr(status, field) == value for field, value in is_so.items()):
        return None
    ready_at = status.ready_at if status.endpoint is not None else now
    return Report(worker.with_status(**is_so, ready_at=ready_at, failures=failures, message=""))


def finished(action: Finish, now: datetime) -> Worker:
    """The worker's status after a lease, before the lease is taken off its spec."""
    status = action.worker.status
    known = any(past.token_sha256 == action.ended.token_sha256 for past in status.ended)
    return action.worker.with_status(
        phase=action.phase,
        last_activity_at=now,
        allocation_count=status.allocation_count + (not known),
        gateways=(),
        ended=status.ended if known else (*status.ended, action.ended)[-REMEMBERED:],
        message="",
    )


def _surplus(snapshot: Snapshot, now: datetime) -> tuple[list[Worker], list[datetime]]:
    """Idle workers that are too many, and when the next one will be."""
    scaling = snapshot.pool.spec.scaling
    unheld = sorted((w for w in snapshot.workers if w.lease is None), key=last_used)
    ending = snapshot.pool.metadata.deletion_timestamp
    gone = [w for w in unheld if ending or w.metadata.deletion_timestamp or w.slot.number >= scaling.max]
    rest = [w for w in unheld if w not in gone]
    spare = rest[: max(0, len(rest) - scaling.min)]
    over_at = {w.key: _unheld_since(w, now) + scaling.scale_down_delay for w in spare}
    gone += [w for w in spare if over_at[w.key] <= now]
    return gone, [at for at in over_at.values() if at > now]


def _unheld_since(worker: Worker, now: datetime) -> datetime:
    return worker.status.last_activity_at or worker.metadata.creation_timestamp or now


def _floor(snapshot: Snapshot, spent: Sequence[Slot]) -> Iterator[Create]:
    """Workers to make so that `scaling.min` stand ready beside the leased ones, within `scaling.max`."""
    if snapshot.pool.metadata.deletion_timestamp:
        return
    unheld = sum(w.lease is None for w in snapshot.workers)
    taken = {*snapshot.busy, *spent}
    for _ in range(snapshot.pool.spec.scaling.min - unheld - len(snapshot.busy - {w.slot for w in snapshot.workers})):
        slot = free_slot(snapshot.pool, snapshot.workers, snapshot.caches, taken=taken)
        if slot is None:
            return
        taken.add(slot)
        yield Create(slot)


def strays(observed: Iterable[Slot], workers: Iterable[Worker], busy: Iterable[Slot]) -> list[Slot]:
    """Slots in which something runs although no worker stands there: its object was deleted."""
    return sorted(set(observed) - {w.slot for w in workers} - set(busy))


@dataclass(frozen=True, slots=True)
class PoolSetting:
    """What is to be told of a pool beside its workers."""

    endpoint: str
    """Where its gateway is reached."""
    ignored: Sequence[str] = ()
    """The fields of its spec that nothing reads here."""
    capacity: int | None = None
    """The workers of all pools that can run here at once; None: no such bound."""
    trouble: str = ""
    """Why its gateway is not as it should be."""


def pool_status(pool: Pool, workers: Iterable[Worker], setting: PoolSetting, now: datetime) -> PoolStatus:
    """What to tell of a pool: its counts, what is wrong with it, and the fields of its spec that nothing reads."""
    workers = tuple(workers)
    failing = next((w for w in workers if w.status.phase is Phase.FAILED), None)
    trouble = f"{failing.key.name}: {failing.status.message}" if failing else setting.trouble
    ignored = ", ".join(f"spec.{name}" for name in setting.ignored)
    conditions = [
        _condition(pool, now, "IgnoredFields", good="False", message=ignored),
        _condition(pool, now, "Ready", good="True", message=trouble),
    ]
    if setting.capacity is not None:
        beyond = _beyond(pool, setting.capacity)
        conditions.append(_condition(pool, now, "Capacity", good="True", message=beyond))
    return pool.status.but(
        phase="Degraded" if trouble else "Ready",
        observed_generation=pool.metadata.generation,
        endpoint=setting.endpoint,
        conditions=tuple(conditions),
        connections=sum(entry.connections for worker in workers for entry in _living(worker, now)),
        **counts(workers),
    )


def _beyond(pool: Pool, capacity: int) -> str:
    most = pool.spec.scaling.max
    if most <= capacity:
        return ""
    return f"spec.scaling.max is {most}, and this cluster has host ports for {capacity} workers (kind-config.yaml)"


def counts(workers: Iterable[Worker]) -> dict[str, int]:
    """How many workers there are, answer, stand idle and are leased."""
    workers = tuple(workers)
    return {
        "workers": len(workers),
        "ready": sum(w.status.endpoint is not None for w in workers),
        "idle": sum(w.lease is None and w.status.phase is Phase.IDLE for w in workers),
        "allocated": sum(w.lease is not None for w in workers),
    }


_REASONS = {"IgnoredFields": "NotImplemented", "Ready": "NotAsWanted", "Capacity": "TooFewHostPorts"}


def _condition(pool: Pool, now: datetime, kind: str, *, good: Literal["True", "False"], message: str) -> Condition:
    """A condition that is as it should be where there is no message."""
    status: Literal["True", "False"] = good if not message else "False" if good == "True" else "True"
    before = next((c for c in pool.status.conditions if c.type == kind), None)
    since = before.last_transition_time if before and before.status == status else now
    reason = _REASONS[kind] if message else "AsWanted"
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since)
