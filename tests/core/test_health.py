"""A daemon that does not answer: noted, replaced when it is hung, and never because of a stall of some seconds."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from bkpool.core.observation import Silence, Snapshot
from bkpool.core.placement import choose
from bkpool.core.reconcile.actions import (
    CheckDaemon,
    LoseLease,
    ReplaceDaemon,
    StartDaemon,
    WriteStatus,
)
from bkpool.core.reconcile.decide import decide
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, failed_worker
from bkpool.core.reconcile.health import DEFAULT_HEALTH
from bkpool.core.registrations import RegistrationKey
from bkpool.core.worker import GatewayRegistration, Phase
from bkpool.gateway.session.limits import GatewayLimits
from support.objects import NOW, indexed, lease, pool, seen, slot, snapshot, worker

STALL = timedelta(seconds=5)
"""The longest stall of the chaos test, which ends nothing."""
QUIET = DEFAULT_HEALTH.quiet
CONNECTED = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW)


def silent(lasted, lost="", owner=None, *, builds_fail=False):
    return {0: replace(seen(0, owner), silence=Silence(lasted, lost, builds_fail))}


def idle(**status):
    return worker(0, **status)


def held(**status):
    return worker(0, lease(), phase=Phase.ALLOCATED, cache_owner="owner-a", **status)


def step(one, observed, now=NOW):
    actions = decide(snapshot(pool(), one, observed=observed), now).actions
    assert len(actions) <= 1
    return next(iter(actions), None)


def test_an_idle_worker_that_does_not_answer_is_given_to_nobody_and_is_not_counted_as_ready():
    noted = step(idle(), silent(timedelta(seconds=2)))
    assert isinstance(noted, WriteStatus)
    assert (noted.worker.status.silent_since, noted.worker.status.phase) == (NOW, Phase.IDLE)
    assert noted.worker.status.message == "buildkitd does not answer"
    assert choose(pool(scaling={"max": 1}), indexed([noted.worker]), dict, "owner-a") is None
    assert choose(pool(scaling={"max": 1}), indexed([idle()]), dict, "owner-a") == idle()
    counts = indexed([noted.worker]).counts
    assert (counts.workers, counts.ready, counts.idle) == (1, 0, 0)
    assert step(noted.worker, silent(STALL)) is None, "a stall ends nothing"


def test_an_idle_worker_that_answers_again_is_asked_before_it_is_given_away():
    noted = idle().noted_silent(NOW - STALL)
    assert step(noted, {0: seen(0)}) == CheckDaemon(noted)
    assert noted.noted_answering() == idle(), "after that it is as it was"


def test_an_idle_worker_that_hangs_is_replaced_and_started_again():
    noted = idle().noted_silent(NOW)
    action = step(noted, silent(DEFAULT_HEALTH.unanswered))
    assert action == ReplaceDaemon(noted, "buildkitd has not answered for 8 s, so it was ended")
    failed = failed_worker(noted, action.message, "", NOW)
    assert (failed.status.silent_since, failed.status.endpoint) == (None, None)
    assert step(failed, {}, NOW + timedelta(seconds=1)) == StartDaemon(failed, None)


@pytest.mark.parametrize("one", [idle(), held()], ids=["idle", "leased without a connection"])
def test_a_daemon_that_nobody_can_reach_any_more_is_replaced_at_once(one):
    gone = silent(timedelta(seconds=0.6), "/run/x.sock was removed", one.lease and "owner-a")
    action = step(one.noted_silent(NOW), gone)
    assert action == ReplaceDaemon(one.noted_silent(NOW), "/run/x.sock was removed, so buildkitd was ended")


def test_a_daemon_that_lost_its_cache_is_replaced_at_once_though_a_gateway_is_registered():
    """Each build on it fails, and a client that tries again and again must not keep it as it is by its bytes."""
    one = held(gateways=(CONNECTED,))
    gone = silent(timedelta(seconds=0.6), "/slots/x was removed", "owner-a", builds_fail=True)
    assert step(one, gone) == ReplaceDaemon(one, "/slots/x was removed, so buildkitd was ended")


def test_a_daemon_that_lost_its_socket_is_replaced_while_a_gateway_holds_the_next_build():
    limits = GatewayLimits()
    assert limits.worker_quiet < DEFAULT_HEALTH.quiet_if_lost.total_seconds() < limits.first_wait


@pytest.mark.parametrize(
    ("lost", "quiet"), [("", DEFAULT_HEALTH.quiet), ("/run/x.sock was removed", DEFAULT_HEALTH.quiet_if_lost)]
)
def test_a_leased_worker_hangs_only_if_neither_an_answer_nor_a_byte_has_come_for_some_seconds(lost, quiet):
    one = held(gateways=(CONNECTED,))
    noted = step(one, silent(STALL, lost, "owner-a"))
    assert isinstance(noted, WriteStatus)
    waiting = noted.worker
    later = decide(snapshot(pool(), waiting, observed=silent(STALL, lost, "owner-a")), NOW)
    assert (later.actions, later.wake_at) == ((), NOW + quiet)
    just_before = NOW + quiet - timedelta(milliseconds=1)
    assert step(waiting, silent(quiet, lost, "owner-a"), just_before) is None
    action = step(waiting, silent(quiet, lost, "owner-a"), NOW + quiet)
    assert isinstance(action, ReplaceDaemon)
    again = step(waiting.noted_answering(), silent(quiet, lost, "owner-a"), NOW + quiet)
    assert isinstance(again, WriteStatus), "a gateway has got a byte: the time begins again"
    assert again.worker.status.silent_since == NOW + quiet


def test_what_a_gateway_did_not_hear_is_no_reason_by_itself():
    """Its client may be silent for an hour. Only probes without an answer for some seconds make it one."""
    one = held(gateways=(CONNECTED,)).noted_silent(NOW - timedelta(hours=1))
    assert step(one, {0: seen(0, "owner-a")}) == CheckDaemon(one)
    enough, moment = DEFAULT_HEALTH.unanswered_meanwhile, timedelta(milliseconds=1)
    assert not isinstance(step(one, silent(enough - moment, owner="owner-a")), ReplaceDaemon)
    assert isinstance(step(one, silent(enough, owner="owner-a")), ReplaceDaemon)


def test_a_gateway_whose_clock_is_ahead_does_not_delay_anything():
    one = held(gateways=(CONNECTED,)).noted_silent(NOW + timedelta(hours=1))
    noted = step(one, silent(STALL, owner="owner-a"))
    assert isinstance(noted, WriteStatus)
    assert noted.worker.status.silent_since == NOW


def test_a_gateway_that_is_gone_protects_a_hung_worker_for_a_minute_at_most():
    one = held(gateways=(CONNECTED,)).noted_silent(NOW)
    expired = {RegistrationKey(one.key, "g", "lease"): NOW}
    observed = {slot(0): silent(DEFAULT_HEALTH.unanswered, owner="owner-a")[0]}
    (action,) = decide(Snapshot(pool(), (one,), observed, {}, registered_until=expired), NOW).actions
    assert isinstance(action, ReplaceDaemon)


def test_the_lease_of_a_worker_that_hung_goes_on_in_its_slot():
    one = held(gateways=(CONNECTED,)).noted_silent(NOW - QUIET)
    action = step(one, silent(QUIET, owner="owner-a"))
    failed = failed_worker(one, action.message, "", NOW)
    assert (failed.lease, failed.status.phase) == (one.lease, Phase.PROVISIONING)
    assert failed.status.message == "buildkitd has not answered for 15 s, so it was ended"
    assert step(failed, {}, NOW + timedelta(seconds=1)) == StartDaemon(failed, "owner-a")


def test_failures_count_for_the_lease_that_they_happened_in():
    """Six failures of a worker that nobody had leased do not end the lease of the next tenant."""
    floor = idle(ready_at=NOW)
    for _ in range(6):
        floor = failed_worker(floor, "killed", "", NOW)
    assert floor.status.failures == 6
    claimed = floor.with_lease(lease())
    assert step(claimed, {}) == StartDaemon(claimed, "owner-a"), "at once, and not after a pause of earlier failures"
    for number in range(1, DEFAULT_LIMITS.max_failures + 1):
        claimed = failed_worker(claimed, "killed", "", NOW)
        assert claimed.status.failures == number
    assert isinstance(step(claimed, {}), LoseLease)
    next_tenant = claimed.with_lease(lease("b", id="next"))
    assert step(next_tenant, {}) == StartDaemon(next_tenant, "owner-b")
    left = claimed.with_lease(None)
    assert decide(snapshot(pool(), left), NOW).actions == (), "without a lease its pauses go on growing"


def test_a_slot_is_not_touched_twice():
    assert decide(snapshot(pool(), idle(), observed=silent(QUIET), busy=frozenset({slot(0)})), NOW).actions == ()
