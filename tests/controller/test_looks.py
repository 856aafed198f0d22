"""Whatever changes meanwhile, the plan of a pool comes to its end, and a revoked lease is ended soon."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from bkpool.controller.looks import AT_ONCE
from bkpool.controller.pool_states import PoolStates
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState, Observation
from bkpool.core.reconcile.actions import Action, CreateWorker, StopDaemon
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.wall_clock import ClockReading
from bkpool.core.worker import EndReason, Phase, Worker
from bkpool.store.mirror import Mirror
from support.no_store import NoStore
from support.objects import NOW, lease, pool, seen, worker
from support.world import MemoryWorkers

pytestmark = [pytest.mark.slow, pytest.mark.any_python]

BIG = Key("default", "p")


class Rounds:
    """A controller's rounds over pools that change all the time. No action is carried out."""

    def __init__(self, workers: int, small_pools: int = 0) -> None:
        store: Any = NoStore()
        self.mirror, self.runtime = Mirror(store), MemoryWorkers()
        self.mirror.apply(pool(scaling={"min": 0, "max": workers}))
        for number in range(small_pools):
            small = pool(scaling={"min": 0, "max": 20})
            self.mirror.apply(small.but(metadata=small.metadata.but(name=f"small-{number}", uid=f"uid-{number}")))
        self.states = PoolStates(self.mirror, self.runtime, self.runtime)
        self.states.follow(lambda: None)
        self.count = 0
        self.finished: list[int] = []
        """The rounds in which a plan of the big pool was finished."""
        self.most_slots = 0
        """The most slots that one round has taken over or looked at."""

    def round(self) -> list[Action]:
        """One more round. Returns what is to be done in the big pool."""
        actions: list[Action] = []
        reading = ClockReading(NOW + timedelta(milliseconds=10) * self.count, self.count / 100)
        for key, state in self.states.take_over(reading).items():
            plan = state.plan(Moment(reading.wall, self.states.registrations.at(NOW, reading.seconds)), AT_ONCE)
            if plan.unfinished:
                self.states.plan_unfinished(key)
            elif key == BIG:
                self.finished.append(self.count)
            actions += plan.actions if key == BIG else ()
        self.count += 1
        return actions

    @property
    def longest_pause(self) -> int:
        """How many rounds there were at most between two finished plans, or without any."""
        edges = [0, *self.finished, self.count]
        return max(after - before for before, after in itertools.pairwise(edges))


def all_slots(workers: int) -> Iterator[Slot]:
    """The big pool's slots again and again."""
    while True:
        yield from (Slot(*BIG, number) for number in range(workers))


def test_a_large_pool_is_planned_although_it_and_many_small_ones_change_all_the_time():
    """Without looks that end, it was planned once in 1,000 rounds."""
    rounds, slots = Rounds(1000, small_pools=49), all_slots(1000)
    small = itertools.cycle(Slot("default", f"small-{n % 49}", n % 20) for n in range(49 * 20))
    for _ in range(1200):
        for _ in range(12):
            rounds.states.slot_changed(next(slots))
            rounds.states.slot_changed(next(small))
        rounds.round()
    parts = 1000 / AT_ONCE
    each = 2 * parts + 4  # the slots are taken over, and then looked at
    assert rounds.longest_pause <= 2 * each, "each other round is of the small pools"


@pytest.fixture
def busy() -> Rounds:
    """3,000 workers, of which a third is leased."""
    rounds = Rounds(3000)
    for number in range(3000):
        rounds.mirror.apply(leased(number) if number % 3 == 0 else worker(number))
        rounds.runtime.daemons[Slot(*BIG, number)] = seen(number, "owner-a")
    for _ in range(400):
        rounds.round()
    assert rounds.finished
    return rounds


def leased(number: int, **changes: Any) -> Worker:
    return worker(number, lease(id=f"lease-{number}", **changes), phase=Phase.ALLOCATED, cache_owner="owner-a")


@pytest.mark.parametrize("number", [0, 1500, 2997])
def test_a_revoked_lease_is_ended_soon_although_3000_workers_change_all_the_time(busy, number):
    slots = all_slots(3000)
    for _ in range(50):
        change(busy, slots)
    over = leased(number, ended_at=NOW, end_reason=EndReason.REVOKED)
    busy.mirror.apply(over.but(metadata=over.metadata.but(resource_version="2")))
    parts = -(-3000 // AT_ONCE)
    decided: set[Slot] = set()
    for _ in range(3 * parts + 10):  # the rest of a look, its plan, and the look that has the slot
        decided |= {action.worker.slot for action in change(busy, slots) if isinstance(action, StopDaemon)}
        if decided:
            break
    assert decided == {Slot(*BIG, number)}


def change(rounds: Rounds, slots: Iterator[Slot]) -> list[Action]:
    """A round in which more slots have changed than it takes over."""
    for _ in range(2 * AT_ONCE):
        rounds.states.slot_changed(next(slots))
    return rounds.round()


def test_a_slot_is_left_alone_until_what_an_action_did_there_was_taken_over():
    """Its plan is unfinished, so the pool does not look at the slot as it is now yet."""
    rounds = Rounds(200)
    for number in range(3 * AT_ONCE):
        rounds.runtime.daemons[Slot(*BIG, number)] = Observation("gone", DaemonState.READY, "unix:///x", None)
        rounds.states.slot_changed(Slot(*BIG, number))
    rounds.round()
    state = rounds.states.take_over(ClockReading(NOW, 0))[BIG]
    assert state.taking_over
    state.plan(Moment(NOW), AT_ONCE)
    stray = Slot(*BIG, 0)
    assert stray in state.strays
    rounds.states.action_began(stray)
    assert stray not in state.strays
    del rounds.runtime.daemons[stray]
    rounds.states.action_ended(stray)
    while rounds.states.has_more:
        rounds.round()
        assert stray not in state.strays


def test_workers_are_created_when_all_slots_of_the_pool_are_known():
    rounds = Rounds(100)
    larger = pool(scaling={"min": 3 * AT_ONCE, "max": 3 * AT_ONCE})
    rounds.mirror.apply(larger.but(metadata=larger.metadata.but(resource_version="2")))
    for number in range(3 * AT_ONCE - 1):
        rounds.mirror.apply(worker(number))
    actions: list[Action] = []
    while rounds.states.has_more and not rounds.finished:
        actions += rounds.round()
    created = {action.slot for action in actions if isinstance(action, CreateWorker)}
    assert created == {Slot(*BIG, 3 * AT_ONCE - 1)}
