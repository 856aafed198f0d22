"""What follows from a lease alone is written later, if it still holds. What somebody waits for is written at once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from bkpool.allocation import no_worker
from bkpool.api.models import WorkerView
from bkpool.core.observation import DaemonState
from bkpool.core.reconcile.actions import SetProtection, WriteStatus
from bkpool.core.reconcile.announcements import Announcements
from bkpool.core.reconcile.decide import decide, state_of
from bkpool.core.reconcile.later_writes import DEFAULT_PAUSES, SeenLeases
from bkpool.core.reconcile.lease_end import with_lease_remembered, without_lease
from bkpool.core.reconcile.pool_counts import PoolCounts
from bkpool.core.reconcile.pool_state import Spec
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.registrations import NONE_SEEN, SeenRegistrations
from bkpool.core.shown_worker import shown_message, shown_phase, wait_message
from bkpool.core.worker import REMEMBERED_LEASES, EndedLease, EndReason, GatewayRegistration, Phase
from support.objects import NOW, indexed, lease, pool, seen, snapshot, worker

SECOND = timedelta(seconds=1)
UP = {0: seen(0, "owner-a")}
ONE = pool(scaling={"min": 1, "max": 1})
HELD = worker(0, lease(), cache_owner="owner-a")
FREED = worker(0, phase=Phase.ALLOCATED, cache_owner="owner-a")
"""A worker whose lease has just left it."""
REGISTERED = (GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW),)
OVER = worker(
    0,
    lease(ended_at=NOW, end_reason=EndReason.RELEASED),
    cache_owner="owner-a",
    gateways=REGISTERED,
    phase=Phase.IDLE,
)


def plan(one, after, observed=None):
    """What is to be done so long after the lease was seen as it is."""
    return decide(snapshot(ONE, one, observed=observed or UP, lease_since={one.key: NOW}), NOW + after)


@pytest.mark.parametrize(
    ("one", "phase"),
    [(HELD, Phase.ALLOCATED), (FREED, Phase.IDLE), (OVER, Phase.DRAINING)],
    ids=["held", "free", "over"],
)
def test_a_phase_is_written_a_second_after_the_lease_has_changed_it(one, phase):
    early = plan(one, 0.9 * SECOND)
    assert (early.actions, early.wake_at) == ((), NOW + SECOND)
    (write,) = plan(one, SECOND).actions
    assert write.worker.status.phase is phase


@pytest.mark.parametrize(
    "change",
    [{"cache_owner": None}, {"endpoint": None}, {"endpoint": "unix:///else"}, {"phase": Phase.PENDING}],
)
def test_what_somebody_waits_for_is_written_at_once(change):
    (write,) = plan(HELD.with_status(**change), timedelta(0)).actions
    assert isinstance(write, WriteStatus)
    assert write.worker.routable_endpoint == "unix:///0"


def test_a_daemon_that_exits_is_noted_at_once():
    exited = {0: seen(0, "owner-a", DaemonState.EXITED, "killed")}
    for one in (HELD, FREED):
        (write,) = plan(one, timedelta(0), exited).actions
        assert write.worker.status.message == "killed"


def test_a_worker_is_protected_at_once_and_stays_so_for_its_next_lease():
    loose, tight = {0: replace(UP[0], protected=False)}, {0: replace(UP[0], protected=True)}
    held, idle = HELD.with_status(phase=Phase.ALLOCATED), FREED.with_status(phase=Phase.IDLE)
    for one in (held, HELD.with_status(phase=Phase.IDLE)):
        assert plan(one, timedelta(0), loose).actions == (SetProtection(one, protected=True),)
    assert plan(HELD.with_status(phase=Phase.IDLE), timedelta(0), tight).actions == (), "of the lease before"
    assert plan(idle, DEFAULT_PAUSES.protected - SECOND, tight).actions == ()
    assert plan(idle, DEFAULT_PAUSES.protected, tight).actions == (SetProtection(idle, protected=False),)
    replaced = {0: replace(tight[0], goes_unprotected=True)}
    assert plan(idle, timedelta(0), replaced).actions == (SetProtection(idle, protected=False),)


def test_the_time_counts_from_a_change_of_the_lease_on_the_clock_of_the_controller():
    leases, key = SeenLeases(), HELD.key

    def since(seconds):
        return leases.at(NOW, seconds).get(key, None)

    leases.look(key, HELD, 10.0)
    renewed = HELD.with_lease(lease(expires_at=NOW + timedelta(hours=5))).with_status(phase=Phase.ALLOCATED)
    leases.look(key, renewed, 12.0)
    assert since(13.0) == NOW - 3 * SECOND, "a renewal and a written phase change nothing"
    for one in (OVER, FREED, HELD.with_lease(lease(id="other"))):
        leases.look(key, one, 20.0)
        assert since(20.0) == NOW
    leases.look(key, None, 21.0)
    assert since(21.0) is None


@pytest.mark.parametrize("stored", [Phase.ALLOCATED, Phase.DRAINING])
def test_a_worker_whose_lease_has_left_it_is_idle_although_that_is_not_stored(stored):
    freed = FREED.with_status(phase=stored)
    index = indexed([freed])
    assert (index.counts.idle, index.counts.ready, list(index.idle_of("owner-a"))) == (1, 1, [freed])
    assert freed.with_status(endpoint=None).phase is Phase.PENDING
    assert freed.with_status(endpoint=None, failures=1).phase is Phase.FAILED
    assert indexed([freed.with_status(silent_since=NOW)]).counts.idle == 0


def test_a_person_is_shown_the_phase_that_follows_from_the_lease():
    shown = [shown_phase(one, NOW) for one in (HELD, OVER, FREED, HELD.with_status(cache_owner="owner-b"))]
    assert shown == [Phase.ALLOCATED, Phase.DRAINING, Phase.IDLE, Phase.PROVISIONING]
    assert shown_phase(HELD.with_status(phase=Phase.PROVISIONING), NOW) is Phase.PROVISIONING
    assert shown_phase(HELD, HELD.lease.expires_at) is Phase.DRAINING, "it has expired"


OF_A = "the lease is released; builds may finish"


@pytest.mark.parametrize("stored", [Phase.IDLE, Phase.ALLOCATED, Phase.DRAINING])
def test_the_next_holder_is_told_nothing_of_the_lease_before(stored):
    """Its worker is wiped and started for them while the status still says that the lease before was draining."""
    message = OF_A if stored is Phase.DRAINING else ""
    theirs = worker(0, lease("b"), cache_owner="owner-a").with_status(
        phase=stored, endpoint="unix:///0", message=message, log_tail="SECRET" if message else ""
    )
    assert shown_phase(theirs, NOW) is Phase.PROVISIONING
    assert (shown_message(theirs, NOW), wait_message(theirs)) == ("", "")
    error = no_worker.not_ready(theirs, SECOND, NOW)
    assert error.message.endswith("was not ready within 1s: it is Provisioning")
    view = WorkerView.of(theirs, NOW, whole=True)
    assert (view.phase, view.message) == ("Provisioning", "")
    assert shown_phase(theirs.with_status(cache_owner="owner-b"), NOW) is Phase.ALLOCATED
    starting = theirs.with_status(phase=Phase.PENDING, message="its image is pulled", log_tail="")
    assert "its image is pulled" in no_worker.not_ready(starting, SECOND, NOW).message


def test_what_is_said_of_a_lease_that_has_ended_is_about_that_lease():
    stale = {"phase": Phase.DRAINING, "endpoint": "unix:///0", "cache_owner": "owner-a", "message": OF_A}
    assert shown_message(worker(0, **stale), NOW) == ""
    revoked = worker(0, lease(ended_at=NOW, end_reason=EndReason.REVOKED), **stale)
    assert shown_message(revoked, NOW) == "the lease is revoked; its builds were stopped"
    expired = worker(0, lease(expires_at=NOW), **stale)
    assert shown_message(expired, NOW) == "the lease is expired; builds may finish"
    lost = lease(ended_at=NOW, end_reason=EndReason.LOST, end_message="the pool was deleted")
    assert shown_message(worker(0, lost, **stale), NOW) == "the pool was deleted"
    failed = worker(0, lost, **{**stale, "message": "killed", "log_tail": "log"}, failures_of="lease")
    assert shown_message(failed, NOW) == "killed\nThe end of its log:\nlog"


def test_a_free_worker_of_a_pool_that_cannot_be_read_is_written_as_idle_when_that_is_due():
    state = state_of(snapshot(ONE, FREED, observed=UP))
    state.set_pool(ONE, Spec.UNREADABLE)
    since = {FREED.key: NOW}
    early = state.plan(Moment(NOW, lease_since=since))
    assert (early.actions, early.wake_at) == ((), NOW + SECOND)
    (write,) = state.plan(Moment(NOW + SECOND, lease_since=since)).actions
    assert write.worker.status.phase is Phase.IDLE
    idle = FREED.with_status(phase=Phase.IDLE, endpoint="unix:///else")
    state.set_worker(idle.slot, idle)
    assert state.plan(Moment(NOW + SECOND, lease_since=since)).actions == (), "nothing else is written"


def past(token, **more):
    return EndedLease(token_sha256=token, ended_at=NOW, reason=EndReason.RELEASED, **more)


def test_leases_that_an_earlier_version_remembers_are_remembered_beside_the_new_ones():
    one = worker(0, ended=(past("old"), past("both", message="stale")))
    both = one.but(spec=one.spec.but(ended=(past("both", message="new"), past("new"))))
    assert [(each.token_sha256, each.message) for each in both.ended_leases] == [
        ("old", ""),
        ("both", "new"),
        ("new", ""),
    ]
    many = one.but(spec=one.spec.but(ended=tuple(past(str(n)) for n in range(REMEMBERED_LEASES))))
    assert many.ended_leases == many.spec.ended


def test_the_last_use_and_the_number_of_leases_are_the_newest_that_is_stored():
    one = worker(0, last_activity_at=NOW, allocation_count=7)
    assert (one.last_activity_at, one.allocation_count) == (NOW, 7)
    later = one.but(spec=one.spec.but(last_activity_at=NOW + SECOND, allocation_count=8))
    assert (later.last_activity_at, later.allocation_count) == (NOW + SECOND, 8)
    (write,) = plan(later.with_status(phase=Phase.DRAINING, cache_owner="owner-a"), SECOND).actions
    assert (write.worker.status.last_activity_at, write.worker.status.allocation_count) == (NOW + SECOND, 8)


def test_a_clock_that_was_once_ahead_is_forgotten_with_the_next_lease():
    ahead = worker(0, last_activity_at=NOW + timedelta(days=300), allocation_count=1, phase=Phase.ALLOCATED)
    freed = with_lease_remembered(ahead.with_status(cache_owner="owner-a"), past("now"), NOW)
    assert freed.last_activity_at == NOW
    (write,) = plan(freed, SECOND).actions
    assert write.worker.status.last_activity_at == NOW
    later = NOW + SECOND
    by_older = freed.with_status(last_activity_at=later, allocation_count=freed.allocation_count + 1)
    assert by_older.last_activity_at == later, "an earlier version has ended another lease"


def numbered(count, token="spec"):
    return tuple(past(f"{token}-{n}").but(ended_at=NOW + n * SECOND) for n in range(count))


def test_the_newest_lease_that_an_earlier_version_has_ended_is_remembered_and_counted():
    newest = past("newest").but(ended_at=NOW + timedelta(hours=1))
    one = worker(0, last_activity_at=newest.ended_at, allocation_count=12, ended=(newest,))
    spec = one.spec.but(ended=numbered(REMEMBERED_LEASES), last_activity_at=NOW, allocation_count=20)
    both = one.but(spec=spec)
    assert [each.token_sha256 for each in both.ended_leases][-1] == "newest"
    assert len(both.ended_leases) == REMEMBERED_LEASES
    assert (both.allocation_count, both.last_activity_at) == (21, newest.ended_at)
    left_out = past("left out").but(ended_at=NOW - SECOND)
    assert both.with_status(ended=(left_out, newest)).allocation_count == 21
    after = with_lease_remembered(both, past("next").but(ended_at=NOW + timedelta(hours=2)), NOW)
    assert [each.token_sha256 for each in after.ended_leases][-2:] == ["newest", "next"]
    assert after.allocation_count == 22


def test_what_an_earlier_version_remembers_in_the_status_moves_to_the_spec_without_its_log():
    over = lease(ended_at=NOW, end_reason=EndReason.RELEASED)
    held = worker(0, over, cache_owner="owner-a", ended=(past("old", log_tail="SECRET"),))
    (finish,) = plan(held, timedelta(0)).actions
    assert [each.log_tail for each in finish.status.ended] == [""], "nobody reads it after the next lease"
    after = without_lease(with_lease_remembered(held.but(status=finish.status), finish.ended, NOW))
    assert [each.token_sha256 for each in after.spec.ended] == ["old", "digest-lease"]
    (write,) = plan(after.with_status(phase=Phase.ALLOCATED), SECOND).actions
    assert write.worker.status.ended == ()


def test_the_log_of_the_last_lease_stays_until_the_next_one_has_ended():
    one = FREED.with_status(ended=(past("older", log_tail="OLD"), past("lost", log_tail="LOG")))
    (write,) = plan(one, SECOND).actions
    assert [each.log_tail for each in write.worker.status.ended] == ["", "LOG"]
    (write,) = plan(one.with_status(cache_owner="owner-b"), SECOND).actions
    assert [each.log_tail for each in write.worker.status.ended] == ["", ""]


def test_registrations_of_leases_that_are_gone_leave_with_the_next_write_and_are_not_counted():
    gone = GatewayRegistration(gateway="dead", lease_id="gone", renewed_at=NOW, connections=5)
    this = GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW, connections=2)
    for one, left in ((FREED, ()), (HELD, (this,))):
        registered = one.with_status(gateways=(gone, this), phase=Phase.DRAINING)
        counts = PoolCounts()
        counts.put(registered.slot, registered)
        assert counts.connections(NONE_SEEN, NOW) == (2 if left else 0)
        expired = SeenRegistrations()
        expired.look(registered.key, registered, 0)
        until = expired.at(NOW + SECOND, 61)
        (write,) = decide(snapshot(ONE, registered, observed=UP, registered_until=until), NOW + SECOND).actions
        assert write.worker.status.gateways == left
        live = decide(snapshot(ONE, registered, observed=UP), NOW + SECOND).actions[0].worker.status.gateways
        assert live == (gone, this)


def test_a_lease_is_announced_once_when_its_holder_can_use_it():
    announcements, key = Announcements(), HELD.key

    def look(one):
        announcements.look(key, one, NOW)
        return [found.held_lease.id for found in announcements.take()]

    assert look(FREED.with_status(phase=Phase.IDLE)) == []
    assert look(HELD.with_status(cache_owner="owner-b")) == [], "its cache is wiped first"
    assert look(HELD) == ["lease"]
    assert look(HELD.with_status(phase=Phase.ALLOCATED)) == []
    assert look(OVER) == []
    next_one = HELD.with_lease(lease(id="next")).with_status(phase=Phase.ALLOCATED)
    assert look(next_one) == ["next"], "nothing was written between the two leases"
    assert look(None) == []
    assert look(next_one) == [], "another controller has announced it"
    assert look(HELD.with_lease(lease(id="over", expires_at=NOW))) == []
