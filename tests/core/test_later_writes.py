"""What follows from a lease alone is written later, if it still holds. What somebody waits for is written at once."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from bkpool.core.observation import DaemonState
from bkpool.core.reconcile.actions import SetProtection, WriteStatus
from bkpool.core.reconcile.announcements import Announcements
from bkpool.core.reconcile.decide import decide
from bkpool.core.reconcile.later_writes import DEFAULT_PAUSES, SeenLeases
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


def test_a_worker_is_protected_soon_and_stays_so_for_its_next_lease():
    loose, tight = {0: replace(UP[0], protected=False)}, {0: replace(UP[0], protected=True)}
    held, idle = HELD.with_status(phase=Phase.ALLOCATED), FREED.with_status(phase=Phase.IDLE)
    assert (plan(held, SECOND / 2, loose).actions, plan(held, SECOND / 2, loose).wake_at) == ((), NOW + SECOND)
    assert plan(held, SECOND, loose).actions == (SetProtection(held, protected=True),)
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
    shown = [one.shown_phase for one in (HELD, OVER, FREED, HELD.with_status(cache_owner="owner-b"))]
    assert shown == [Phase.ALLOCATED, Phase.DRAINING, Phase.IDLE, Phase.IDLE]
    assert HELD.with_status(phase=Phase.PROVISIONING).shown_phase is Phase.PROVISIONING


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
