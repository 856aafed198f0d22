"""The registrations of gateways whose clock is not that of the controller (rule 10, docs/rules.md#r10)."""

from datetime import timedelta

import pytest

from bkpool.core.reconcile.actions import FinishLease
from bkpool.core.reconcile.decide import decide
from bkpool.core.registrations import REGISTRATION_LIFE, SeenRegistrations, live_registrations
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
    assert live_registrations(held, {}, NOW) == [(registered(), NOW + REGISTRATION_LIFE)]
    for passed, found in ((0, held), (10, released()), (20, held), (30, None), (50, held)):
        registrations.look(held.key, found, passed)
    assert live_registrations(held, registrations.at(NOW, 50), NOW) == [(registered(), NOW + REGISTRATION_LIFE)]
