"""The state machine of a connection, without a socket, a timer or a lease: events go in, commands come out.

First one path at a time; then any events in any order, against what must hold after each of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.errors import Gone, NoCapacity, Unauthenticated, Unavailable
from bkpool.core.names import Key
from bkpool.gateway.session.hold_budget import HoldBudget
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.machine import (
    CancelDial,
    CloseClient,
    ConnectionMachine,
    DialWorker,
    FindLease,
    Refuse,
    Register,
    ReturnSlot,
    StartRelay,
    State,
    StopRelayOrRefusal,
    TakeSlot,
)
from bkpool.gateway.session.refusal import GrpcCode, Refusal, wrong_worker

LIMITS = GatewayLimits()
TOKEN = "digest"
UP = LeaseRoute(
    token_sha256=TOKEN,
    allocation_id="allocation-1",
    worker=Key("default", "p-worker-0"),
    worker_uid="uid",
    pool=Key("default", "p"),
    endpoint="unix:///run/w",
    wait_reason="",
    expires_at=1e9,
    not_after=2e9,
    drain_timeout=3600.0,
)
AWAY = replace(UP, endpoint=None, wait_reason="it is being started")
MOVED = replace(UP, endpoint="unix:///run/w2")

RELEASED = Gone("the lease was released", hint="Allocate.", code="LeaseReleased")
SILENT_STORE = Unavailable("the store does not answer", hint="Wait.")
FULL = NoCapacity("there are too many", hint="Later.")
NO_LEASE = Unauthenticated("it names no lease", hint="Allocate.")
DRAIN = 3600.0

EVENTS = {
    "spoke": lambda machine, now: machine.first_bytes_received(),
    "shaken": lambda machine, now: machine.handshake_done(TOKEN),
    "unfit": lambda machine, now: machine.certificate_rejected(NO_LEASE),
    "TLS failed": lambda machine, now: machine.tls_failed(),
    "found": lambda machine, now: machine.lease_search_done(),
    "not found": lambda machine, now: machine.lease_search_done(SILENT_STORE),
    "admitted": lambda machine, now: machine.slot_taken(UP, HoldBudget(LIMITS)),
    "admitted, away": lambda machine, now: machine.slot_taken(AWAY, HoldBudget(LIMITS)),
    "denied": lambda machine, now: machine.slot_denied(FULL),
    "registered": lambda machine, now: machine.registration_done(now),
    "not registered": lambda machine, now: machine.registration_done(now, RELEASED),
    "dialled": lambda machine, now: machine.worker_reached(),
    "unreached": lambda machine, now: machine.dial_failed(now, "refused"),
    "met a stranger": lambda machine, now: machine.wrong_peer(now),
    "as before": lambda machine, now: machine.route_changed(now, UP),
    "moved": lambda machine, now: machine.route_changed(now, MOVED),
    "away": lambda machine, now: machine.route_changed(now, AWAY),
    "parted": lambda machine, now: machine.worker_closed_sibling(),
    "client ended": lambda machine, now: machine.client_sent_eof(),
    "lease ended": lambda machine, now: machine.lease_ended(now, RELEASED, DRAIN),
    "lease ended for good": lambda machine, now: machine.lease_ended(now, RELEASED, 0.0),
    "lease resumed": lambda machine, now: machine.lease_resumed(),
    "time is up": lambda machine, now: machine.deadline_reached(now, now - 1),
    "cut": lambda machine, now: machine.cut("cut"),
    "over": lambda machine, now: machine.connection_ended("over"),
}
"""Everything that can be told."""

NOTHING = ()
STATE = {
    "accepted": State.ACCEPTED,
    "handshaking": State.HANDSHAKING,
    "seeking": State.AUTHENTICATED,
    "admitting": State.AUTHENTICATED,
    "registering": State.AUTHENTICATED,
    "waiting": State.WAITING,
    "dialling": State.DIALLING,
    "relaying": State.RELAYING,
    "draining": State.DRAINING,
    "refused": State.REFUSED,
    "closed": State.CLOSED,
}
"""Every point of a machine by what is under way there; with a lease there is more to it than its state."""
GREETING = ("accepted", "handshaking")
HELD = ("seeking", "admitting", "registering", "waiting", "dialling")
JOINED = ("relaying", "draining")
SLOT = {"registering", "waiting", "dialling", "relaying", "draining"}


def machine_at(point, now=0.0, budget=None):
    """A machine that has come to this point, at this time."""
    machine = ConnectionMachine(LIMITS, now)
    on_its_way = AWAY if point == "waiting" else UP
    story = {
        "accepted": lambda: NOTHING,
        "handshaking": machine.first_bytes_received,
        "seeking": lambda: machine.handshake_done(TOKEN),
        "admitting": machine.lease_search_done,
        "registering": lambda: machine.slot_taken(on_its_way, budget or HoldBudget(LIMITS)),
        "waiting": lambda: machine.registration_done(now),
        "dialling": lambda: NOTHING,
        "relaying": machine.worker_reached,
        "draining": lambda: machine.lease_ended(now, RELEASED, DRAIN),
        "closed": lambda: machine.connection_ended("ended"),
    }
    if point == "refused":
        machine.certificate_rejected(NO_LEASE)
        return machine
    for at, tell in story.items():
        tell()
        if at == point:
            break
    assert machine.state is STATE[point]
    return machine


def given_back(point):
    """What it holds at this point and gives back before it is refused or closed."""
    return (CancelDial(),) * (point == "dialling") + (ReturnSlot(),) * (point in SLOT)


def refused(why):
    return Refuse(why.code, Refusal.of(why))


# --- from accept to close -------------------------------------------------------------------------------------------


def test_the_good_one():
    """A step at a time, each asked for by the one before; the slot is given back before the socket is closed."""
    machine = ConnectionMachine(LIMITS, 100.0)
    assert (machine.state, machine.deadline) == (State.ACCEPTED, 100 + LIMITS.handshake_timeout)
    assert machine.first_bytes_received() == NOTHING
    assert (machine.state, machine.deadline) == (State.HANDSHAKING, 100 + LIMITS.handshake_timeout)
    assert machine.handshake_done(TOKEN) == (FindLease(TOKEN),)
    assert (machine.state, machine.deadline) == (State.AUTHENTICATED, None)
    assert machine.lease_search_done() == (TakeSlot(TOKEN),)
    assert machine.slot_taken(UP, HoldBudget(LIMITS)) == (Register(),)
    assert machine.state is State.AUTHENTICATED
    assert machine.registration_done(101.0) == (DialWorker(),)
    assert (machine.state, machine.deadline) == (State.DIALLING, None)
    assert machine.worker_reached() == (StartRelay(),)
    assert (machine.state, machine.deadline) == (State.RELAYING, None)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


@pytest.mark.parametrize("point", GREETING)
def test_a_silent_client_has_the_time_of_a_handshake_from_the_accept_whatever_it_has_said_before(point):
    machine = machine_at(point, now=100.0)
    assert machine.deadline == 100 + LIMITS.handshake_timeout
    assert machine.deadline_reached(machine.deadline) == (CloseClient("the handshake took too long"),)
    assert machine.state is State.CLOSED


@pytest.mark.parametrize("point", GREETING)
def test_a_client_that_leaves_in_its_handshake_is_closed(point):
    assert machine_at(point).client_sent_eof() == (CloseClient("the client left during the handshake"),)


def test_a_client_that_leaves_while_it_is_held_gives_its_slot_back():
    assert machine_at("waiting").client_sent_eof() == (ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("point", ["seeking", "admitting", "registering", "dialling"])
def test_a_client_that_says_no_more_may_still_listen_and_is_joined_to_a_worker_that_is_there(point):
    machine = machine_at(point)
    assert machine.client_sent_eof() == NOTHING
    machine.lease_search_done()
    machine.slot_taken(UP, HoldBudget(LIMITS))
    machine.registration_done(0.0)
    assert machine.worker_reached() == (StartRelay(),)


@pytest.mark.parametrize("point", ["seeking", "admitting", "registering"])
def test_it_is_not_held_for_a_worker_that_is_away(point):
    machine = machine_at(point)
    machine.client_sent_eof()
    machine.lease_search_done()
    machine.slot_taken(AWAY, HoldBudget(LIMITS))
    machine.route_changed(0.0, AWAY)
    assert machine.registration_done(0.0) == (ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("how", ["unreached", "met_a_stranger", "rerouted"])
def test_nor_for_one_that_turns_out_to_be_away_and_no_dial_is_given_up_that_has_ended(how):
    machine = machine_at("dialling")
    machine.client_sent_eof()
    told = {
        "unreached": lambda: machine.dial_failed(1.0, "refused"),
        "met_a_stranger": lambda: machine.wrong_peer(1.0),
        "rerouted": lambda: machine.route_changed(1.0, AWAY),
    }[how]()
    once = (CancelDial(),) if how == "rerouted" else NOTHING
    assert told == (*once, ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("point", [*JOINED, "refused", "closed"])
def test_whoever_has_the_socket_by_then_sees_to_the_end_of_the_client(point):
    machine = machine_at(point)
    assert machine.client_sent_eof() == NOTHING
    assert machine.state is STATE[point]


@pytest.mark.parametrize("point", [*GREETING, *HELD])
def test_who_breaks_the_rules_of_tls_gets_its_alert_and_the_slot_is_given_back(point):
    machine = machine_at(point)
    assert machine.tls_failed() == (*given_back(point), Refuse("TlsFailed", None))
    assert (machine.state, machine.deadline) == (State.REFUSED, None)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", GREETING)
def test_a_certificate_of_no_lease_is_refused_in_words(point):
    machine = machine_at(point)
    assert machine.certificate_rejected(NO_LEASE) == (refused(NO_LEASE),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


# --- the lease ------------------------------------------------------------------------------------------------------


def test_a_lease_that_cannot_be_looked_for_is_refused():
    machine = machine_at("seeking")
    assert machine.lease_search_done(SILENT_STORE) == (refused(SILENT_STORE),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


def test_who_gets_no_slot_has_none_to_give_back():
    machine = machine_at("admitting")
    assert machine.slot_denied(FULL) == (refused(FULL),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


def test_who_cannot_be_registered_gives_its_slot_back_and_is_not_joined():
    machine = machine_at("registering")
    assert machine.registration_done(0.0, RELEASED) == (ReturnSlot(), refused(RELEASED))
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", sorted(STATE.keys() - {"admitting"}))
def test_a_slot_that_nobody_waits_for_is_given_back_at_once(point):
    """Also one of a question that was asked before the connection was refused or closed."""
    machine = machine_at(point)
    state = machine.state
    assert machine.slot_taken(MOVED, HoldBudget(LIMITS)) == (ReturnSlot(),)
    assert machine.state is state


# --- a worker on its way --------------------------------------------------------------------------------------------


def held(now, budget, route=AWAY):
    """A machine that has just been told that this is the way to its worker."""
    machine = machine_at("registering", budget=budget)
    machine.route_changed(now, route)
    machine.registration_done(now)
    return machine


def in_vain(now, budget):
    """Waits for a worker that does not come: for how long, and what the client is told then."""
    machine = held(now, budget)
    seconds = machine.deadline - now
    assert machine.deadline_reached(machine.deadline - 0.001) == NOTHING
    assert machine.deadline == now + seconds
    given_back, refuse = machine.deadline_reached(machine.deadline)
    assert given_back == ReturnSlot()
    assert (machine.state, machine.deadline) == (State.REFUSED, None)
    return seconds, refuse


def test_a_worker_that_was_away_is_dialled_when_it_is_back():
    machine = held(10.0, HoldBudget(LIMITS))
    assert (machine.state, machine.deadline) == (State.WAITING, 10 + LIMITS.first_wait)
    assert machine.route_changed(12.0, replace(AWAY, wait_reason="it is nearly there")) == NOTHING
    assert (machine.state, machine.deadline) == (State.WAITING, 10 + LIMITS.first_wait)
    assert machine.route_changed(20.0, UP) == (DialWorker(),)
    assert (machine.state, machine.deadline) == (State.DIALLING, None)
    assert machine.worker_reached() == (StartRelay(),)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))


def test_the_first_wait_in_vain_ends_with_unavailable_and_the_latest_cause():
    machine = held(10.0, HoldBudget(LIMITS))
    machine.route_changed(12.0, replace(AWAY, wait_reason="disk full"))
    _, refuse = machine.deadline_reached(10 + LIMITS.first_wait)
    assert refuse.status == "Waited"
    assert refuse.refusal.code == GrpcCode.UNAVAILABLE == 14
    assert "p-worker-0 is not ready yet: disk full" in refuse.refusal.sentence


def test_each_wait_in_vain_makes_the_next_one_shorter_and_the_user_is_told_from_the_second_on():
    budget = HoldBudget(LIMITS)
    waits = [in_vain(20.0 * n, budget) for n in range(4)]
    assert [seconds for seconds, _ in waits] == [
        LIMITS.first_wait,
        LIMITS.second_wait,
        LIMITS.later_wait,
        LIMITS.later_wait,
    ]
    assert [(refuse.status, refuse.refusal.code) for _, refuse in waits] == [
        ("Waited", GrpcCode.UNAVAILABLE),
        *[("WaitedAgain", GrpcCode.FAILED_PRECONDITION)] * 3,
    ]


def test_a_wait_in_vain_is_forgotten_after_a_while():
    budget = HoldBudget(LIMITS)
    in_vain(0.0, budget)
    just_before = LIMITS.first_wait + LIMITS.failed_wait_memory - 0.001
    assert held(just_before, budget).deadline == just_before + LIMITS.second_wait
    assert in_vain(just_before + 0.001, budget)[0] == LIMITS.first_wait


def test_the_while_runs_from_the_latest_wait_in_vain():
    budget = HoldBudget(LIMITS)
    in_vain(0.0, budget)
    second = LIMITS.first_wait + 50
    in_vain(second, budget)
    assert in_vain(second + LIMITS.second_wait + 50, budget)[0] == LIMITS.later_wait


def test_waits_at_the_same_time_count_as_one():
    budget = HoldBudget(LIMITS)
    pair = [held(0.0, budget), held(3.0, budget)]
    ends = [machine.deadline_reached(machine.deadline)[-1].status for machine in pair]
    assert ends == ["Waited", "Waited"]
    assert in_vain(30.0, budget)[0] == LIMITS.second_wait


def test_a_worker_that_was_reached_by_anyone_of_the_lease_is_awaited_anew():
    budget = HoldBudget(LIMITS)
    in_vain(0.0, budget)
    in_vain(20.0, budget)
    held(40.0, budget, UP).worker_reached()
    seconds, refuse = in_vain(41.0, budget)
    assert (seconds, refuse.refusal.code) == (LIMITS.first_wait, GrpcCode.UNAVAILABLE)


# --- the rest of a build that was cut with its worker ---------------------------------------------------------------


def told_at_once(todo):
    """It is not held: what it is told instead."""
    given_back, refuse = todo
    assert given_back == ReturnSlot()
    return refuse.status, refuse.refusal.code, refuse.refusal.sentence


NOT_HELD = "Waited", GrpcCode.UNAVAILABLE, "worker default/p-worker-0 is not ready yet: {}. Try again in a moment."


def test_who_comes_within_half_a_second_of_the_end_of_another_connection_is_not_held_and_who_comes_later_is():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(10.0)
    soon = ConnectionMachine(LIMITS, 10 + LIMITS.cut_retry_window - 0.001)
    later = ConnectionMachine(LIMITS, 10 + LIMITS.cut_retry_window)
    for machine in (soon, later):
        machine.handshake_done(TOKEN)
        machine.lease_search_done()
        machine.slot_taken(AWAY, budget)
    *status, sentence = NOT_HELD
    assert told_at_once(soon.registration_done(11.0)) == (*status, sentence.format("it is being started"))
    assert later.registration_done(11.0) == NOTHING
    assert (later.state, later.deadline) == (State.WAITING, 11 + LIMITS.first_wait)


def test_who_waits_already_when_another_connection_ends_is_told_so_too():
    """A worker that is told to end takes no new connections for a while before it cuts those that it has."""
    machine = held(0.0, HoldBudget(LIMITS), UP)
    machine.dial_failed(1.0, "Connection refused")
    *status, sentence = NOT_HELD
    assert told_at_once(machine.worker_closed_sibling()) == (
        *status,
        sentence.format("it could not be reached (Connection refused)"),
    )


def test_it_is_joined_if_the_worker_is_there():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = held(0.1, budget, UP)
    assert machine.worker_closed_sibling() == NOTHING
    assert machine.worker_reached() == (StartRelay(),)


def test_a_stranger_is_told_of_as_ever():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = held(0.0, budget, UP)
    assert machine.wrong_peer(0.0) == NOTHING
    assert machine.worker_closed_sibling() == NOTHING
    assert machine.deadline_reached(machine.deadline) == (DialWorker(),)


def test_it_is_no_wait_in_vain():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = machine_at("registering", budget=budget)
    machine.route_changed(0.0, AWAY)
    told_at_once(machine.registration_done(0.0))
    assert budget.allowance(1.0) == (0, LIMITS.first_wait)


# --- an address where nobody answers, or another --------------------------------------------------------------------


def test_an_address_where_nobody_answers_is_dialled_again_until_the_time_is_up():
    now, dials = 10.0, 1
    machine = held(now, HoldBudget(LIMITS), UP)
    while machine.state is State.DIALLING:
        now += 0.25
        assert machine.dial_failed(now, "Connection refused") == NOTHING
        assert machine.state is State.WAITING
        # the first dial begins the wait, and its last moment is worth one more
        assert machine.deadline == min(now + LIMITS.redial_interval, 10.25 + LIMITS.first_wait)
        now = machine.deadline
        told = machine.deadline_reached(now)
        dials += told == (DialWorker(),)
    assert now == 10.25 + LIMITS.first_wait
    assert dials == 1 + LIMITS.first_wait // (0.25 + LIMITS.redial_interval)
    assert told[0] == ReturnSlot()
    assert told[1].status == "Waited"
    assert "it could not be reached (Connection refused)" in told[1].refusal.sentence


def test_a_worker_that_answers_at_last_is_joined():
    machine = held(0.0, HoldBudget(LIMITS), UP)
    machine.dial_failed(0.0, "Connection refused")
    assert machine.deadline_reached(machine.deadline) == (DialWorker(),)
    assert machine.worker_reached() == (StartRelay(),)


def test_a_new_address_is_dialled_at_once_and_the_old_dial_given_up():
    """Nobody may be left at the old address to refuse it."""
    machine = machine_at("dialling")
    assert machine.route_changed(1.0, MOVED) == (CancelDial(), DialWorker())
    assert machine.state is State.DIALLING
    assert machine.worker_reached() == (StartRelay(),)


def test_a_worker_that_goes_while_it_is_dialled_is_awaited():
    machine = machine_at("dialling")
    assert machine.route_changed(1.0, AWAY) == (CancelDial(),)
    assert (machine.state, machine.deadline) == (State.WAITING, 1 + LIMITS.first_wait)


@pytest.mark.parametrize("point", ["registering", "dialling", *JOINED])
def test_a_lease_that_only_has_a_new_end_changes_nothing(point):
    machine = machine_at(point)
    deadline = machine.deadline
    assert machine.route_changed(1.0, replace(UP, expires_at=3e9)) == NOTHING
    assert (machine.state, machine.deadline) == (STATE[point], deadline)


def test_the_route_that_came_before_the_registration_is_the_one_that_is_dialled():
    machine = machine_at("registering")
    assert machine.route_changed(1.0, AWAY) == NOTHING
    assert machine.registration_done(2.0) == NOTHING
    assert machine.state is State.WAITING


def meets_strangers(machine, until):
    """Meets another at the worker's address again and again, to the end of the wait; what is to be done then."""
    now = 0.0
    while machine.state is State.DIALLING:
        assert machine.wrong_peer(now) == NOTHING
        assert machine.wrong_peer_seen
        now = machine.deadline
        told = machine.deadline_reached(now)
    assert now == until
    return told


def test_another_at_the_workers_address_is_borne_for_a_moment_only():
    budget = HoldBudget(LIMITS)
    machine = held(0.0, budget, UP)
    assert meets_strangers(machine, until=LIMITS.later_wait) == (
        ReturnSlot(),
        Refuse("WrongWorker", wrong_worker(UP.worker)),
    )
    assert budget.allowance(3.0) == (0, LIMITS.first_wait), "it is no wait for a worker on its way"


def test_a_client_with_less_patience_left_is_told_sooner():
    machine = held(0.0, HoldBudget(replace(LIMITS, first_wait=1.0)), UP)
    assert meets_strangers(machine, until=1.0)[-1].status == "WrongWorker"


@pytest.mark.parametrize("how", ["a new route", "nobody there"])
def test_a_stranger_is_forgotten_with(how):
    """The wait is the whole one again, from its begin."""
    machine = held(0.0, HoldBudget(LIMITS), UP)
    machine.wrong_peer(0.0)
    if how == "a new route":
        assert machine.route_changed(1.0, MOVED) == (DialWorker(),)
    else:
        machine.deadline_reached(machine.deadline)
        machine.dial_failed(1.0, "Connection refused")
    assert not machine.wrong_peer_seen
    machine.route_changed(1.0, AWAY)
    assert (machine.state, machine.deadline) == (State.WAITING, LIMITS.first_wait)
    assert machine.deadline_reached(LIMITS.first_wait)[-1].status == "Waited"


# --- the end of a lease ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", HELD)
def test_whoever_is_held_when_the_lease_ends_is_told_so(point):
    machine = machine_at(point)
    assert machine.lease_ended(1.0, RELEASED, DRAIN) == (*given_back(point), refused(RELEASED))
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", [*GREETING, "draining", "refused", "closed"])
def test_an_end_of_the_lease_changes_nothing_for(point):
    machine = machine_at(point)
    deadline = machine.deadline
    assert machine.lease_ended(1.0, RELEASED, 0.0) == NOTHING
    assert (machine.state, machine.deadline) == (STATE[point], deadline)


def test_a_connection_that_is_busy_drains_to_its_last_byte():
    machine = machine_at("relaying")
    assert machine.lease_ended(10.0, RELEASED, DRAIN) == NOTHING
    assert (machine.state, machine.deadline) == (State.DRAINING, 10 + LIMITS.drain_idle_timeout)
    assert machine.deadline_reached(machine.deadline, active_at=40.0) == NOTHING
    assert (machine.state, machine.deadline) == (State.DRAINING, 40 + LIMITS.drain_idle_timeout)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))


def test_one_that_is_silent_is_cut():
    machine = machine_at("relaying")
    machine.lease_ended(100.0, RELEASED, DRAIN)
    assert machine.deadline_reached(machine.deadline - 0.001, active_at=30.0) == NOTHING, (
        "silence counts from the lease's end"
    )
    assert machine.deadline == 100 + LIMITS.drain_idle_timeout
    assert machine.deadline_reached(machine.deadline, active_at=30.0) == (
        StopRelayOrRefusal("its lease has ended, and it was silent"),
    )
    assert machine.connection_ended("cut") == (ReturnSlot(), CloseClient("cut"))


def test_one_that_is_busy_is_cut_when_the_time_to_drain_is_over():
    machine = machine_at("relaying")
    machine.lease_ended(0.0, RELEASED, 70.0)
    assert machine.deadline_reached(60.0, active_at=59.0) == NOTHING
    assert machine.deadline == 70.0
    assert machine.deadline_reached(70.0, active_at=69.9) == (
        StopRelayOrRefusal("its lease has ended, and so has the time to drain"),
    )
    assert machine.connection_ended("cut") == (ReturnSlot(), CloseClient("cut"))


def test_there_may_be_no_time_to_drain_at_all():
    machine = machine_at("relaying")
    machine.lease_ended(5.0, RELEASED, 0.0)
    assert machine.deadline == 5.0
    assert [type(do) for do in machine.deadline_reached(5.0, active_at=5.0)] == [StopRelayOrRefusal]


def test_a_lease_that_was_renewed_after_all_is_as_it_was_and_may_end_again():
    machine = machine_at("draining")
    assert machine.lease_resumed() == NOTHING
    assert (machine.state, machine.deadline) == (State.RELAYING, None)
    assert machine.deadline_reached(1e6) == NOTHING
    assert machine.lease_ended(1e6, RELEASED, DRAIN) == NOTHING
    assert machine.deadline == 1e6 + LIMITS.drain_idle_timeout


# --- cut, late, twice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", sorted(STATE.keys() - {*JOINED, "refused", "closed"}))
def test_who_is_cut_before_it_is_joined_is_closed_with_all_that_it_holds(point):
    machine = machine_at(point)
    assert machine.cut("closing") == (*given_back(point), CloseClient("closing"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


@pytest.mark.parametrize("point", [*JOINED, "refused"])
def test_who_is_cut_after_that_is_closed_when_its_end_has_been_told(point):
    """TLS is ended in order, so the slot is held until then."""
    machine = machine_at(point)
    assert machine.cut("closing") == (StopRelayOrRefusal("closing"),)
    assert machine.state is STATE[point]
    assert machine.connection_ended("closing") == (*given_back(point), CloseClient("closing"))


@pytest.mark.parametrize("point", sorted(STATE.keys() - {"closed"}))
def test_a_clients_socket_that_breaks_ends_everything(point):
    machine = machine_at(point)
    assert machine.connection_ended("client: reset") == (*given_back(point), CloseClient("client: reset"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


MEANT_FOR = {
    **dict.fromkeys(["spoke", "shaken", "unfit"], GREETING),
    "TLS failed": (*GREETING, *HELD),
    **dict.fromkeys(["found", "not found"], ("seeking",)),
    "denied": ("admitting",),
    **dict.fromkeys(["registered", "not registered"], ("registering",)),
    **dict.fromkeys(["dialled", "unreached", "met a stranger"], ("dialling",)),
    **dict.fromkeys(["as before", "moved", "away"], ("waiting", "dialling")),
    "client ended": (*GREETING, "waiting"),
    "parted": ("waiting",),
    **dict.fromkeys(["lease ended", "lease ended for good"], (*HELD, "relaying")),
    "lease resumed": ("draining",),
    "time is up": (*GREETING, "waiting", "draining"),
    **dict.fromkeys(["cut", "over"], tuple(STATE.keys() - {"closed"})),
}
"""Where an event leads to something at once. (One more slot leads to its return, everywhere else.)"""


@pytest.mark.parametrize("event", MEANT_FOR)
def test_what_is_told_too_late_or_twice_or_was_never_asked_changes_nothing(event):
    """No second slot is asked for, nobody is dialled without one, and what is closed stays so."""
    for point in STATE.keys() - MEANT_FOR[event]:
        machine = machine_at(point)
        before = machine.state, machine.deadline
        told = EVENTS[event](machine, 1.0)
        assert (point, told, machine.state, machine.deadline) == (point, NOTHING, *before)


# --- any order ------------------------------------------------------------------------------------------------------


ANSWERS = {
    **dict.fromkeys(["found", "not found"], FindLease),
    **dict.fromkeys(["admitted", "admitted, away", "denied"], TakeSlot),
    **dict.fromkeys(["registered", "not registered"], Register),
    **dict.fromkeys(["dialled", "unreached", "met a stranger"], DialWorker),
}
GOOD = ["spoke", "shaken", "found", "admitted", "registered", "dialled"]
SECONDS = st.sampled_from([0.0, 0.5, 2.0, 15.0, 60.0])
LATER = ["lease ended", "lease resumed"]  # those that a joined connection lives on with


class Driver:
    """Does in the head what a connection does, and keeps the accounts."""

    def __init__(self):
        self.now = 1000.0
        self.machine = ConnectionMachine(LIMITS, self.now)
        self.asked = None
        """The question that is open: of the lease, of the worker, or for the end of a relay or a refusal."""
        self.said = []
        self.slots = self.admissions = 0
        self.stopping = False

    def happens(self, event, seconds):
        self.now += seconds
        for _ in range(4):  # a timer whose deadline is no later than the last would ring for ever
            if self.machine.deadline is None or self.machine.deadline > self.now or self.stopping:
                break
            self.tell("time is up")
        else:
            raise AssertionError("the deadline does not move")
        self.tell(event)

    def tell(self, event):
        machine, now = self.machine, self.now
        if self.asked is not None and ANSWERS.get(event) is self.asked:
            self.asked = None
        if event.startswith("admitted"):
            self.slots += 1
            self.admissions += 1
        todo = EVENTS[event](machine, now)
        for do in todo:
            self.do(do)
        self.check()

    def do(self, what):
        assert CloseClient not in self.said or (what == ReturnSlot() and self.slots), (
            "something is done after the close"
        )
        self.said.append(type(what))
        match what:
            case FindLease() | TakeSlot() | Register():
                assert self.asked is None, "the last question is not answered yet"
                self.asked = type(what)
            case DialWorker():
                assert self.asked is None, "another dial is under way"
                assert self.slots, "a worker is dialled without a slot"
                self.asked = DialWorker
            case CancelDial():
                assert self.asked is DialWorker, "there is no dial to give up"
                self.asked = None
            case StartRelay():
                assert self.asked is None
                assert self.slots, "a client is joined without a slot"
                self.asked = StartRelay
            case Refuse():
                assert self.asked is not DialWorker, "a dial is left alone"
                self.asked = Refuse  # answers that come now are too late
            case StopRelayOrRefusal():
                assert self.asked in {StartRelay, Refuse}, "there is nothing to stop"
                self.stopping = True
            case ReturnSlot():
                self.slots -= 1
            case CloseClient():
                assert self.asked is not DialWorker, "a dial is left alone"
                self.asked = None

    def check(self):
        state, said = self.machine.state, self.said
        assert (state is State.CLOSED) == (CloseClient in said)
        assert said.count(CloseClient) <= 1
        assert said.count(StartRelay) + said.count(Refuse) <= 1, "a client is joined, or refused, once"
        assert (self.asked is DialWorker) == (state is State.DIALLING)
        assert (self.asked is StartRelay) == (state in {State.RELAYING, State.DRAINING})
        assert (self.asked is Refuse) == (state is State.REFUSED)
        assert (self.asked in {FindLease, TakeSlot, Register}) == (state is State.AUTHENTICATED)
        assert said.count(ReturnSlot) + self.slots == self.admissions
        assert self.slots in {0, 1}, "a slot is given back that is nobody's, or one too many is kept"
        if state in {State.REFUSED, State.CLOSED}:
            assert self.slots == 0, "a slot is kept by whoever needs none"
        if state is not State.CLOSED:
            assert self.machine.deadline is not None or self.asked is not None, "it would last for ever"
        if state is State.WAITING:
            assert self.machine.deadline <= self.now + LIMITS.first_wait

    def end(self):
        """The gateway closes: whoever is being stopped says so."""
        self.tell("cut")
        if self.machine.state is not State.CLOSED:
            assert self.stopping
            self.tell("over")
        assert self.machine.state is State.CLOSED
        assert self.said.count(ReturnSlot) == self.admissions
        assert (self.slots, self.asked) == (0, None)
        assert self.said.count(CloseClient) == 1


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    so_far=st.integers(0, len(GOOD)),
    then=st.lists(st.tuples(st.sampled_from(list(EVENTS)), SECONDS), max_size=12),
)
def test_in_any_order_every_slot_is_returned_every_dial_answered_and_the_close_is_the_last(so_far, then):
    """Some way on the good path, then whatever happens; see Driver.check for what holds after each event."""
    driver = Driver()
    for event in GOOD[:so_far]:
        driver.happens(event, 0.0)
    for event, seconds in then:
        driver.happens(event, seconds)
    driver.end()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seconds=st.lists(SECONDS, min_size=6, max_size=12), data=st.data())
def test_with_answers_to_what_is_asked_every_life_comes_to_its_end_too(seconds, data):
    """The same with events that make sense, so that it gets far: what is open is answered, well or badly."""
    driver = Driver()
    for gone in seconds:
        fitting = [event for event, question in ANSWERS.items() if question is driver.asked]
        fitting += (
            ["shaken", "client ended", "away", "moved", *LATER]
            if driver.asked in {None, DialWorker, StartRelay}
            else []
        )
        driver.happens(data.draw(st.sampled_from(fitting or ["over"])), gone)
    driver.end()
