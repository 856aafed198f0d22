"""A model of a whole pool, driven at random: leases, crashes, delays, lost races, gateways and a clock that jumps.

The store, the runtime and the gateways are models of a few lines; the real ones have their own tests. Under test are
the real queue, placement and decisions, and rules 2, 3, 4 and 10 (docs/rules.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bkpool.controller.expired_registrations import judged_heartbeats
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.gateway_heartbeat import ABSENT, GatewayHeartbeat, HeartbeatStatus, HeartbeatVersion
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState, Observation, Silence, Snapshot
from bkpool.core.queueing import assign
from bkpool.core.reconcile.actions import (
    CheckDaemon,
    CreateWorker,
    FinishLease,
    ForgetLogs,
    LoseLease,
    RemoveWorker,
    ReplaceDaemon,
    SetCacheOwner,
    StartDaemon,
    StopDaemon,
    WipeCache,
    WriteStatus,
    slot_of_action,
)
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, failed_worker
from bkpool.core.reconcile.health import DEFAULT_HEALTH
from bkpool.core.reconcile.later_writes import SeenLeases
from bkpool.core.reconcile.lease_end import with_lease_remembered, without_lease, without_logs
from bkpool.core.reconcile.replacing import out_of_use
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.registrations import SeenRegistrations
from bkpool.core.resource import Metadata
from bkpool.core.worker import REMEMBERED_LEASES, EndReason, GatewayRegistration, Phase, Worker, new_worker
from support.objects import NOW, indexed, lease, pool

BEAT = Key("default", "g")
"""The name of the gateway's heartbeat."""
TENANTS = st.sampled_from(["ann", "bob", "cyd"])


@dataclass(frozen=True)
class Request:
    """A request that waits; it repeats no other."""

    tenant: str
    owner: str
    request_key: str | None = None
    admin: bool = True
    only_ready: bool = False

    @property
    def holder(self) -> str:
        return self.tenant


class Lost(Exception):
    pass


class TinyStore:
    """Compare-and-swap on a dict."""

    def __init__(self):
        self.workers: dict[str, Worker] = {}
        self.version = 0

    def _put(self, worker: Worker, **metadata) -> Worker:
        self.version += 1
        worker = worker.but(metadata=worker.metadata.but(resource_version=str(self.version), **metadata))
        self.workers[worker.key.name] = worker
        return worker

    def create(self, worker: Worker, now) -> Worker:
        if worker.key.name in self.workers:
            raise Lost
        return self._put(worker, uid=f"uid-{self.version}", creation_timestamp=now)

    def _current(self, worker: Worker) -> Worker:
        current = self.workers.get(worker.key.name)
        if current is None or current.metadata.resource_version != worker.metadata.resource_version:
            raise Lost
        return current

    def replace(self, worker: Worker) -> Worker:
        return self._put(worker.but(status=self._current(worker).status))

    def replace_status(self, worker: Worker) -> Worker:
        return self._put(self._current(worker).but(status=worker.status))

    def delete(self, worker: Worker) -> None:
        self._current(worker)
        del self.workers[worker.key.name]


class TinyRuntime:
    """Daemons and caches. Like a real runtime, it never gives a cache to another owner."""

    def __init__(self):
        self.daemons: dict[Slot, Observation] = {}
        self.caches: dict[Slot, str | None] = {}
        self.failing = False

    def start(self, slot, uid, owner):
        self.daemons.pop(slot, None)
        if self.failing:
            return False
        if owner is not None and self.caches.get(slot) != owner:
            self.caches[slot] = owner  # another's was wiped
        self.caches.setdefault(slot, None)
        self.daemons[slot] = Observation(uid, DaemonState.READY, f"unix:///{slot.number}", self.caches[slot])
        return True


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now = NOW
        self.skew = timedelta()
        """How far the gateways' clock is ahead."""
        self.registrations, self.leases = SeenRegistrations(), SeenLeases()
        self.known: set[Key] = set()
        self.writes_until_crash: int | None = None
        """Writes of one action that come before the controller is killed; None: it is not."""
        self.heartbeat: GatewayHeartbeat | None = None
        """Where the gateway renews registrations, unless it renews each entry."""
        self.seen_heartbeat: GatewayHeartbeat | None = None
        """As the controller's copy has it, which may be old."""
        self.looked_at: GatewayHeartbeat | None = None
        """As the controller has judged by it last."""
        self.store = TinyStore()
        self.runtime = TinyRuntime()
        self.pool = pool(scaling={"min": 1, "max": 3, "scaleDownDelay": "10m"}, cache={"reuse": "identity"})
        self.view: dict[str, Worker] = {}
        self.answered: dict[
            str, tuple[str, str]
        ] = {}  # allocation id -> (worker name, tenant): leases that callers know
        self.connected: dict[str, str] = {}  # allocation id -> worker uid that its open connection leads to
        self.count = 0

    # --- what the world does ---

    @rule()
    def catch_up(self):
        self.view = dict(self.store.workers)

    @rule(minutes=st.sampled_from([0.01, 0.5, 1.5, 20, 59, 61, 1500]), beats=st.booleans())
    def time_passes(self, minutes, beats):
        """Running gateways renew their registrations, each or all by a heartbeat. Those of the others expire."""
        self.now += timedelta(minutes=minutes)
        if beats:
            status = HeartbeatStatus(renewed_at=self.now + self.skew, leases=dict.fromkeys(self.connected, 1))
            self.count += 1
            metadata = Metadata(name=BEAT.name, uid="h", resource_version=str(self.count))
            self.heartbeat = GatewayHeartbeat(metadata=metadata, status=status)
            return
        for worker in list(self.store.workers.values()):
            held = worker.lease
            if held and held.id in self.connected:
                registration = self._registration(held.id)
                self.store.replace_status(worker.with_status(gateways=(registration,)))

    def _registration(self, lease_id):
        return GatewayRegistration(
            gateway="g", lease_id=lease_id, renewed_at=self.now + self.skew, heartbeat=str(BEAT)
        )

    @rule()
    def the_heartbeat_is_seen(self):
        self.seen_heartbeat = self.heartbeat

    @precondition(lambda self: self.looked_at or self.registrations._heartbeats.version(BEAT) is None)
    @rule()
    def the_heartbeat_is_deleted(self):
        """Twice within a minute, both times unseen, would be too much (docs/decisions/0036)."""
        self.heartbeat = None

    @rule(hours=st.integers(-2, 2))
    def the_gateways_clock_is_set(self, hours):
        self.skew = timedelta(hours=hours)

    @rule()
    def another_controller_takes_over(self):
        self.registrations, self.leases = SeenRegistrations(), SeenLeases()
        self.known: set[Key] = set()
        self.looked_at = None

    @rule(writes=st.integers(1, 2))
    def the_controller_is_killed_between_two_writes(self, writes):
        self.writes_until_crash = writes

    def _may_be_killed(self):
        if self.writes_until_crash is not None:
            self.writes_until_crash -= 1
            if self.writes_until_crash == 0:
                self.writes_until_crash = None
                self.another_controller_takes_over()
                raise Lost

    @rule(failing=st.booleans())
    def daemons_fail_to_start(self, failing):
        self.runtime.failing = failing

    @rule(reaches_other=st.booleans())
    def the_spec_changes(self, reaches_other):
        for slot, seen in self.runtime.daemons.items():
            self.runtime.daemons[slot] = replace(seen, outdated=True, reaches_other=reaches_other)

    @precondition(lambda self: self.runtime.daemons)
    @rule(data=st.data(), silently=st.booleans())
    def a_daemon_dies(self, data, silently):
        slot = data.draw(st.sampled_from(sorted(self.runtime.daemons)))
        dead = self.runtime.daemons.pop(slot)
        if not silently:  # silently: a reboot; the runtime knows nothing
            self.runtime.daemons[slot] = Observation(
                dead.worker_uid, DaemonState.EXITED, "", dead.cache_owner, "killed", log_tail=dead.cache_owner or ""
            )
        self.connected = {lease: uid for lease, uid in self.connected.items() if uid != dead.worker_uid}

    @precondition(lambda self: any(d.state is DaemonState.READY for d in self.runtime.daemons.values()))
    @rule(data=st.data(), seconds=st.sampled_from([None, 2, 9, 20]))
    def a_daemon_stalls(self, data, seconds):
        """It does not answer for this long, or answers again."""
        up = sorted(one for one, seen in self.runtime.daemons.items() if seen.state is DaemonState.READY)
        slot = data.draw(st.sampled_from(up))
        silence = None if seconds is None else Silence(timedelta(seconds=seconds))
        self.runtime.daemons[slot] = replace(self.runtime.daemons[slot], silence=silence)

    @precondition(lambda self: self.store.workers)
    @rule(data=st.data(), answers=st.booleans())
    def a_gateway_reports(self, data, answers):
        worker = data.draw(st.sampled_from(sorted(self.store.workers.values(), key=lambda w: w.key)))
        self.store.replace_status(worker.noted_answering() if answers else worker.noted_silent(self.now))

    # --- what callers do ---

    @rule(tenants=st.lists(TENANTS, min_size=1, max_size=3))
    def allocate(self, tenants):
        """Makes some requests at once. Those that get no worker leave the queue."""
        reuse = self.pool.spec.cache.reuse
        requests = [Request(name, cache_owner_digest(reuse, name, "pool-uid", "")) for name in tenants]
        index = indexed(self.view.values())
        for given in assign(requests, self.pool, index, lambda: self.runtime.caches, now=self.now):
            self.claim(given.waiter, given.target)

    def claim(self, request, target):
        self.count += 1
        made = lease(request.tenant, id=f"lease-{self.count}", now=self.now, owner=request.owner)
        try:
            if isinstance(target, Slot):
                worker = self.store.create(new_worker(target, self.pool, made, {}), self.now)
            else:
                worker = self.store.replace(target.with_lease(made))
        except Lost:
            return
        self.answered[made.id] = (worker.key.name, request.tenant)

    def _live(self):
        return [w for w in self.store.workers.values() if w.lease and not w.lease.ended(self.now)]

    @precondition(lambda self: self._live())
    @rule(data=st.data())
    def release(self, data):
        worker = data.draw(st.sampled_from(sorted(self._live(), key=lambda w: w.key)))
        ended = worker.lease.but(ended_at=self.now, end_reason=EndReason.RELEASED)
        self.store.replace(worker.with_lease(ended))

    @precondition(lambda self: any(w.lease for w in self.store.workers.values()))
    @rule(data=st.data())
    def revoke(self, data):
        """Revokes a lease, which may have ended already. A frozen gateway keeps its connection and registration."""
        leased = sorted((w for w in self.store.workers.values() if w.lease), key=lambda w: w.key)
        worker = data.draw(st.sampled_from(leased))
        ended = worker.lease.but(ended_at=worker.lease.ended_at or self.now, end_reason=EndReason.REVOKED)
        self.store.replace(worker.with_lease(ended))

    @precondition(lambda self: self._live())
    @rule(data=st.data())
    def renew(self, data):
        worker = data.draw(st.sampled_from(sorted(self._live(), key=lambda w: w.key)))
        until = min(self.now + timedelta(hours=1), worker.lease.not_after)
        self.store.replace(worker.with_lease(worker.lease.but(expires_at=until)))

    def _routable(self):
        return [w for w in self.view.values() if w.routable_endpoint]

    @precondition(lambda self: self._routable())
    @rule(data=st.data())
    def connect_anywhere(self, data):
        self.connect(data)

    def connect(self, data):
        """Lets a gateway with a stale view register by compare-and-swap before it dials."""
        worker = data.draw(st.sampled_from(sorted(self._routable(), key=lambda w: w.key)))
        wanted = worker.lease
        current = self.store.workers.get(worker.key.name)
        if current is None or current.lease is None or current.lease.id != wanted.id:
            return
        if current.lease.ended(self.now):
            return
        registration = self._registration(wanted.id)
        self.store.replace_status(current.with_status(gateways=(registration,)))
        daemon = self.runtime.daemons.get(worker.slot)
        if daemon and daemon.state is DaemonState.READY:
            assert daemon.cache_owner == wanted.owner, "routed to another owner's cache"
            self.connected[wanted.id] = daemon.worker_uid

    @precondition(lambda self: self.connected)
    @rule(data=st.data())
    def disconnect(self, data):
        gone = data.draw(st.sampled_from(sorted(self.connected)))
        del self.connected[gone]
        for worker in list(self.store.workers.values()):
            if worker.lease and worker.lease.id == gone:
                self.store.replace_status(worker.with_status(gateways=()))

    @rule(tenant=TENANTS, data=st.data())
    def build(self, tenant, data):
        """Does the usual steps, so that unusual events happen between them."""
        self.control(lagging=False, times=2)
        self.allocate(tenant)
        self.control(lagging=False, times=3)
        self.catch_up()
        if self._routable():
            self.connect(data)

    # --- the controller ---

    @rule(lagging=st.booleans(), times=st.integers(1, 4))
    def control(self, lagging, times):
        for _ in range(times):
            if not lagging:
                self.catch_up()
            self._control()

    def _control(self):
        workers = tuple(self.view.values())
        for key in self.known | {worker.key for worker in workers}:
            self.registrations.look(key, self.view.get(key.name), self.now.timestamp())
            self.leases.look(key, self.view.get(key.name), self.now.timestamp())
        self.known = {worker.key for worker in workers}
        if self.looked_at != self.seen_heartbeat:
            self._look_at_heartbeat()
        registered_until = self.registrations.at(self.now, self.now.timestamp())
        snap = Snapshot(
            self.pool,
            workers,
            dict(self.runtime.daemons),
            dict(self.runtime.caches),
            registered_until=registered_until,
            lease_since=self.leases.at(self.now, self.now.timestamp()),
        )
        decision = decide(snap, self.now)
        slots = [slot_of_action(action) for action in decision.actions]
        assert len(slots) == len(set(slots)), "two actions at once in one slot"
        judged = [judged_heartbeats(action, self.registrations) for action in decision.actions]
        for action, versions in zip(decision.actions, judged, strict=True):
            try:
                self._check_expired(versions)
                self._act(action)
            except Lost:
                continue
        state = state_of(Snapshot(self.pool, tuple(self.store.workers.values()), dict(self.runtime.daemons), {}))
        state.plan(Moment(self.now))
        for slot in state.strays:
            del self.runtime.daemons[slot]

    def _look_at_heartbeat(self):
        self.looked_at = self.seen_heartbeat
        self.registrations.look_at_heartbeat(BEAT, self.looked_at, self.now.timestamp())

    def _check_expired(self, judged):
        """As `controller.expired_registrations` does."""
        current = ABSENT if self.heartbeat is None else HeartbeatVersion.of(self.heartbeat)
        if judged and judged[BEAT] != current:
            self.seen_heartbeat = self.heartbeat
            self._look_at_heartbeat()
            raise Lost

    def _act(self, action):  # noqa: PLR0912 - one case for each action
        store, runtime = self.store, self.runtime
        match action:
            case CreateWorker(slot):
                store.create(new_worker(slot, self.pool, None, {}), self.now)
            case StartDaemon(worker, owner):
                self._must_be_unused(worker)
                if not runtime.start(worker.slot, worker.uid, owner):
                    store.replace_status(
                        failed_worker(store.workers.get(worker.key.name, worker), "no", "", self.now)
                    )
            case SetCacheOwner(worker, owner):
                if runtime.caches.get(worker.slot) is None:
                    runtime.caches[worker.slot] = owner
                    was = runtime.daemons[worker.slot]
                    runtime.daemons[worker.slot] = replace(was, cache_owner=owner)
            case WipeCache(slot):
                if (worker := store.workers.get(slot.worker.name)) is not None:
                    self._must_be_unused(worker)
                runtime.daemons.pop(slot, None)
                runtime.caches.pop(slot, None)
            case StopDaemon(worker):
                if worker.lease is None or worker.lease.end_reason is not EndReason.REVOKED:
                    store.replace_status(out_of_use(worker))
                    self._must_be_unused(worker)
                stopped = runtime.daemons.pop(worker.slot)
                self.connected = {lease: uid for lease, uid in self.connected.items() if uid != stopped.worker_uid}
            case CheckDaemon(worker):
                if runtime.daemons[worker.slot].silence is None:
                    store.replace_status(worker.noted_answering())
            case ReplaceDaemon(worker, message):
                quiet = worker.status.silent_since and self.now - worker.status.silent_since
                store.replace_status(failed_worker(worker, message, "", self.now))  # not if it has changed meanwhile
                unused = worker.uid not in self.connected.values()
                assert unused or quiet >= DEFAULT_HEALTH.quiet, "cut although bytes have come"
                ended = runtime.daemons.pop(worker.slot)
                self.connected = {lease: uid for lease, uid in self.connected.items() if uid != ended.worker_uid}
            case WriteStatus(worker):
                store.replace_status(worker)
            case LoseLease(worker, message):
                ended = worker.lease.but(ended_at=self.now, end_reason=EndReason.LOST, end_message=message)
                store.replace(worker.with_lease(ended))
            case FinishLease(worker):
                self._finish(action, worker)
            case ForgetLogs(worker):
                store.replace(without_logs(worker))
            case RemoveWorker(worker):
                store.delete(worker)
                self._must_be_unused(worker)
                runtime.daemons.pop(worker.slot, None)

    def _finish(self, action, worker):
        store, lease, slot = self.store, worker.lease, worker.slot
        if action.status is not None:
            if action.ended.log_tail:
                worker = store.replace(with_lease_remembered(worker, action.ended, self.now))
                self._may_be_killed()
            worker = store.replace_status(worker.but(status=action.status))
            self._may_be_killed()
        store.replace(without_lease(with_lease_remembered(worker, action.ended, self.now)))
        assert lease.id not in self.connected, "taken from under an open connection"
        if lease.end_reason is EndReason.REVOKED:
            daemon = self.runtime.daemons.get(slot)
            assert daemon is None or daemon.state is DaemonState.EXITED, "its builds may still run"

    def _must_be_unused(self, worker):
        daemon = self.runtime.daemons.get(worker.slot)
        if daemon and daemon.state is DaemonState.READY:
            assert daemon.worker_uid not in self.connected.values(), "stopped under an open connection"

    # --- what must always hold ---

    @invariant()
    def never_more_than_the_maximum(self):
        assert len(self.store.workers) <= self.pool.spec.scaling.max

    @invariant()
    def a_lease_that_was_answered_stays_its_holders_until_it_ends(self):
        remembered = {past.token_sha256 for w in self.store.workers.values() for past in w.ended_leases}
        holders = {w.lease.id: w.key.name for w in self.store.workers.values() if w.lease}
        for lease_id, (name, _tenant) in list(self.answered.items()):
            if lease_id in holders:
                assert holders[lease_id] == name
            else:
                # The lease has ended. While its worker exists, a late caller still gets the reason.
                worker = self.store.workers.get(name)
                if worker is not None and worker.allocation_count < REMEMBERED_LEASES:
                    assert f"digest-{lease_id}" in remembered or worker.metadata.creation_timestamp > NOW
                del self.answered[lease_id]

    @invariant()
    def nobody_is_routed_to_anothers_cache(self):
        for worker in self.store.workers.values():
            daemon = self.runtime.daemons.get(worker.slot)
            if (
                worker.routable_endpoint
                and daemon
                and daemon.state is DaemonState.READY
                and daemon.worker_uid == worker.uid
            ):
                assert daemon.cache_owner == worker.lease.owner

    @invariant()
    def nobody_reads_the_log_of_anothers_builds(self):
        for worker in self.store.workers.values():
            if worker.lease:
                assert worker.status.log_tail in {"", worker.lease.owner}
            else:
                assert worker.status.log_tail == ""

    def teardown(self):
        """Checks that without faults every leased worker becomes usable or its lease ends."""
        self.runtime.failing = False
        self.connected.clear()
        for _ in range(40):
            self.catch_up()
            self._control()
            self.now += DEFAULT_LIMITS.backoff_max
        for worker in self.store.workers.values():
            if worker.lease and not worker.lease.ended(self.now):
                assert worker.status.phase is Phase.ALLOCATED
            else:
                assert not self.runtime.daemons[worker.slot].outdated, "an idle worker has today's spec in the end"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(stateful_step_count=40)
