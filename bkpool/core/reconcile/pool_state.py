"""One pool as its controller knows it, kept up to date change by change, and what to do for it next.

What a plan costs follows from what has changed or is due since the last one, and it can be made in parts.
`decide` makes a new state from a whole snapshot; both give the same plan. Nothing here does I/O or reads a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum, auto
from heapq import nsmallest
from itertools import islice
from typing import TypeVar

from bkpool.core.names import Slot
from bkpool.core.observation import Observation, SeenCache
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import Action, CreateWorker, Plan, RemoveWorker, StartDaemon, StopDaemon, WipeCache
from bkpool.core.reconcile.due_times import DueTimes
from bkpool.core.reconcile.empty_slots import EmptySlots
from bkpool.core.reconcile.free_workers import FreeWorkers
from bkpool.core.reconcile.pool_counts import PoolCounts
from bkpool.core.reconcile.replacing import IdleDaemons
from bkpool.core.reconcile.slot_step import NO_STEP, Moment, Step, next_step, wind_up_step
from bkpool.core.reconcile.unneeded_caches import SpareCaches
from bkpool.core.removal import last_lease_at, removal_of
from bkpool.core.worker import Worker

T = TypeVar("T")


class Spec(Enum):
    """What is known of a pool's spec."""

    KNOWN = auto()
    UNREADABLE = auto()
    """Ended leases leave their workers, and nothing else happens: nobody knows which workers it should have."""
    MISSING = auto()
    """There is no such pool here: it was deleted, or is only not known yet. Nothing happens."""


@dataclass(slots=True)
class _LastPlan:
    acted: set[Slot] = field(default_factory=set)
    """The slots for which it had an action, also in its earlier parts."""
    wiped: set[Slot] = field(default_factory=set)
    replaced: set[Slot] = field(default_factory=set)
    unfinished: bool = False


class PoolState:
    """The pool, and for each of its slots the worker, what runs there, the cache, and whether an action is under way.

    Args:
        pool: The pool, or an object with its name while nothing else is known of it.
        spec: What is known of its spec.
    """

    def __init__(self, pool: Pool, spec: Spec = Spec.KNOWN) -> None:
        self.pool = pool
        self.spec = spec
        self.taking_over = False
        """Some slots that have changed are not taken over yet, so nothing is planned that depends on their number."""
        self.counts = PoolCounts()
        self.caches = SpareCaches()
        self._workers: dict[Slot, Worker] = {}
        self._observed: dict[Slot, Observation] = {}
        self._cached: dict[Slot, str | None] = {}
        self._busy: set[Slot] = set()
        self._unreadable: frozenset[Slot] = frozenset()
        self._stray: set[Slot] = set()
        self._being_created: set[Slot] = set()
        self._changed: dict[Slot, None] = {}
        self._moved: dict[Slot, None] = {}
        """The slots whose place among the idle daemons is not known yet."""
        self._waiting: dict[Slot, None] = {}
        """The slots whose next step is not known yet."""
        self._free = FreeWorkers()
        self._empty = EmptySlots(pool.spec.scaling.max)
        self._idle = IdleDaemons()
        self._starts: dict[Slot, StartDaemon] = {}
        """Of workers without a lease. Only as many as may begin are in a plan."""
        self._deadlines: DueTimes[Slot] = DueTimes()
        self._last = _LastPlan()

    # --- what has changed -------------------------------------------------------------------------------------------

    def set_pool(self, pool: Pool, spec: Spec = Spec.KNOWN) -> None:
        """Takes over the pool as it is now. All slots are looked at again, unless only its status has changed."""
        before, spec_before = self.pool, self.spec
        self.pool, self.spec = pool, spec
        if before is pool and spec_before is spec:
            return
        if spec_before is not spec or before.spec != pool.spec or _decisive(before) != _decisive(pool):
            self._empty.resize(pool.spec.scaling.max)
            self.look_at_everything()

    def set_worker(self, slot: Slot, worker: Worker | None) -> None:
        """Takes over the slot's worker as it is now; None: it has none, or one that cannot be read."""
        _put(self._workers, slot, worker)
        self._changed[slot] = None

    def set_observation(self, slot: Slot, seen: Observation | None) -> None:
        """Takes over what the runtime sees in the slot; None: it is empty."""
        if self._observed.get(slot) != seen:
            _put(self._observed, slot, seen)
            self._changed[slot] = None

    def set_cache(self, slot: Slot, cache: SeenCache | None) -> None:
        """Takes over the slot's cache; None: it has none."""
        if cache is None:
            self._cached.pop(slot, None)
        else:
            self._cached[slot] = cache.owner
        self._changed[slot] = None

    def set_busy(self, slot: Slot, *, busy: bool) -> None:
        """Notes that an action in the slot has begun or ended. While it runs, nothing is decided about the slot."""
        (self._busy.add if busy else self._busy.discard)(slot)
        self._changed[slot] = None

    def set_unreadable(self, slots: Collection[Slot]) -> None:
        """Takes over in which slots there is a worker that cannot be read: nothing is done there."""
        self._changed |= dict.fromkeys(self._unreadable ^ frozenset(slots))
        self._unreadable = frozenset(slots)

    def look_at_everything(self) -> None:
        """Makes the next plan look at every slot, because the spec has changed or a clock has jumped."""
        self._changed |= dict.fromkeys(self.slots)

    @property
    def slots(self) -> set[Slot]:
        """The slots in which there is something."""
        return {*self._workers, *self._observed, *self._cached, *self._busy, *self._unreadable}

    def is_empty(self, slot: Slot) -> bool:
        """Whether nothing is in a slot."""
        return slot not in self._workers and slot not in self._observed and slot not in self._cached

    # --- what follows -----------------------------------------------------------------------------------------------

    @property
    def has_outdated(self) -> bool:
        """Whether a daemon without a lease was started with an earlier spec, and may have to wait for its end."""
        return self._idle.has_outdated

    @property
    def wanted_starts(self) -> int:
        """How many workers without a lease the last plan would have started if all might start at once."""
        return len(self._starts)

    @property
    def has_workers(self) -> bool:
        """Whether it has a worker that can be read."""
        return bool(self._workers)

    @property
    def is_gone(self) -> bool:
        """Whether nothing is left of the pool, so that the pool itself can be deleted if it is being removed."""
        return not (self._workers or self._unreadable or self._busy or self._observed or self._cached)

    @property
    def strays(self) -> list[Slot]:
        """Slots in which something runs although they have no worker: the object was deleted.

        A worker that exists and cannot be read is there, so what runs in its slot is no stray.
        """
        return sorted(self._stray - self._busy - self._changed.keys())

    def plan(self, moment: Moment, at_most: int | None = None) -> Plan:
        """What to do now, at most one action for each slot, and when to plan again if nothing changes before.

        Args:
            moment: The time, and what depends on it.
            at_most: How many slots are looked at. If more are to be looked at, the plan is unfinished: the next one
                goes on with them. None: all.

        A worker with a lease is looked at as soon as its slot was taken over: its next step does not follow from the
        others. So a lease that is revoked does not wait for a large pool, and the start of a worker that is leased
        waits for no other start.
        """
        known, more_at, wiped, replaced = self.spec is Spec.KNOWN, None, set[Slot](), set[Slot]()
        if not self._last.unfinished:  # what was not carried out is decided again
            self._waiting |= dict.fromkeys(self._last.acted)
            self._last = replace(self._last, acted=set(), unfinished=True)
        actions = self._take_changed(moment, at_most)
        if self._changed or self.taking_over:
            return _unfinished(actions)
        if known:
            moved, more_at = self._free.mark_surplus(self.pool.spec.scaling, moment.now)
            self._moved |= dict.fromkeys(moved)
            self._waiting |= dict.fromkeys(moved)
        for slot in _take(self._moved, at_most):
            stays = self._workers.get(slot) if known and self._free.keeps(slot) else None
            self._idle.put(slot, stays, self._observed.get(slot), busy=slot in self._busy)
        if self._moved:
            return _unfinished(actions)
        if known:
            wiped, more_to_wipe_at = self._to_wipe(moment)
            more_at = min(filter(None, (more_at, more_to_wipe_at)), default=None)
            replaced = self._idle.to_replace(self._free.kept, moment.restarts_left)
        self._note_again(moment.now, wiped, replaced)
        left = None if at_most is None else at_most - len(actions)
        for slot in _take(self._waiting, left):
            self._put_step(slot, self._step(slot, moment), actions)
        self._last.unfinished = bool(self._waiting) or self._put_starts(moment.starts_left, at_most, actions)
        if self._last.unfinished:
            return _unfinished(actions)
        return self._with_new_workers(actions, more_at, at_most)

    def _take_changed(self, moment: Moment, at_most: int | None) -> dict[Slot, Action]:
        """Puts slots that have changed into their places. Returns what to do for those of them that are leased."""
        ends, actions = self._ends, dict[Slot, Action]()
        for slot in _take(self._changed, at_most):
            self._classify(slot, ends=ends)
            worker = self._workers.get(slot)
            if worker is not None and worker.lease is None:
                self._moved[slot] = self._waiting[slot] = None
                continue
            self._idle.put(slot, None, None, busy=False)
            self._moved.pop(slot, None)
            if worker is None:
                self._waiting[slot] = None
            else:
                self._waiting.pop(slot, None)
                self._put_step(slot, self._own_step(slot, worker, moment), actions)
        return actions

    def _put_step(self, slot: Slot, step: Step, actions: dict[Slot, Action]) -> None:
        self._deadlines.put(slot, step.look_again_at)
        self._starts.pop(slot, None)
        if isinstance(step.action, StartDaemon) and step.action.worker.lease is None:
            self._starts[slot] = step.action
        elif step.action is not None:
            actions[slot] = step.action
            self._last.acted.add(slot)

    def _put_starts(self, starts_left: int, at_most: int | None, actions: dict[Slot, Action]) -> bool:
        """Starts workers without a lease, the lowest numbers first. Returns whether more follow in the next part."""
        may = nsmallest(max(0, starts_left), self._starts, key=_number)
        new = [slot for slot in may if slot not in self._last.acted]
        now = new if at_most is None else new[: max(0, at_most - len(actions))]
        actions |= {slot: self._starts[slot] for slot in now}
        self._last.acted.update(now)
        return len(now) < len(new)

    def _note_again(self, now: datetime, wiped: set[Slot], replaced: set[Slot]) -> None:
        """Notes the slots that are to be looked at although they have not changed."""
        last = self._last
        again = self._deadlines.due(now) | (wiped ^ last.wiped) | (replaced ^ last.replaced)
        self._waiting |= dict.fromkeys(again)
        self._last = _LastPlan(last.acted, wiped, replaced)

    def _with_new_workers(self, actions: dict[Slot, Action], more_at: datetime | None, at_most: int | None) -> Plan:
        """The plan with these actions, and with the workers that are to be created."""
        missing = self._missing(self._last.wiped) if self.spec is Spec.KNOWN else []
        created = missing[:at_most]
        wake_at = min(filter(None, (self._deadlines.first, more_at)), default=None)
        return Plan(
            (*_ordered(actions), *map(CreateWorker, created)), wake_at, unfinished=len(missing) > len(created)
        )

    def _step(self, slot: Slot, moment: Moment) -> Step:
        """The next step for one slot."""
        worker = self._workers.get(slot)
        if slot in self._last.wiped:
            return Step(WipeCache(slot))
        if worker is None:
            return NO_STEP
        if self.spec is Spec.KNOWN and slot not in self._busy:
            if self._free.is_too_many(slot):
                return Step(RemoveWorker(worker))
            if slot in self._last.replaced:
                return Step(StopDaemon(worker))
        return self._own_step(slot, worker, moment)

    def _own_step(self, slot: Slot, worker: Worker, moment: Moment) -> Step:
        """The next step for a worker if nothing follows from the other ones; with a lease, nothing does."""
        if slot in self._busy or self.spec is Spec.MISSING:
            return NO_STEP
        seen = self._observed.get(slot)
        if self.spec is Spec.UNREADABLE:
            return wind_up_step(worker, seen, moment)
        return next_step(worker, seen, self.pool, moment)

    def _classify(self, slot: Slot, *, ends: bool) -> None:
        """Puts a slot that has changed into the right place of each order and count."""
        worker, seen, unreadable = self._workers.get(slot), self._observed.get(slot), slot in self._unreadable
        free = worker if worker is not None and worker.lease is None else None
        doomed = ends or (free is not None and self._is_doomed(slot, free))
        self._free.put(slot, free, doomed=doomed)
        self._empty.put(slot.number, filled=worker is not None)
        self.counts.put(slot, worker)
        busy = slot in self._busy
        _mark(self._stray, slot, seen is not None and worker is None and not busy and not unreadable)
        _mark(self._being_created, slot, worker is None and busy)
        cache = SeenCache(self._cached[slot]) if slot in self._cached else None
        self.caches.put(slot, cache, seen, worker, unreadable=unreadable)

    def _is_doomed(self, slot: Slot, worker: Worker) -> bool:
        """Whether a worker without a lease is removed at once."""
        return worker.metadata.deletion_timestamp is not None or slot.number >= self.pool.spec.scaling.max

    @property
    def _ends(self) -> bool:
        return self.pool.metadata.deletion_timestamp is not None or removal_of(self.pool) is not None

    def _to_wipe(self, moment: Moment) -> tuple[set[Slot], datetime | None]:
        leases = self.counts.workers.allocated
        last_lease = last_lease_at(self.pool, self.counts.last_end, leases, moment.now)
        return self.caches.to_wipe(self.pool, self._busy, leases, last_lease, moment.now)

    def _missing(self, wiped: Collection[Slot]) -> list[Slot]:
        """The slots to create workers in, so that `scaling.min` workers are idle, within `scaling.max` in all."""
        if self._ends:
            return []
        wanted = self.pool.spec.scaling.min - len(self._free) - len(self._being_created)
        if wanted <= 0:
            return []
        taken = {*self._busy, *self._unreadable, *wiped}
        return self._empty.first(wanted, self.pool.key, self._cached, taken)


def _put(found: dict[Slot, T], slot: Slot, value: T | None) -> None:
    if value is None:
        found.pop(slot, None)
    else:
        found[slot] = value


def _ordered(actions: dict[Slot, Action]) -> Iterator[Action]:
    return (actions[slot] for slot in sorted(actions, key=_number))


def _unfinished(actions: dict[Slot, Action]) -> Plan:
    return Plan(tuple(_ordered(actions)), unfinished=True)


def _number(slot: Slot) -> int:
    return slot.number


def _take(slots: dict[Slot, None], at_most: int | None) -> list[Slot]:
    """Removes the first ones and returns them."""
    taken = list(islice(slots, at_most))
    if len(taken) == len(slots):
        slots.clear()
    else:
        for slot in taken:
            del slots[slot]
    return taken


def _mark(slots: set[Slot], slot: Slot, belongs: bool) -> None:
    (slots.add if belongs else slots.discard)(slot)


def _decisive(pool: Pool) -> tuple[object, ...]:
    """What of a pool's metadata decisions follow."""
    return pool.uid, pool.metadata.deletion_timestamp, pool.metadata.annotations
