"""A pool's state that is kept by its changes gives the same plan, counts and strays as one made from scratch."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.names import ANNOTATION_REMOVE_CACHES, ANNOTATION_REMOVING, Slot, slot_of
from bkpool.core.observation import DaemonState, Observation, SeenCache, Silence, Snapshot
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import Action, CreateWorker, Plan, StopDaemon, slot_of_action
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.later_writes import SeenLeases
from bkpool.core.reconcile.pool_state import PoolState, Spec
from bkpool.core.reconcile.pool_status import PoolStatusInputs, pool_status
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.reconcile.undelivered import UndeliveredLeases
from bkpool.core.registrations import SeenRegistrations
from bkpool.core.resource import Metadata
from bkpool.core.worker import GatewayRegistration, Phase, Undelivered, Worker
from support.examples import examples
from support.objects import NOW, lease, pool, seen, slot, snapshot, worker

SLOTS = st.integers(0, 5)
OWNERS = st.sampled_from([None, "owner-a", "owner-b", "pool-uid"])
SECONDS = st.integers(-90, 90)
_MOST_PARTS = 40
INPUTS = PoolStatusInputs("tcp://gateway:1235")


def registration(gateway: str, now: datetime) -> GatewayRegistration:
    """Of the lease "one", with a heartbeat."""
    heartbeat = f"default/{gateway}"
    return GatewayRegistration(gateway=gateway, lease_id="one", renewed_at=now, connections=2, heartbeat=heartbeat)


@st.composite
def workers(draw: st.DrawFn, number: int, now: datetime) -> Worker:
    """Any worker of a slot."""

    def ago() -> datetime | None:
        return draw(st.none() | SECONDS.map(lambda seconds: now - timedelta(seconds=seconds)))

    held = None
    if draw(st.booleans()):
        held = lease(
            id=draw(st.sampled_from(["one", "two"])),
            now=now - timedelta(seconds=60),
            expires_at=now + timedelta(seconds=draw(SECONDS)),
            ended_at=ago(),
            undelivered=draw(st.none() | st.just(Undelivered(replica="api"))),
            token_sha256=draw(st.sampled_from(["", "digest"])),
            metadata=draw(st.sampled_from([{}, {"endWhenUnused": "true"}])),
        )
    entries = [registration(g, now) for g in "gh"]
    found = worker(
        number,
        held,
        phase=draw(st.sampled_from([Phase.IDLE, Phase.ALLOCATED, Phase.FAILED, Phase.PENDING, Phase.DRAINING])),
        cache_owner=draw(OWNERS),
        last_activity_at=ago(),
        failed_at=ago(),
        failures=draw(st.integers(0, 6)),
        silent_since=ago(),
        gateways=tuple(entries[: draw(st.integers(0, 2))]),
        ready_at=ago(),
    )
    return found.but(metadata=found.metadata.but(deletion_timestamp=draw(st.sampled_from([None, None, now]))))


@st.composite
def observations(draw: st.DrawFn, number: int) -> Observation:
    """Whatever a runtime may see in a slot."""
    silent = st.none() | SECONDS.map(lambda seconds: Silence(timedelta(seconds=abs(seconds) / 5)))
    return Observation(
        f"uid-{number}",
        draw(st.sampled_from(DaemonState)),
        f"unix:///{number}",
        draw(OWNERS),
        silence=draw(silent),
        outdated=draw(st.booleans()),
        reaches_other=draw(st.sampled_from([False, False, True])),
        protected=draw(st.sampled_from([None, True, False])),
        goes_unprotected=draw(st.sampled_from([False, False, True])),
    )


class Changes(RuleBasedStateMachine):
    """The same pool twice: kept by its changes, and as a whole."""

    @initialize()
    def start(self) -> None:
        self.now, self.seconds = NOW, 0.0
        self.pool: Pool = pool(scaling={"min": 1, "max": 4, "scaleDownDelay": "30s"})
        self.workers: dict[Slot, Worker] = {}
        self.observed: dict[Slot, Observation] = {}
        self.caches: dict[Slot, str | None] = {}
        self.busy: set[Slot] = set()
        self.unreadable: frozenset[Slot] = frozenset()
        self.registrations, self.undelivered, self.leases = SeenRegistrations(), UndeliveredLeases(), SeenLeases()
        self.restarts_left, self.starts_left = 4, 3
        self.put_off = False
        """Whether a heartbeat has put off what is due. Slots are looked at again at the time before that."""
        self.at_most: int | None = None
        self.early = 0
        """So many parts are planned before everything is known to be taken over."""
        self.state = PoolState(self.pool)
        self.known = True

    @rule(number=SLOTS, data=st.data(), there=st.booleans())
    def change_worker(self, number: int, data: st.DataObject, there: bool) -> None:
        slot = Slot("default", "p", number)
        self._put_worker(slot, data.draw(workers(number, self.now)) if there else None)

    def _put_worker(self, slot: Slot, found: Worker | None) -> None:
        if found is None:
            self.workers.pop(slot, None)
        else:
            self.workers[slot] = found
        self.registrations.look(slot.worker, found, self.seconds)
        self.undelivered.look(slot.worker, found)
        self.leases.look(slot.worker, found, self.seconds)
        self.state.set_worker(slot, found)

    @rule(number=SLOTS, used=st.none() | SECONDS, outdated=st.booleans())
    def settle(self, number: int, used: int | None, outdated: bool) -> None:
        """An idle worker for which there is nothing to do now."""
        slot = Slot("default", "p", number)
        at = None if used is None else self.now - timedelta(seconds=used)
        self._put_worker(slot, worker(number, last_activity_at=at))
        self._put_daemon(
            slot, Observation(f"uid-{number}", DaemonState.READY, f"unix:///{number}", None, outdated=outdated)
        )

    @rule(number=SLOTS, gateways=st.sampled_from(["g", "h", "gh"]))
    def use(self, number: int, gateways: str) -> None:
        """A worker with a lease that goes on, and with the registrations of these gateways."""
        entries = tuple(registration(gateway, self.now) for gateway in gateways)
        held = lease(id="one", now=self.now)
        self._put_worker(Slot("default", "p", number), worker(number, held, phase=Phase.ALLOCATED, gateways=entries))

    @rule(number=SLOTS, data=st.data(), there=st.booleans())
    def change_daemon(self, number: int, data: st.DataObject, there: bool) -> None:
        slot = Slot("default", "p", number)
        self._put_daemon(slot, data.draw(observations(number)) if there else None)

    def _put_daemon(self, slot: Slot, seen: Observation | None) -> None:
        if seen is None:
            self.observed.pop(slot, None)
        else:
            self.observed[slot] = seen
        self.state.set_observation(slot, seen)

    @rule(number=SLOTS, owner=OWNERS, there=st.booleans())
    def change_cache(self, number: int, owner: str | None, there: bool) -> None:
        slot = Slot("default", "p", number)
        if there:
            self.caches[slot] = owner
        else:
            self.caches.pop(slot, None)
        self.state.set_cache(slot, SeenCache(owner) if there else None)

    @rule(number=SLOTS, busy=st.booleans())
    def change_action(self, number: int, busy: bool) -> None:
        slot = Slot("default", "p", number)
        (self.busy.add if busy else self.busy.discard)(slot)
        self.state.set_busy(slot, busy=busy)

    @rule(numbers=st.sets(SLOTS, max_size=2))
    def change_unreadable(self, numbers: set[int]) -> None:
        self.unreadable = frozenset(Slot("default", "p", number) for number in numbers)
        for found in self.unreadable & self.workers.keys():
            del self.workers[found]
            self.state.set_worker(found, None)
            self.undelivered.look(found.worker, None)
            self.leases.look(found.worker, None, self.seconds)
            self.registrations.look(found.worker, None, self.seconds)
        self.state.set_unreadable(self.unreadable)

    @rule(
        least=st.integers(0, 3),
        most=st.integers(3, 6),
        reuse=st.sampled_from(["identity", "never"]),
        marks=st.sampled_from([{}, {}, {ANNOTATION_REMOVING: NOW.isoformat()}]),
        at_once=st.booleans(),
    )
    def change_spec(self, least: int, most: int, reuse: str, marks: dict[str, str], at_once: bool) -> None:
        spec = {"scaling": {"min": least, "max": most, "scaleDownDelay": "30s"}, "cache": {"reuse": reuse}}
        marks = {**marks, ANNOTATION_REMOVE_CACHES: "at-once"} if marks and at_once else marks
        changed = pool(**spec)
        self.pool = changed.but(metadata=changed.metadata.but(annotations=marks), status=self.pool.status)
        self.learn_spec(Spec.KNOWN)

    @rule(left=st.integers(0, 4))
    def change_restarts(self, left: int) -> None:
        self.restarts_left = left

    @rule(left=st.integers(-1, 4))
    def change_starts(self, left: int) -> None:
        self.starts_left = left

    @rule(name=st.sampled_from("gh"), connections=st.none() | st.integers(0, 3), there=st.booleans())
    def beat(self, name: str, connections: int | None, there: bool) -> None:
        """A gateway renews its registrations."""
        leases = {} if connections is None else {"one": connections}
        status = HeartbeatStatus(renewed_at=self.now + timedelta(seconds=1), leases=leases)
        found = GatewayHeartbeat(metadata=Metadata(name=name), status=status)
        changed = self.registrations.look_at_heartbeat(found.key, found if there else None, self.seconds)
        for key in changed:
            self.state.counts.count_again(slot_of(key))
        self.put_off = True

    @rule(at_most=st.none() | st.integers(1, 3))
    def change_parts(self, at_most: int | None) -> None:
        """From now on the plan is made in parts with so many slots (None: as a whole)."""
        self.at_most = at_most

    @rule(early=st.integers(0, 2))
    def change_early_parts(self, early: int) -> None:
        """From now on so many parts of a plan come before the last slots are taken over."""
        self.early = early

    @rule(seconds=st.integers(0, 90))
    def pass_time(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.seconds += seconds
        self.undelivered.pass_time(self.now)

    @rule(spec=st.sampled_from(Spec))
    def learn_spec(self, spec: Spec) -> None:
        """While it is not known, other things are decided; afterwards nothing of that time may be left."""
        self.known = spec is Spec.KNOWN
        self.state.set_pool(self.pool, spec)

    @rule()
    def write_status(self) -> None:
        self._plan(self._moment())
        status = pool_status(self.state, INPUTS, self.now, self._moment().registered_until)
        self.pool = self.pool.but(status=status)
        self.learn_spec(Spec.KNOWN)

    def _moment(self) -> Moment:
        at = self.registrations.at(self.now, self.seconds)
        since = self.leases.at(self.now, self.seconds)
        left = {"restarts_left": self.restarts_left, "starts_left": self.starts_left}
        return Moment(self.now, at, self.undelivered.now(), lease_since=since, **left)

    def _plan(self, moment: Moment) -> Plan:
        """The whole plan, whatever its parts are."""
        steps: dict[Slot, Action] = {}
        creates: dict[Slot, Action] = {}
        for number in range(_MOST_PARTS):
            self.state.taking_over = number < self.early
            plan = self.state.plan(moment, self.at_most)
            assert plan.unfinished or not self.state.taking_over
            for action in plan.actions:
                (creates if isinstance(action, CreateWorker) else steps)[slot_of_action(action)] = action
            if not plan.unfinished or any(isinstance(action, CreateWorker) for action in plan.actions):
                break  # the next one decides again what was not carried out
        steps = dict(sorted(steps.items()))
        assert not plan.unfinished or len(creates) == self.at_most, "nobody creates the first ones here"
        return Plan((*steps.values(), *creates.values()), plan.wake_at)

    @invariant()
    def same_as_from_scratch(self) -> None:
        if not hasattr(self, "state"):
            return
        moment = self._moment()
        if not self.known:
            self._plan(moment)
            return
        snapshot = Snapshot(
            self.pool,
            tuple(self.workers.values()),
            self.observed,
            self.caches,
            busy=frozenset(self.busy),
            registered_until=moment.registered_until,
            restarts_left=self.restarts_left,
            starts_left=self.starts_left,
            unreadable_slots=self.unreadable,
            undelivered_for=moment.undelivered_for,
            lease_since=moment.lease_since,
        )
        plan, whole = self._plan(moment), decide(snapshot, self.now)
        creates = [action for action in whole.actions if isinstance(action, CreateWorker)]
        steps = whole.actions[: len(whole.actions) - len(creates)]
        assert plan.actions == (*steps, *creates[: self.at_most])
        early = self.put_off and plan.wake_at is not None and whole.wake_at is not None
        assert plan.wake_at == whole.wake_at or (early and plan.wake_at < whole.wake_at)
        fresh = state_of(snapshot)
        fresh.plan(moment)
        assert (self.state.strays, self.state.is_gone) == (fresh.strays, fresh.is_gone)
        statuses = [pool_status(state, INPUTS, self.now, moment.registered_until) for state in (self.state, fresh)]
        assert statuses[0] == statuses[1]


Changes.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
test_a_state_that_is_kept_by_its_changes_equals_one_from_scratch = Changes.TestCase


@pytest.mark.parametrize("beat", [{"connections": 2, "there": True}, {"connections": None, "there": False}])
@pytest.mark.parametrize("passed", [59, 60, 90])
def test_a_registration_that_had_expired_counts_again_after_a_heartbeat(beat, passed):
    """The gateway says the number of connections that it had said before."""
    pools = Changes()
    pools.start()
    pools.beat("g", 2, there=True)
    pools.use(0, "g")
    for change in (lambda: None, lambda: pools.pass_time(passed), lambda: pools.beat("g", **beat)):
        change()
        pools.same_as_from_scratch()
    pools.write_status()
    assert pools.pool.status.connections == 2


def test_each_plan_is_compared_from_its_first_part():
    """A plan in parts that waits for workers to be created begins anew after the part that creates some."""
    pools = Changes()
    pools.start()
    pools.settle(1, used=None, outdated=True)
    pools.same_as_from_scratch()
    pools.change_parts(1)
    pools.same_as_from_scratch()
    pools._put_daemon(slot(0), Observation("uid-0", DaemonState.STARTING, "unix:///0", "pool-uid"))
    pools.same_as_from_scratch()
    pools.change_spec(least=3, most=6, reuse="never", marks={}, at_once=False)
    pools.same_as_from_scratch()
    pools.change_parts(None)
    pools.same_as_from_scratch()


def test_a_worker_that_goes_while_the_spec_cannot_be_read_is_not_counted_afterwards():
    outdated = {number: replace(seen(number), outdated=True) for number in range(4)}
    spec = pool(scaling={"min": 4, "max": 4})
    state = state_of(snapshot(spec, *(worker(number) for number in range(4)), observed=outdated))
    state.plan(Moment(NOW, restarts_left=0))
    state.set_pool(spec, Spec.UNREADABLE)
    state.set_worker(slot(3), None)
    state.set_observation(slot(3), None)
    state.plan(Moment(NOW))
    state.set_pool(spec)
    stopped = [action for action in state.plan(Moment(NOW)).actions if isinstance(action, StopDaemon)]
    assert len(stopped) == 1, "one of three may be down"


@pytest.mark.parametrize("at_most", [1, 7])
def test_no_part_of_a_plan_has_more_slots_and_no_slot_is_looked_at_twice(at_most, monkeypatch):
    looked_at: list[Slot] = []
    step = PoolState._step
    monkeypatch.setattr(
        PoolState, "_step", lambda state, slot, *rest: looked_at.append(slot) or step(state, slot, *rest)
    )
    state = state_of(snapshot(pool(scaling={"min": 0, "max": 1}), *(worker(number) for number in range(40))))
    parts = [state.plan(Moment(NOW), at_most)]
    while parts[-1].unfinished:
        parts.append(state.plan(Moment(NOW), at_most))
    assert max(len(part.actions) for part in parts) == at_most
    assert sum(len(part.actions) for part in parts) == 40
    assert len(looked_at) == 40
    assert {*looked_at} == {slot(number) for number in range(40)}


def test_a_part_has_so_many_new_workers_at_most():
    state = state_of(snapshot(pool(scaling={"min": 9, "max": 9})))
    plan = state.plan(Moment(NOW), 4)
    assert (len(plan.actions), plan.unfinished) == (4, True)
