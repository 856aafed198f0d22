from dataclasses import replace
from datetime import timedelta

import pytest

from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.names import END_WHEN_UNUSED, FINALIZER
from bkpool.core.observation import MOST_RESTARTS, MOST_STARTS, DaemonState, Observation, WorkerCapacity
from bkpool.core.pool import Reuse
from bkpool.core.reconcile.actions import (
    CreateWorker,
    FinishLease,
    ForgetLogs,
    LoseLease,
    Plan,
    RemoveWorker,
    SetCacheOwner,
    SetProtection,
    StartDaemon,
    StopDaemon,
    WipeCache,
    WriteStatus,
)
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, failed_worker
from bkpool.core.reconcile.lease_end import with_lease_remembered, without_lease, without_logs
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.reconcile.slot_step import TOKEN_TIMEOUT, Moment
from bkpool.core.registrations import REGISTRATION_LIFE, RegistrationKey
from bkpool.core.worker import EndReason, GatewayRegistration, Phase, Undelivered
from support.objects import NOW, lease, pool, pool_status, seen, slot, snapshot, worker

EXITED = DaemonState.EXITED


def actions(snap, now=NOW):
    return list(decide(snap, now).actions)


def test_without_a_difference_there_is_no_action():
    decision = decide(snapshot(pool(), worker(0), observed={0: seen(0)}), NOW)
    assert decision.actions == ()
    assert decision.wake_at == NOW - timedelta(minutes=1) + timedelta(minutes=15), "the idle worker's time is up"


def test_idle_workers_are_kept_ready_in_addition_to_leased_ones():
    p = pool(scaling={"min": 2, "max": 4})
    assert actions(snapshot(p)) == [CreateWorker(slot(0)), CreateWorker(slot(1))]
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(p, held, observed={0: seen(0, "owner-a")})) == [
        CreateWorker(slot(1)),
        CreateWorker(slot(2)),
    ]


def test_idle_workers_never_exceed_the_maximum():
    p = pool(scaling={"min": 2, "max": 2})
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(p, held, observed={0: seen(0, "owner-a")})) == [CreateWorker(slot(1))]


def test_a_worker_that_is_being_created_is_not_created_twice():
    assert actions(snapshot(pool(scaling={"min": 1}), busy=frozenset({slot(0)}))) == []


def test_a_stopped_worker_is_started_with_its_holders_cache():
    assert actions(snapshot(pool(), worker(0, phase=Phase.PENDING))) == [
        StartDaemon(worker(0, phase=Phase.PENDING), None)
    ]
    held = worker(0, lease(), phase=Phase.PENDING)
    assert actions(snapshot(pool(), held)) == [StartDaemon(held, "owner-a")]


def test_a_clean_cache_gets_its_owner_before_the_worker_is_ready():
    held = worker(0, lease())
    assert actions(snapshot(pool(), held, observed={0: seen(0, None)})) == [SetCacheOwner(held, "owner-a")]
    (report,) = actions(snapshot(pool(), held, observed={0: seen(0, "owner-a")}))
    assert isinstance(report, WriteStatus)
    assert (report.worker.status.phase, report.worker.status.cache_owner) == (Phase.ALLOCATED, "owner-a")


def test_a_cache_of_another_owner_is_never_used_for_a_lease():
    held = worker(0, lease(), cache_owner="owner-b")
    assert actions(snapshot(pool(), held, observed={0: seen(0, "owner-b")})) == [StartDaemon(held, "owner-a")]


def test_a_daemon_of_an_earlier_worker_in_the_slot_is_replaced():
    held = worker(0, lease())
    former = Observation("another-uid", DaemonState.READY, "unix:///0", "owner-a")
    assert actions(snapshot(pool(), held, observed={0: former})) == [StartDaemon(held, "owner-a")]


def test_a_failing_worker_is_restarted_with_growing_pauses_until_the_lease_is_lost():
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a", ready_at=NOW)
    now, starts = NOW, 0
    while True:
        (action,) = actions(snapshot(pool(), held, observed={0: seen(0, "owner-a", EXITED, "killed")}), now)
        if isinstance(action, LoseLease):
            break
        assert isinstance(action, WriteStatus)
        held = action.worker
        assert held.status.endpoint is None, "the gateway must hold or refuse, not dial"
        assert held.status.message == "killed"
        retry = decide(snapshot(pool(), held, observed={0: seen(0, "owner-a", EXITED)}), now)
        if retry.wake_at:
            now = retry.wake_at
            assert actions(snapshot(pool(), held, observed={0: seen(0, "owner-a", EXITED)}), now) == [
                StartDaemon(held, "owner-a")
            ]
            starts += 1
            held = held.with_status(endpoint="unix:///0", phase=Phase.ALLOCATED)
    assert starts == DEFAULT_LIMITS.max_failures - 1
    assert action.message == "killed"


def test_a_worker_that_was_stable_counts_from_the_beginning():
    steady = worker(0, ready_at=NOW - DEFAULT_LIMITS.stable_after, failures=4)
    assert failed_worker(steady, "x", "", NOW).status.failures == 1
    shaky = worker(0, ready_at=NOW, failures=4)
    assert failed_worker(shaky, "x", "", NOW).status.failures == 5


def finished(action):
    """The worker after the writes of a FinishLease, as `controller.lease_ends` makes them."""
    worker = action.worker if action.status is None else action.worker.but(status=action.status)
    return without_lease(with_lease_remembered(worker, action.ended, NOW))


def test_after_a_reboot_a_worker_starts_at_once():
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a", ready_at=NOW)
    assert actions(snapshot(pool(), held)) == [StartDaemon(held, "owner-a")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"expires_at": NOW}, EndReason.EXPIRED),
        ({"ended_at": NOW, "end_reason": EndReason.RELEASED}, EndReason.RELEASED),
    ],
)
def test_an_ended_lease_leaves_its_worker(change, reason):
    held = worker(0, lease(**change), phase=Phase.ALLOCATED, cache_owner="owner-a")
    (action,) = actions(snapshot(pool(), held, observed={0: seen(0, "owner-a")}))
    assert isinstance(action, FinishLease)
    assert action.ended.reason is reason
    assert action.status is None, "one write is enough"
    after = finished(action)
    assert (after.phase, after.lease, after.last_activity_at, after.allocation_count) == (Phase.IDLE, None, NOW, 1)
    assert after.ended_leases[-1].token_sha256 == "digest-lease"
    again = with_lease_remembered(after, action.ended, NOW)
    assert (again.ended_leases, again.allocation_count) == (after.ended_leases, 1), "it can be repeated after a crash"


def test_a_lease_stays_while_a_gateway_may_have_connections_of_it():
    registered = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW)
    held = worker(0, lease(ended_at=NOW), phase=Phase.ALLOCATED, cache_owner="owner-a", gateways=(registered,))
    snap = snapshot(pool(), held, observed={0: seen(0, "owner-a")})
    (report,) = actions(snap)
    assert report.worker.status.phase is Phase.DRAINING
    draining = snapshot(pool(), report.worker, observed={0: seen(0, "owner-a")})
    assert decide(draining, NOW).actions == ()
    assert decide(draining, NOW).wake_at == NOW + REGISTRATION_LIFE
    assert isinstance(actions(draining, NOW + REGISTRATION_LIFE)[0], FinishLease)


def outdated(number, **changes):
    return replace(seen(number, **changes), outdated=True)


def test_a_worker_of_an_earlier_spec_is_started_again_and_a_lease_keeps_the_one_that_it_has():
    free = worker(0, phase=Phase.IDLE, cache_owner="owner-a")
    assert actions(snapshot(pool(), free, observed={0: outdated(0, owner="owner-a")})) == [StopDaemon(free)]
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(pool(), held, observed={0: outdated(0, owner="owner-a")})) == []


def test_a_leased_worker_of_an_earlier_spec_is_stopped_after_its_last_connection_and_before_anybody_gets_it():
    old = {0: outdated(0, owner="owner-a")}
    registered = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW)
    over = lease(ended_at=NOW)
    draining = worker(0, over, phase=Phase.DRAINING, cache_owner="owner-a", gateways=(registered,))
    assert actions(snapshot(pool(), draining, observed=old)) == [], "builds may finish"
    ended = worker(0, over, phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(pool(), ended, observed=old)) == [StopDaemon(ended)]
    (finish,) = actions(snapshot(pool(), ended))
    assert isinstance(finish, FinishLease)
    assert finished(finish).phase is Phase.PENDING, "the next holder waits for a daemon of today's spec"


def test_the_lease_of_a_deleted_worker_ends_without_a_stop_of_its_outdated_daemon():
    over = deleted(worker(0, lease(ended_at=NOW), phase=Phase.ALLOCATED, cache_owner="owner-a"))
    (finish,) = actions(snapshot(pool(), over, observed={0: outdated(0, owner="owner-a")}))
    assert isinstance(finish, FinishLease)
    free = finish.worker.with_lease(None)
    assert actions(snapshot(pool(), free, observed={0: outdated(0, owner="owner-a")})) == [RemoveWorker(free)]


def fleet(count, old, down=(), **busy):
    """A pool of idle workers, some of an earlier spec, and some that do not run."""
    workers = [
        worker(n, last_activity_at=NOW - timedelta(minutes=n), phase=Phase.FAILED if n in down else Phase.IDLE)
        for n in range(count)
    ]
    observed = {n: outdated(n) if n in old else seen(n) for n in range(count) if n not in down}
    return snapshot(pool(scaling={"min": count, "max": 200}), *workers, observed=observed, **busy)


def stopped(snap):
    return [action.worker.slot.number for action in actions(snap) if isinstance(action, StopDaemon)]


def test_idle_workers_of_an_earlier_spec_are_replaced_a_few_at_a_time():
    assert stopped(fleet(1, {0})) == [0], "even the only one"
    assert stopped(fleet(3, {0, 1, 2})) == [2], "the least recently used one first"
    assert stopped(fleet(8, set(range(8)))) == [6, 7], "a quarter"
    assert len(stopped(fleet(100, set(range(100))))) == MOST_RESTARTS, "and never more than a few of all pools"
    assert stopped(fleet(100, set(range(100)), restarts_left=0)) == []
    assert stopped(fleet(100, set(range(100)), restarts_left=-3)) == []
    assert stopped(fleet(8, {1, 2}, busy=frozenset({slot(0)}))) == [2], "one is being started already"


def test_only_so_many_workers_start_at_once_and_a_leased_one_does_not_wait():
    stopped_ones = [worker(number, phase=Phase.PENDING) for number in range(100)]
    stopped_ones[70] = worker(70, lease(), phase=Phase.PENDING)
    snap = snapshot(pool(scaling={"min": 99, "max": 200}), *stopped_ones)

    def started(snap):
        return [action.worker.slot.number for action in actions(snap) if isinstance(action, StartDaemon)]

    assert started(snap) == [*range(MOST_STARTS), 70]
    assert started(replace(snap, starts_left=2)) == [0, 1, 70]
    for none_left in (0, -3):
        assert started(replace(snap, starts_left=none_left)) == [70]


def test_if_new_workers_do_not_start_the_last_ready_ones_are_kept():
    assert stopped(fleet(3, {0, 1}, down={2})) == []
    assert stopped(fleet(8, {0, 1, 2, 3, 4, 5}, down={6, 7})) == []


def test_a_worker_that_reaches_what_its_pool_no_longer_opens_is_given_to_nobody():
    snap = fleet(3, {0, 1, 2}, restarts_left=0)
    observed = {place: replace(up, reaches_other=True) for place, up in snap.observed.items()}
    assert stopped(replace(snap, observed=observed)) == [0, 1, 2], "all at once"


def test_a_status_has_the_digest_of_the_spec_and_an_upgrade_writes_none_by_itself():
    up = replace(seen(0), spec_digest="d1")
    (report,) = actions(snapshot(pool(), worker(0, phase=Phase.PENDING), observed={0: up}))
    assert report.worker.status.spec_digest == "d1"
    assert actions(snapshot(pool(), worker(0), observed={0: up})) == []


def test_the_daemon_of_a_revoked_lease_is_stopped_even_if_a_gateway_is_frozen_and_before_anybody_gets_the_worker():
    frozen = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW)
    over = lease(ended_at=NOW, end_reason=EndReason.REVOKED, end_message="by the admin")
    held = worker(0, over, phase=Phase.ALLOCATED, cache_owner="owner-a", gateways=(frozen,))
    assert actions(snapshot(pool(), held, observed={0: seen(0, "owner-a")})) == [StopDaemon(held)]
    starting = {0: seen(0, "owner-a", DaemonState.STARTING)}
    assert actions(snapshot(pool(), held, observed=starting)) == [StopDaemon(held)], "it may run builds all the same"
    without_owner = {0: replace(seen(0), ephemeral_cache=True)}
    assert actions(snapshot(pool(), held, observed=without_owner)) == [StopDaemon(held)]
    (report,) = actions(snapshot(pool(), held))
    assert report.worker.status.phase is Phase.DRAINING
    assert report.worker.status.message == "the lease is revoked; its builds were stopped"
    stopped = snapshot(pool(), report.worker)
    assert decide(stopped, NOW).actions == ()
    assert decide(stopped, NOW).wake_at == NOW + REGISTRATION_LIFE
    (finish,) = actions(stopped, NOW + REGISTRATION_LIFE)
    assert isinstance(finish, FinishLease)
    assert (finish.ended.reason, finish.ended.message) == (EndReason.REVOKED, "by the admin")
    assert finished(finish).phase is Phase.PENDING, "it is started again like a new one"
    after = finished(finish)
    assert actions(snapshot(pool(), after)) == [StartDaemon(after, None)]


def test_a_live_lease_is_decided_again_when_it_expires():
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert decide(snapshot(pool(), held, observed={0: seen(0, "owner-a")}), NOW).wake_at == NOW + timedelta(hours=1)


@pytest.mark.parametrize("never", [{"cache": {"reuse": "never"}}, {"untrusted": True}])
def test_with_reuse_never_the_cache_is_wiped_after_the_lease(never):
    used = worker(0, cache_owner="lease-digest")
    assert actions(snapshot(pool(**never), used, observed={0: seen(0, "lease-digest")})) == [WipeCache(slot(0))]
    assert actions(snapshot(pool(), used, observed={0: seen(0, "lease-digest")})) == []
    held = worker(0, lease(), cache_owner="owner-a", phase=Phase.ALLOCATED)
    assert actions(snapshot(pool(**never), held, observed={0: seen(0, "owner-a")})) == []


def test_with_reuse_never_used_caches_are_wiped_before_anything_else():
    never = pool(cache={"reuse": "never"}, scaling={"min": 1, "scaleDownDelay": "0s"})
    left = {slot(0): "lease-1", slot(1): "lease-2", slot(2): None}
    surplus, down = worker(0, last_activity_at=NOW), worker(1, phase=Phase.FAILED, failures=9, failed_at=NOW)
    observed = {0: seen(0, "lease-1"), 1: seen(1, "lease-2", EXITED, "killed")}
    assert actions(snapshot(never, surplus, down, observed=observed, caches=left)) == [
        WipeCache(slot(0)),
        WipeCache(slot(1)),
    ]
    assert actions(snapshot(never, caches=left)) == [WipeCache(slot(0)), WipeCache(slot(1)), CreateWorker(slot(2))]
    assert actions(snapshot(never, caches=left, busy=frozenset({slot(0), slot(1), slot(2)}))) == []


def test_the_log_tail_is_shown_to_the_holder_and_left_out_after_their_lease():
    log_tail = 'process "curl secret" did not complete'
    whole = f"buildkitd was killed\nThe end of its log:\n{log_tail}"
    crashed = {0: replace(seen(0, "owner-a", EXITED, "buildkitd was killed"), log_tail=log_tail)}
    (action,) = actions(snapshot(pool(), worker(0, cache_owner="owner-a"), observed=crashed))
    assert (action.worker.status.message, action.worker.status.log_tail) == ("buildkitd was killed", "")
    held = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    (action,) = actions(snapshot(pool(), held, observed=crashed))
    assert action.worker.status.message_with_log == whole
    crashed_worker = action.worker
    (action,) = actions(snapshot(pool(), crashed_worker, observed={0: seen(0, "owner-a")}))
    assert (action.worker.status.message, action.worker.status.log_tail) == ("", ""), "it answers again"
    (action,) = actions(snapshot(pool(), worker(0), observed={0: replace(crashed[0], cache_owner=None)}))
    assert action.worker.status.message_with_log == whole, "no build has used it"


def test_the_next_holder_never_reads_the_log_of_the_holder_before():
    secret = replace(seen(0, "owner-a", EXITED, "buildkitd was killed"), log_tail="SECRET of owner-a")
    over = lease().but(ended_at=NOW, end_reason=EndReason.RELEASED)
    draining = worker(0, over, phase=Phase.DRAINING, cache_owner="owner-a", endpoint="unix:///0")
    (finish,) = actions(snapshot(pool(), draining, observed={0: secret}))
    after = finished(finish)
    assert (after.phase, after.status.endpoint, after.status.failures) == (Phase.FAILED, None, 1)
    assert after.status.message == "buildkitd was killed"
    claimed = after.with_lease(lease("b").but(owner="owner-b"))
    assert "SECRET" not in str(actions(snapshot(pool(), claimed, observed={0: secret}), NOW + timedelta(minutes=1)))
    # Claimed in the instant before the exit was seen.
    held = worker(0, lease("b").but(owner="owner-b"), phase=Phase.ALLOCATED, cache_owner="owner-a")
    (failed,) = actions(snapshot(pool(), held, observed={0: secret}))
    assert (failed.worker.status.message, failed.worker.status.log_tail) == ("buildkitd was killed", "")


def test_the_log_tail_of_a_lost_lease_is_forgotten_with_its_cache():
    lost = lease().but(ended_at=NOW, end_reason=EndReason.LOST, end_message="buildkitd was killed")
    failing = {"phase": Phase.PROVISIONING, "failures": 5, "failed_at": NOW, "endpoint": None}
    held = worker(0, lost, cache_owner="owner-a", message="buildkitd was killed", log_tail="SECRET", **failing)
    assert "SECRET" in held.lease_end_message
    registered = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW)
    (drain,) = actions(snapshot(pool(), held.with_status(gateways=(registered,))))
    assert drain.worker.status.phase is Phase.DRAINING
    assert drain.worker.lease_end_message == held.lease_end_message, "its waiting clients are told"
    (finish,) = actions(snapshot(pool(), drain.worker.with_status(gateways=())))
    after = finished(finish)
    assert "SECRET" in after.ended_leases[-1].message_with_log, "its holder asks why it ended"
    assert after.status.message_with_log == "buildkitd was killed"
    (step,) = actions(snapshot(pool(), after, observed={0: seen(0)}))
    assert step == ForgetLogs(after), "the cache was wiped"
    (step,) = actions(snapshot(pool(), without_logs(after), observed={0: seen(0)}))
    assert "SECRET" not in str(step)
    over = lease("b", id="other").but(ended_at=NOW, end_reason=EndReason.RELEASED)
    (finish,) = actions(snapshot(pool(), after.with_lease(over), observed={0: seen(0, over.owner)}))
    assert [past.log_tail for past in finished(finish).ended_leases] == ["", ""]


def test_the_log_of_a_shared_cache_is_shown_to_nobody():
    """It may have output of the builds of callers before. With a history that is kept they are shown anyway."""
    for keep_history, log_tail in ((False, ""), (True, "a step of somebody")):
        owner = cache_owner_digest(Reuse.POOL, "ann", pool().uid, "", keep_history=keep_history)
        held = worker(0, lease(owner=owner), phase=Phase.ALLOCATED, cache_owner=owner)
        exited = replace(seen(0, owner), state=DaemonState.EXITED, message="killed", log_tail="a step of somebody")
        (write,) = actions(snapshot(pool(), held, observed={0: exited}))
        assert (write.worker.status.message, write.worker.status.log_tail) == ("killed", log_tail)


def test_a_worker_that_failed_says_why_after_its_lease_too():
    over = lease().but(ended_at=NOW, end_reason=EndReason.LOST)
    held = worker(0, over, phase=Phase.PROVISIONING, failures=5, endpoint=None, message="no space left\nold log")
    (finish,) = actions(snapshot(pool(), held))
    after = finished(finish)
    ready = next(
        c
        for c in pool_status(pool(), [after], PoolStatusInputs("tcp://gateway:1235"), NOW).conditions
        if c.type == "Ready"
    )
    assert ready.message.endswith(": no space left")


def test_surplus_idle_workers_are_removed_after_the_delay_least_recently_used_first():
    p = pool(scaling={"min": 1, "max": 4, "scaleDownDelay": "10m"})
    old, new = (worker(n, last_activity_at=NOW - timedelta(minutes=m)) for n, m in ((0, 30), (1, 20)))
    assert actions(snapshot(p, new, old, observed={0: seen(0), 1: seen(1)})) == [RemoveWorker(old)]


def test_a_leased_worker_is_never_removed():
    held = worker(9, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(pool(scaling={"max": 1}), held, observed={9: seen(9, "owner-a")})) == []


def test_idle_workers_beyond_a_lowered_maximum_are_removed_at_once():
    assert actions(snapshot(pool(scaling={"max": 1}), worker(9), observed={9: seen(9)})) == [RemoveWorker(worker(9))]


def test_nothing_is_decided_for_a_busy_slot():
    assert actions(snapshot(pool(), worker(0, phase=Phase.PENDING), busy=frozenset({slot(0)}))) == []


def test_a_stray_slot_has_a_daemon_and_no_worker():
    running = {number: seen(number) for number in range(4)}
    given = snapshot(pool(), worker(0), observed=running, busy={slot(2)}, unreadable_slots=frozenset({slot(3)}))
    state = state_of(given)
    state.plan(Moment(NOW))
    assert state.strays == [slot(1)]


def test_a_pools_status_has_counts_and_conditions():
    p = pool(tls={"enabled": True})
    held = worker(0, lease(), phase=Phase.ALLOCATED)
    setting = PoolStatusInputs(
        "tcp://x:1",
        ignored=("tls.enabled",),
        capacity=WorkerCapacity(4, "this cluster has host ports for 4 workers (kind-config.yaml)", "TooFewHostPorts"),
    )
    status = pool_status(p, [held, worker(1), worker(2, phase=Phase.FAILED, message="no disk")], setting, NOW)
    assert (status.workers, status.ready, status.idle, status.allocated) == (3, 2, 1, 1)
    found = {c.type: (c.status, c.message) for c in status.conditions}
    assert found == {
        "IgnoredFields": ("True", "spec.tls.enabled"),
        "Ready": ("False", "p-worker-2: no disk"),
        "Capacity": (
            "False",
            "spec.scaling.max is 10, and this cluster has host ports for 4 workers (kind-config.yaml)",
        ),
    }
    later = pool_status(p.but(status=status), [held], setting, NOW + timedelta(hours=1))
    since = {c.type: c.last_transition_time for c in later.conditions}
    assert since["IgnoredFields"] == NOW, "a condition that did not change keeps its time"


def test_a_pools_status_says_which_of_its_own_issuers_lets_strangers_in():
    def issuers(*conditions):
        own = {"issuer": "https://gitlab.com", "audience": "a", "conditions": conditions}
        p = pool(auth={"methods": ["mtls", {"type": "oidc", "oidc": own}]})
        found = {c.type: c for c in pool_status(p, [], PoolStatusInputs("tcp://x:1"), NOW).conditions}
        return found["Issuers"].status, found["Issuers"].message

    status, message = issuers({"claim": "ref", "values": ["main"]})
    assert (status, message.split(" gives ")[0]) == ("False", "spec.auth.methods[1].oidc: https://gitlab.com")
    assert issuers({"claim": "project_id", "values": ["7"]}) == ("True", "")


def test_what_the_operator_has_not_allowed_is_a_condition_and_makes_the_pool_degraded():
    asks = PoolStatusInputs("tcp://x:1", host_not_allowed="a.example.com: no", not_allowed="")
    status = pool_status(pool(), [], asks, NOW)
    found = {c.type: (c.status, c.reason, c.message) for c in status.conditions}
    assert found["HostNotAllowed"] == ("True", "NotAllowed", "a.example.com: no")
    assert found["NotAllowed"] == ("False", "AsWanted", "")
    assert found["Ready"][2] == "a.example.com: no"
    assert status.phase == "Degraded"
    elsewhere = pool_status(pool(), [], PoolStatusInputs("tcp://x:1"), NOW)
    assert {c.type for c in elsewhere.conditions} == {"IgnoredFields", "Ready"}


# --- what somebody else deletes, and caches that end with their worker -----------------------------------------


def deleted(obj):
    return obj.but(metadata=obj.metadata.but(deletion_timestamp=NOW))


def test_the_lease_of_a_deleted_worker_is_lost():
    held = deleted(worker(0, lease(), phase=Phase.ALLOCATED))
    up = {0: seen(0, "owner-a")}
    (lost,) = actions(snapshot(pool(), held, observed=up))
    assert lost == LoseLease(held, "the worker was deleted")
    over = held.with_lease(lease().but(ended_at=NOW, end_reason=EndReason.LOST))
    (finish,) = actions(snapshot(pool(), over, observed=up))
    assert isinstance(finish, FinishLease)
    assert actions(snapshot(pool(), deleted(worker(0)), observed=up)) == [RemoveWorker(deleted(worker(0)))]


def unused(*connections, ready=NOW, **changes):
    """A worker with a lease that ends when it is unused, and the registrations of gateways with these connections."""
    held = lease(metadata={END_WHEN_UNUSED: "true"}, **changes)
    registrations = tuple(
        GatewayRegistration(gateway=f"g{n}", lease_id=held.id, renewed_at=NOW + timedelta(days=n), connections=count)
        for n, count in enumerate(connections)
    )
    return worker(0, held, phase=Phase.ALLOCATED, cache_owner="owner-a", ready_at=ready, gateways=registrations)


def decided(held, now, **expiries):
    """What is decided. The registrations expire at these times on the clock of the controller."""
    until = {RegistrationKey(held.key, gateway, held.lease.id): at for gateway, at in expiries.items()}
    return decide(snapshot(pool(), held, observed={0: seen(0, "owner-a")}, registered_until=until), now)


def test_a_lease_that_nobody_ever_used_ends_two_minutes_after_its_worker_is_ready():
    """Only if it was made so. A start that takes long does not count."""
    held = unused(ready=NOW + timedelta(minutes=5))
    end = NOW + timedelta(minutes=7)
    assert decided(held, end - timedelta(seconds=1)) == Plan((), end)
    assert decided(held, end).actions == (LoseLease(held, "nobody was connected to its worker", EndReason.ABANDONED),)
    other = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a", ready_at=NOW)
    assert decided(other, end) == Plan((), other.lease.expires_at)


def test_a_lease_whose_last_connection_has_closed_ends_when_its_registrations_expire():
    """Their life is counted on one clock, whatever the clocks of the gateways say."""
    held = unused(0, 0)
    end = NOW + timedelta(seconds=70)
    expiries = {"g0": end - timedelta(seconds=10), "g1": end}
    assert decided(held, end - timedelta(seconds=1), **expiries) == Plan((), end)
    assert [type(action) for action in decided(held, end, **expiries).actions] == [LoseLease]


def test_a_lease_with_a_connection_at_one_gateway_goes_on():
    """Also if the registration has expired: the gateway or the store may have been away while the build went on."""
    held = unused(0, 1)
    for now in (NOW + timedelta(seconds=61), NOW + timedelta(minutes=59)):
        assert decided(held, now, g0=NOW, g1=NOW) == Plan((), held.lease.expires_at)


def test_a_lease_that_ends_when_it_is_unused_has_no_longer_life_than_its_ttl():
    held = unused(0, expires_at=NOW + timedelta(seconds=5))
    assert decided(held, NOW).wake_at == NOW + timedelta(seconds=5)


def test_a_deleted_pool_ends_its_leases_and_removes_the_rest():
    gone = deleted(pool(scaling={"min": 1}))
    held, idle = worker(0, lease(), phase=Phase.ALLOCATED), worker(1)
    done = actions(snapshot(gone, held, idle, observed={0: seen(0, "owner-a"), 1: seen(1)}))
    assert done == [LoseLease(held, "the pool was deleted"), RemoveWorker(idle)]


def test_a_worker_is_protected_while_it_is_leased_and_no_longer():
    held, idle = worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a"), worker(1)
    loose = replace(seen(0, "owner-a"), protected=False)
    assert actions(snapshot(pool(), held, observed={0: loose})) == [SetProtection(held, protected=True)]
    tight = replace(seen(1), protected=True)
    assert actions(snapshot(pool(scaling={"min": 1}), idle, observed={1: tight})) == [
        SetProtection(idle, protected=False)
    ]


def test_an_ephemeral_cache_gets_its_owner_before_the_next_lease():
    over = lease().but(ended_at=NOW, end_reason=EndReason.RELEASED)
    unmarked = replace(seen(0), ephemeral_cache=True)
    held = worker(0, over, phase=Phase.IDLE, ephemeral_cache=True)
    assert actions(snapshot(pool(), held, observed={0: unmarked})) == [SetCacheOwner(held, over.owner)]
    silent = replace(unmarked, state=DaemonState.STARTING)
    assert actions(snapshot(pool(), held, observed={0: silent})) == [SetCacheOwner(held, over.owner)]
    (finish,) = actions(snapshot(pool(), held, observed={0: replace(unmarked, cache_owner=over.owner)}))
    after = finished(finish).with_lease(lease("b"))
    assert after.routable_endpoint is None, "otherwise the next holder would be routed to a cache that is not theirs"


@pytest.mark.parametrize(
    ("phase", "owner", "ephemeral", "leads"),
    [
        (Phase.IDLE, "owner-a", False, True),
        (Phase.IDLE, None, True, True),
        (Phase.IDLE, None, False, False),
        (Phase.IDLE, "owner-b", True, False),
        (Phase.ALLOCATED, "owner-a", False, True),
        (Phase.PROVISIONING, "owner-a", True, False),
    ],
)
def test_a_claimed_worker_is_routable_at_once_if_its_cache_can_only_be_the_holders(phase, owner, ephemeral, leads):
    held = worker(0, lease(), phase=phase, cache_owner=owner, ephemeral_cache=ephemeral)
    assert (held.routable_endpoint is not None) is leads
    assert held.with_lease(None).routable_endpoint is None


def test_a_finalizer_keeps_a_worker_exactly_while_it_is_leased():
    held = worker(0).with_lease(lease())
    assert held.metadata.finalizers == (FINALIZER,)
    assert held.with_lease(lease()).metadata.finalizers == (FINALIZER,)
    assert held.with_lease(None).metadata.finalizers == ()


def test_a_lease_whose_token_is_being_made_is_not_lost_because_the_clocks_of_two_machines_differ():
    behind = NOW - timedelta(minutes=10)
    given = lease(token_sha256="", now=behind, undelivered=Undelivered(replica="r"), expires_at=NOW + TOKEN_TIMEOUT)
    held = worker(0, given, phase=Phase.ALLOCATED, cache_owner="owner-a")
    assert actions(snapshot(pool(), held, observed={0: seen(0, "owner-a")})) == []


def test_a_lease_that_never_got_its_token_is_lost():
    held = worker(0, lease(token_sha256=""), phase=Phase.ALLOCATED, cache_owner="owner-a")
    seen_up = {0: seen(0, "owner-a")}
    assert decide(snapshot(pool(), held, observed=seen_up), NOW).wake_at == NOW + TOKEN_TIMEOUT
    assert actions(snapshot(pool(), held, observed=seen_up), NOW + TOKEN_TIMEOUT) == [
        LoseLease(held, "the request for it was never answered")
    ]


def test_a_failure_without_words_gets_some():
    failed = failed_worker(worker(0), " ", "", NOW)
    assert failed.status.message == "its buildkitd ended, and nothing said why"
    for wordless in (failed.with_status(message=""), failed.with_status(message="", log_tail="its end")):
        ready = pool_status(pool(), [wordless], PoolStatusInputs("tcp://localhost:1235"), NOW).conditions[1]
        assert ready.message.startswith("p-worker-0: its buildkitd does not run")
