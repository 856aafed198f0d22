"""Keeps the state of every pool (`core.reconcile.pool_state`) as the mirror, the daemons and the caches change.

A change is only noted when it comes. The states take it over in one of the next rounds, so that many changes of one
slot cost one. It decides nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timedelta

from bkpool.controller.looks import Looks, LookStage, pool_of
from bkpool.core.names import Key, Slot, slot_of
from bkpool.core.pool import Pool
from bkpool.core.reconcile.announcements import Announcements
from bkpool.core.reconcile.due_times import DueTimes
from bkpool.core.reconcile.later_writes import SeenLeases
from bkpool.core.reconcile.pool_state import PoolState, Spec
from bkpool.core.reconcile.undelivered import UndeliveredLeases
from bkpool.core.registrations import SeenRegistrations
from bkpool.core.resource import Metadata
from bkpool.core.wall_clock import ClockReading
from bkpool.store.mirror import Mirror, MirrorChange
from bkpool.workers import Caches, Daemons

CHECK_INTERVAL = timedelta(minutes=1)
"""A slot of which nothing was reported is looked at again after this time, in case a report was lost (rule 14,
docs/rules.md#r14)."""
_SPREAD = 30
"""Slots with other numbers are looked at again up to so many seconds later, so that not all come at once."""


class PoolStates:
    """The states of all pools that exist, or of which something is left.

    Args:
        mirror: Has pools and workers.
        daemons: Know what runs in each slot.
        caches: Know the cache of each slot.
    """

    def __init__(self, mirror: Mirror, daemons: Daemons, caches: Caches) -> None:
        self.registrations = SeenRegistrations()
        self.undelivered = UndeliveredLeases()
        self.leases = SeenLeases()
        self.announcements = Announcements()
        self._mirror = mirror
        self._daemons = daemons
        self._caches = caches
        self._states: dict[Key, PoolState] = {}
        self._deleted: dict[Key, Pool] = {}
        self._looks = Looks()
        self._ended: set[Slot] = set()
        """Slots in which an action has ended, and which were not taken over since."""
        self._heartbeats: set[Key] = set()
        self._due: DueTimes[Key] = DueTimes()
        self._checks: DueTimes[Slot] = DueTimes()
        self._on_change: Callable[[], None] = lambda: None

    def follow(self, on_change: Callable[[], None]) -> ExitStack:
        """Begins to note changes, and notes everything that is there. Closing the stack ends it.

        Args:
            on_change: Called when there is something to take over.
        """
        self._on_change = on_change
        subscriptions = ExitStack()
        subscriptions.callback(self._daemons.on_change(self.slot_changed))
        subscriptions.callback(self._caches.on_change(self.slot_changed))
        subscriptions.callback(self._mirror.subscribe_afterwards(self._note))
        subscriptions.callback(self._mirror.heartbeats.subscribe(self._heartbeat_changed))
        self.note_everything()
        return subscriptions

    def note_everything(self) -> None:
        """Notes all pools and slots, whether they have changed or not."""
        self._note_everything()
        self._on_change()

    def _note_everything(self) -> None:
        for pool in (*self._mirror.pools, *self._mirror.unreadable_pools, *self._states):
            self._looks.note(pool)
        for worker in self._mirror.workers.values():
            self._looks.note_slot(worker.slot)
        for slot in (*self._daemons.observe(), *self._caches.owners()):
            self._looks.note_slot(slot)
        self._heartbeats |= self._mirror.heartbeats.known.keys()

    def slot_changed(self, slot: Slot) -> None:
        """Notes that a slot may have changed."""
        self._looks.note_slot(slot)
        self._on_change()

    def _heartbeat_changed(self, heartbeat: Key) -> None:
        """Notes a new heartbeat. It renews registrations, which puts off what is due, so no slot is looked at."""
        self._heartbeats.add(heartbeat)
        self._on_change()

    def pool_changed(self, pool: Key) -> None:
        """Notes that a pool may have changed."""
        self._looks.note(pool)
        self._on_change()

    def plan_unfinished(self, pool: Key) -> None:
        """Notes that the plan of a pool has more parts. What has changed meanwhile is for the next plan."""
        self._looks.plan_unfinished(pool)

    def pool_deleted(self, pool: Pool) -> None:
        """Notes that a pool is deleted, of which something is left. The object says so."""
        self._deleted[pool.key] = pool
        self.pool_changed(pool.key)

    def action_began(self, slot: Slot) -> None:
        """Notes that an action in the slot has begun. Nothing follows from that at once."""
        self._state(pool_of(slot)).set_busy(slot, busy=True)

    def action_ended(self, slot: Slot) -> None:
        """Notes that it has ended. Nothing is decided about the slot before it was taken over as it is now."""
        self._ended.add(slot)
        self.slot_changed(slot)  # the action may have changed more than is reported

    def look_at_everything(self) -> None:
        """Makes every pool look at all of its slots: the clock has jumped, so no time that was noted is right."""
        for pool, state in self._states.items():
            state.look_at_everything()
            self._looks.note(pool)
            for slot in state.slots:
                self._looks.note_slot(slot)
        self._heartbeats |= self._mirror.heartbeats.known.keys()

    def look_again_at(self, pool: Key, at: datetime | None) -> None:
        """Notes when a pool is to be looked at again if nothing changes before; None: never."""
        self._due.put(pool, at)

    @property
    def due_at(self) -> datetime | None:
        """When the next pool or slot is due."""
        return min(filter(None, (self._due.first, self._checks.first)), default=None)

    def restart_ended(self) -> None:
        """Notes that one of the daemons has started or stopped that all pools together may restart at once."""
        for key, state in self._states.items():
            if state.has_outdated:
                self.pool_changed(key)

    @property
    def has_more(self) -> bool:
        """Whether more was noted than the last round has taken over."""
        return self._looks.has_more

    def take_over(self, reading: ClockReading) -> dict[Key, PoolState]:
        """Takes over what has been noted, and the slots that were not looked at for `CHECK_INTERVAL`.

        It takes over as much as one round may cost. The rest comes in the next ones.

        Args:
            reading: The clocks.

        Returns:
            The states of the pools of this round, to be planned. One of which slots are left is `taking_over`.
        """
        for key in self._due.due(reading.wall):
            self._looks.note(key)
        for slot in self._checks.due(reading.wall):
            self._looks.note_slot(slot)
        heartbeats, self._heartbeats = self._heartbeats, set()
        for key in heartbeats:
            for pool in self._take_heartbeat(key, reading):
                self._looks.note(pool)
        changed: dict[Key, PoolState] = {}
        for part in self._looks.next_round():
            changed[part.pool] = state = self._state(part.pool)
            for slot in part.slots:
                self._take_slot(slot, reading)
            if part.stage is LookStage.TAKEN_OVER:
                self._take_pool(part.pool, state)
            state.taking_over = part.stage is LookStage.TAKING_OVER
        return changed

    def forget(self, pool: Key) -> None:
        """Forgets a pool that does not exist, and of which nothing is left."""
        self._states.pop(pool, None)
        self._deleted.pop(pool, None)

    def _note(self, change: MirrorChange) -> None:
        if change.slot is None:
            self.pool_changed(change.pool)
        else:
            self.slot_changed(change.slot)

    def _state(self, key: Key) -> PoolState:
        if key not in self._states:
            self._states[key] = PoolState(_unknown_pool(key), Spec.MISSING)
        return self._states[key]

    def _take_slot(self, slot: Slot, reading: ClockReading) -> None:
        state, key = self._state(pool_of(slot)), slot.worker
        worker = self._mirror.workers.get(key)
        self.registrations.look(key, worker, reading.seconds)
        self.undelivered.look(key, worker)
        self.leases.look(key, worker, reading.seconds)
        self.announcements.look(key, worker, reading.wall)
        state.set_worker(slot, worker)
        state.set_observation(slot, self._daemons.seen(slot))
        state.set_cache(slot, self._caches.cache(slot))
        if slot in self._ended:
            self._ended.discard(slot)
            state.set_busy(slot, busy=False)
        check_at = reading.wall + CHECK_INTERVAL + slot.number % _SPREAD * timedelta(seconds=1)
        self._checks.put(slot, None if state.is_empty(slot) else check_at)

    def _take_heartbeat(self, key: Key, reading: ClockReading) -> set[Key]:
        """Returns the pools whose number of connections may have changed."""
        heartbeat = self._mirror.heartbeats.known.get(key)
        slots = {slot_of(one) for one in self.registrations.look_at_heartbeat(key, heartbeat, reading.seconds)}
        for slot in slots:
            self._state(pool_of(slot)).counts.count_again(slot)
        return {pool_of(slot) for slot in slots}

    def _take_pool(self, key: Key, state: PoolState) -> None:
        state.set_unreadable(self._mirror.unreadable_slots(key))
        if (pool := self._mirror.pools.get(key)) is not None:
            self._deleted.pop(key, None)
            state.set_pool(pool)
        elif (found := self._mirror.unreadable_pools.get(key)) is not None:
            self._deleted.pop(key, None)
            state.set_pool(found.stand_in(Pool), Spec.UNREADABLE)
        elif key in self._deleted and state.has_workers:
            state.set_pool(self._deleted[key])
        else:  # if it gets a worker again, it may have been created again
            self._deleted.pop(key, None)
            state.set_pool(state.pool, Spec.MISSING)


def _unknown_pool(key: Key) -> Pool:
    """An object with only the name of a pool. The name is not checked: a pool that cannot be read may have any."""
    return Pool.model_construct(metadata=Metadata.model_construct(name=key.name, namespace=key.namespace))
