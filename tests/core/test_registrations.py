"""The registrations of gateways whose clock is not that of the controller (rule 10, docs/rules.md#r10)."""

from datetime import timedelta

import pytest

from bkpool.core.gateway_heartbeat import (
    ABSENT,
    GatewayHeartbeat,
    HeartbeatStatus,
    HeartbeatVersion,
    open_connections,
)
from bkpool.core.names import Key
from bkpool.core.reconcile.actions import FinishLease
from bkpool.core.reconcile.decide import decide
from bkpool.core.registrations import NONE_SEEN, REGISTRATION_LIFE, SeenRegistrations, live_registrations
from bkpool.core.resource import Metadata
from bkpool.core.worker import GatewayRegistration, Phase
from support.objects import NOW, lease, pool, seen, snapshot, worker

LIFE = REGISTRATION_LIFE.total_seconds()


def registered(skew=timedelta(), **more):
    return GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW + skew, **more)


def released(*gateways):
    return worker(0, lease(ended_at=NOW), phase=Phase.DRAINING, cache_owner="owner-a", gateways=gateways)


def decided(held, registrations, passed):
    """What is decided this many seconds after NOW, on the clock of the controller."""
    now = NOW + timedelta(seconds=passed)
    registrations.look(held.key, held, passed)
    registered_until = registrations.at(now, passed)
    by_slot = {held.slot: seen(0, "owner-a")}
    given = snapshot(pool(), held)
    return decide(type(given)(given.pool, (held,), by_slot, {}, registered_until=registered_until), now)


@pytest.mark.parametrize("skew", [timedelta(), timedelta(minutes=-10), timedelta(minutes=10)])
def test_an_entry_lives_for_its_life_after_it_was_seen_whatever_the_gateways_clock_says(skew):
    registrations, held = SeenRegistrations(), released(registered(skew))
    for passed in (0, 1, LIFE - 1):
        plan = decided(held, registrations, passed)
        assert plan.actions == ()
        assert plan.wake_at == NOW + REGISTRATION_LIFE
    (finish,) = decided(held, registrations, LIFE).actions
    assert isinstance(finish, FinishLease)


@pytest.mark.parametrize(
    "change", [{"skew": timedelta(seconds=20)}, {"skew": timedelta(hours=-1)}, {"connections": 3}]
)
def test_each_change_of_an_entry_begins_its_life_anew(change):
    registrations = SeenRegistrations()
    decided(released(registered()), registrations, 0)
    renewed = released(registered(**change))
    assert decided(renewed, registrations, LIFE - 1).actions == ()
    assert decided(renewed, registrations, 2 * LIFE - 2).actions == ()
    assert decided(renewed, registrations, 2 * LIFE - 1).actions


def test_another_controller_counts_from_when_it_saw_the_entry_first():
    held = released(registered())
    decided(held, SeenRegistrations(), 0)
    later = SeenRegistrations()
    assert decided(held, later, 1000).actions == ()
    assert decided(held, later, 1000 + LIFE).actions


def test_the_wall_clock_alone_ends_no_registration():
    """A laptop slept: the wall clock is ten hours further, the monotonic one is not, and the gateway goes on."""
    registrations, held = SeenRegistrations(), released(registered())
    registrations.look(held.key, held, 0)
    now = NOW + timedelta(hours=10)
    assert live_registrations(held, registrations.at(now, 5), now) == [
        (registered(), now + REGISTRATION_LIFE - timedelta(seconds=5))
    ]


def test_what_nobody_has_looked_at_is_valid_and_what_is_gone_is_forgotten():
    held, registrations = released(registered()), SeenRegistrations()
    assert live_registrations(held, NONE_SEEN, NOW) == [(registered(), NOW + REGISTRATION_LIFE)]
    for passed, found in ((0, held), (10, released()), (20, held), (30, None), (50, held)):
        registrations.look(held.key, found, passed)
    assert live_registrations(held, registrations.at(NOW, 50), NOW) == [(registered(), NOW + REGISTRATION_LIFE)]


# --- heartbeats -----------------------------------------------------------------------------------------------------

BEAT = Key("team", "g-1")


def heartbeat(at, *, uid="u", **leases):
    metadata = Metadata(name=BEAT.name, namespace=BEAT.namespace, uid=uid)
    return GatewayHeartbeat(
        metadata=metadata, status=HeartbeatStatus(renewed_at=NOW + timedelta(seconds=at), leases=leases)
    )


def kept(registrations, seconds):
    """Whether the one registration of a released lease still keeps it on its worker."""
    held = released(registered(heartbeat=str(BEAT)))
    registrations.look(held.key, held, seconds)
    now = NOW + timedelta(seconds=seconds)
    return bool(live_registrations(held, registrations.at(now, seconds), now))


@pytest.fixture
def seen_entry():
    """Registrations with the entry of a gateway that has a heartbeat, seen at 0."""
    registrations = SeenRegistrations()
    assert kept(registrations, 0)
    return registrations


def test_a_heartbeat_that_names_the_lease_renews_its_registration(seen_entry):
    for seconds in range(20, 200, 20):
        seen_entry.look_at_heartbeat(BEAT, heartbeat(seconds, lease=1), seconds)
    assert kept(seen_entry, 180 + LIFE - 1)
    assert not kept(seen_entry, 180 + LIFE)


def test_a_lease_that_is_named_no_more_is_kept_for_one_more_life(seen_entry):
    """The reader may have missed a heartbeat that named it."""
    seen_entry.look_at_heartbeat(BEAT, heartbeat(20, lease=1), 20)
    for seconds in (40, 60):
        seen_entry.look_at_heartbeat(BEAT, heartbeat(seconds, other=1), seconds)
    assert kept(seen_entry, 20 + LIFE - 1)
    assert not kept(seen_entry, 20 + LIFE)


def test_what_is_not_news_renews_nothing(seen_entry):
    """The same heartbeat is listed again, somebody writes another field, and another gateway lives."""
    beat = heartbeat(20, lease=1)
    seen_entry.look_at_heartbeat(BEAT, beat, 20)
    seen_entry.look_at_heartbeat(BEAT, beat, 60)
    marked = beat.but(metadata=beat.metadata.but(resource_version="9", annotations={"a": "b"}))
    seen_entry.look_at_heartbeat(BEAT, marked, 61)
    seen_entry.look_at_heartbeat(Key("team", "g-2"), heartbeat(70, lease=1), 70)
    seen_entry.look_at_heartbeat(Key("other", "g-1"), heartbeat(70, lease=1), 70)
    assert not kept(seen_entry, 20 + LIFE)


def test_an_entry_of_a_gateway_without_a_heartbeat_is_judged_by_itself():
    registrations, held = SeenRegistrations(), released(registered())
    registrations.look(held.key, held, 0)
    registrations.look_at_heartbeat(BEAT, heartbeat(50, lease=1), 50)
    now = NOW + REGISTRATION_LIFE
    assert live_registrations(held, registrations.at(now, LIFE), now) == []


def test_a_heartbeat_that_is_deleted_may_have_been_written_once_more_unseen(seen_entry):
    seen_entry.look_at_heartbeat(BEAT, heartbeat(20, lease=1), 20)
    seen_entry.look_at_heartbeat(BEAT, None, 70)
    assert kept(seen_entry, 70 + LIFE - 1)
    assert not kept(seen_entry, 70 + LIFE)


def test_one_that_was_never_seen_may_have_been_written_before_somebody_learned_that_there_is_none(seen_entry):
    held = released(registered(heartbeat=str(BEAT)))
    assert seen_entry.heartbeats_of(held, "lease") == {BEAT: None}
    seen_entry.look_at_heartbeat(BEAT, None, 50)
    assert kept(seen_entry, 50 + LIFE - 1)
    for at in range(60, 600, 60):
        seen_entry.look_at_heartbeat(Key("team", "other"), None, at)
    assert seen_entry.heartbeats_of(held, "lease") == {BEAT: ABSENT}, "it is remembered as long as there is the entry"
    assert not kept(seen_entry, 50 + LIFE)


def test_what_registrations_are_judged_by_is_the_heartbeat_that_was_looked_at(seen_entry):
    held, found = released(registered(heartbeat=str(BEAT))), heartbeat(20, lease=1)
    seen_entry.look_at_heartbeat(BEAT, found, 20)
    assert seen_entry.heartbeats_of(held, "lease") == {BEAT: HeartbeatVersion.of(found)}
    assert seen_entry.heartbeats_of(held, "another") == {}


def test_a_heartbeat_that_was_there_before_the_entry_keeps_it_alive():
    registrations = SeenRegistrations()
    registrations.look_at_heartbeat(BEAT, heartbeat(0, lease=1), 0)
    assert kept(registrations, 5)
    registrations.look_at_heartbeat(BEAT, heartbeat(20, lease=1), 20)
    assert kept(registrations, 20 + LIFE - 1)


def test_a_gateway_with_many_leases_in_turn_leaves_nothing_behind():
    registrations = SeenRegistrations()
    for number in range(1000):
        at = 20 * number
        registrations.look_at_heartbeat(BEAT, heartbeat(at, **{f"lease-{number}": 1}), at)
        registrations.look_at_heartbeat(Key("team", f"gone-{number}"), heartbeat(at), at)
        registrations.look_at_heartbeat(Key("team", f"gone-{number}"), None, at)
    remembered = registrations._heartbeats
    assert len(remembered._named[BEAT]) <= 4
    assert max(len(remembered._named), len(remembered._latest), len(remembered._absent)) <= 4


def test_a_heartbeat_tells_of_which_workers_the_connections_have_changed(seen_entry):
    look = seen_entry.look_at_heartbeat
    key = released().key
    assert look(BEAT, heartbeat(-5, lease=9), 10) == set(), "the entry is newer"
    assert look(BEAT, heartbeat(20, lease=1, unknown=1), 20) == {key}
    assert look(BEAT, heartbeat(40, lease=1), 40) == set()
    assert look(BEAT, heartbeat(60, lease=2), 60) == {key}
    assert look(BEAT, heartbeat(80), 80) == {key}
    seen_entry.look(key, None, 90)
    assert look(BEAT, heartbeat(100, lease=1), 100) == set()
    assert seen_entry._renewed_by == {}


@pytest.mark.parametrize("beat", [heartbeat(80, lease=1), None])
@pytest.mark.parametrize(
    ("seconds", "changed"), [(20 + LIFE - 1, False), (20 + LIFE - 1e-7, True), (20 + LIFE, True)]
)
def test_a_heartbeat_tells_of_which_workers_a_registration_had_expired(seen_entry, beat, seconds, changed):
    """The connections count again, although their number is the same. A time is as exact as a microsecond."""
    entry, key = registered(heartbeat=str(BEAT), connections=1), released().key
    seen_entry.look(key, released(entry), 0)
    seen_entry.look_at_heartbeat(BEAT, heartbeat(20, lease=1), 20)
    assert seen_entry.look_at_heartbeat(BEAT, beat, seconds) == ({key} if changed else set())
    assert seen_entry.look_at_heartbeat(BEAT, beat, seconds) == set(), "it lives"


def test_a_heartbeat_that_does_not_renew_an_expired_registration_tells_nothing(seen_entry):
    seen_entry.look_at_heartbeat(BEAT, heartbeat(20), 20)
    assert seen_entry.look_at_heartbeat(BEAT, heartbeat(100, other=1), 100) == set()


@pytest.mark.parametrize(
    ("told", "connections"),
    [
        (None, 3),
        (heartbeat(-1, lease=7), 3),
        (heartbeat(1, lease=7), 7),
        (heartbeat(1, other=7), 0),
        (heartbeat(1, lease=0), 0),
    ],
)
def test_the_connections_are_those_that_the_gateway_has_said_last(told, connections):
    """Both times are of the same clock."""
    entry = registered(heartbeat=str(BEAT), connections=3)
    held = released(entry, registered(connections=100).but(lease_id="earlier"))
    assert open_connections(held, {} if told is None else {BEAT: told}) == connections
    registrations = SeenRegistrations()
    registrations.look_at_heartbeat(BEAT, told, 0)
    assert registrations.at(NOW, 0).connections(entry) == connections
    assert open_connections(held.with_lease(None), {}) == 0
