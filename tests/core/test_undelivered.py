"""When a lease ends that no caller has: after the time for which one controller has seen it unchanged."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from bkpool.core.names import Slot
from bkpool.core.observation import Snapshot
from bkpool.core.reconcile.actions import Action, LoseLease
from bkpool.core.reconcile.decide import decide
from bkpool.core.reconcile.undelivered import LONGEST_STEP, UndeliveredFor, UndeliveredLeases
from bkpool.core.worker import UNDELIVERED_LIFE, EndReason, Phase, Undelivered, Worker
from support.objects import NOW, lease, pool, seen, worker

UNDELIVERED = Undelivered(replica="api-1/7")
STEPS = UNDELIVERED_LIFE // LONGEST_STEP


def leased(**changes: object) -> Worker:
    given = {"undelivered": UNDELIVERED, "expires_at": NOW + timedelta(hours=24), **changes}
    return worker(0, lease(**given), phase=Phase.ALLOCATED, cache_owner="owner-a")


def look(watched: UndeliveredLeases, one: Worker | None, now: datetime) -> UndeliveredFor:
    """What is known after the only worker was looked at."""
    watched.pass_time(now)
    watched.look(leased().key, one)
    return watched.now()


def decided(one: Worker, watched: UndeliveredLeases, now: datetime = NOW) -> tuple[Action, ...]:
    snapshot = Snapshot(
        pool=pool(scaling={"max": 1}),
        workers=(one,),
        observed={Slot("default", "p", 0): seen(0, "owner-a")},
        caches={},
        undelivered_for=look(watched, one, now),
    )
    return decide(snapshot, now).actions


def lost(actions: tuple[Action, ...]) -> list[EndReason]:
    return [action.reason for action in actions if isinstance(action, LoseLease)]


def test_a_lease_that_nobody_renews_ends_two_minutes_after_it_was_first_seen():
    watched = UndeliveredLeases()
    for step in range(STEPS):
        assert lost(decided(leased(), watched, NOW + step * LONGEST_STEP)) == []
    assert lost(decided(leased(), watched, NOW + STEPS * LONGEST_STEP)) == [EndReason.ABANDONED]


def test_the_controller_looks_again_in_time():
    watched = UndeliveredLeases()
    held = leased()
    snapshot = Snapshot(pool(), (held,), {}, {}, undelivered_for=look(watched, held, NOW))
    wake_at = decide(snapshot, NOW).wake_at
    assert wake_at is not None
    assert wake_at <= NOW + LONGEST_STEP


def test_a_renewal_begins_the_time_again():
    watched = UndeliveredLeases()
    for step in range(3 * STEPS):
        renewed = leased(undelivered=UNDELIVERED.but(renewals=step // (STEPS - 1)))
        assert lost(decided(renewed, watched, NOW + step * LONGEST_STEP)) == []


def test_after_a_start_the_time_begins_again_however_long_nothing_ran():
    assert lost(decided(leased(), UndeliveredLeases(), NOW + timedelta(hours=5))) == []


def test_a_clock_that_jumps_counts_as_one_step():
    watched = UndeliveredLeases()
    look(watched, leased(), NOW)
    assert look(watched, leased(), NOW + timedelta(hours=10)).get("lease") == LONGEST_STEP
    assert look(watched, leased(), NOW).get("lease") == LONGEST_STEP


@pytest.mark.parametrize(
    "one",
    [
        leased(undelivered=None),
        leased().with_status(connected_lease="lease"),
        leased(ended_at=NOW, end_reason=EndReason.RELEASED),
    ],
    ids=["delivered, or of an earlier version", "connected", "over"],
)
def test_only_a_lease_that_nobody_has_ends(one):
    watched = UndeliveredLeases()
    for step in range(2 * STEPS):
        assert lost(decided(one, watched, NOW + step * LONGEST_STEP)) == []


def test_a_connection_with_an_earlier_lease_of_the_worker_says_nothing():
    assert leased().with_status(connected_lease="another").undelivered == UNDELIVERED


def test_leases_that_are_gone_are_forgotten():
    watched = UndeliveredLeases()
    look(watched, leased(), NOW)
    assert look(watched, None, NOW + LONGEST_STEP).get("lease") is None
    assert look(watched, leased(), NOW + 2 * LONGEST_STEP).get("lease") == timedelta(0)


def test_the_next_lease_of_a_worker_begins_its_own_time():
    watched = UndeliveredLeases()
    look(watched, leased(), NOW)
    assert look(watched, leased(id="next"), NOW + LONGEST_STEP).get("next") == timedelta(0)
