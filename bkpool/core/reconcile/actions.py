"""The actions that `decide` may ask for, one class each.

They are plain values. The controller carries them out; nothing here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from bkpool.core.names import Slot
from bkpool.core.worker import EndedLease, EndReason, Worker, WorkerStatus


@dataclass(frozen=True, slots=True)
class CreateWorker:
    """Create a worker object in an empty slot, so that enough idle workers are ready."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class StartDaemon:
    """Start buildkitd with a cache of this owner (None: nobody has leased the worker yet)."""

    worker: Worker
    owner: str | None


@dataclass(frozen=True, slots=True)
class SetCacheOwner:
    """Record the owner of a clean cache."""

    worker: Worker
    owner: str


@dataclass(frozen=True, slots=True)
class SetProtection:
    """Ask the cluster not to evict the worker, or allow it again."""

    worker: Worker
    protected: bool


@dataclass(frozen=True, slots=True)
class WipeCache:
    """Stop buildkitd in the slot and delete its cache, because no other owner may get it."""

    slot: Slot


@dataclass(frozen=True, slots=True)
class StopDaemon:
    """End buildkitd with everything that runs in it, because the lease was revoked or the spec changed.

    Unless the lease was revoked, the worker is taken out of use first, by compare-and-swap: if somebody leases it or
    connects meanwhile, it runs on.
    """

    worker: Worker


@dataclass(frozen=True, slots=True)
class CheckDaemon:
    """Ask buildkitd whether it answers, because somebody else heard nothing from it. If it does, note that."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class ReplaceDaemon:
    """Note that buildkitd has failed, and end it with everything that runs in it. Afterwards it is started again."""

    worker: Worker
    message: str
    """Why."""


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Store the status that this copy of the worker has."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class ForgetLogs:
    """Forget the log tails of leases that were lost: their cache, and the log with it, is deleted."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class LoseLease:
    """End the lease: as lost, because its worker cannot be kept running, or for another reason."""

    worker: Worker
    message: str
    reason: EndReason = EndReason.LOST


@dataclass(frozen=True, slots=True)
class FinishLease:
    """Take an ended lease off its worker and remember it. No gateway has a connection of it any more."""

    worker: Worker
    """As it is stored."""
    ended: EndedLease
    status: WorkerStatus | None = None
    """Must be stored before the lease leaves the worker; None: the stored one will do."""


@dataclass(frozen=True, slots=True)
class RemoveWorker:
    """Delete the worker object and stop buildkitd. The slot keeps its cache."""

    worker: Worker


Action = (
    CreateWorker
    | StartDaemon
    | SetCacheOwner
    | SetProtection
    | WipeCache
    | StopDaemon
    | CheckDaemon
    | ReplaceDaemon
    | WriteStatus
    | ForgetLogs
    | LoseLease
    | FinishLease
    | RemoveWorker
)


def slot_of_action(action: Action) -> Slot:
    """The slot that the action changes."""
    return action.slot if isinstance(action, CreateWorker | WipeCache) else action.worker.slot


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, at most one action for each slot, and when to decide again."""

    actions: tuple[Action, ...]
    wake_at: datetime | None = None
    """When time alone changes the decision, if nothing else changes before; None: never."""
    unfinished: bool = False
    """There is more to do now than this. What is here can be carried out already."""

    @property
    def free_starts(self) -> int:
        """How many workers without a lease it starts."""
        return sum(isinstance(action, StartDaemon) and action.worker.lease is None for action in self.actions)
