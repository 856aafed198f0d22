"""The state machine of a connection, without a socket, a timer or a lease: events go in, commands come out.

The first tests follow one path each. The last ones use any events in any order, and verify rules after each event.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.errors import Gone, NoCapacity, Unauthenticated, Unavailable
from bkpool.core.names import Key
from bkpool.gateway.session.commands import (
    CancelDial,
    CloseClient,
    DialWorker,
    FindLease,
    Refuse,
    Register,
    ReturnSlot,
    StartRelay,
    StopRelayOrRefusal,
    TakeSlot,
)
from bkpool.gateway.session.hold_budget import HoldBudget
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.machine import ConnectionMachine, State
from bkpool.gateway.session.refusal import GrpcCode, Refusal, wrong_worker
from support.examples import examples

LIMITS = GatewayLimits()
TOKEN = "digest"
READY = LeaseRoute(
    token_sha256=TOKEN,
    lease_id="allocation-1",
    worker=Key("default", "p-worker-0"),
    worker_uid="uid",
    pool=Key("default", "p"),
    endpoint="unix:///run/w",
    wait_reason="",
    expires_at=1e9,
    not_after=2e9,
    drain_timeout=3600.0,
)
NOT_READY = replace(READY, endpoint=None, wait_reason="it is being started")
MOVED = replace(READY, endpoint="unix:///run/w2")

RELEASED = Gone("the lease was released", hint="Allocate.", code="LeaseReleased")
SILENT_STORE = Unavailable("the store does not answer", hint="Wait.")
FULL = NoCapacity("there are too many", hint="Later.")
NO_LEASE = Unauthenticated("it names no lease", hint="Allocate.")
DRAIN = 3600.0

EVENTS = {
    "first bytes": lambda machine, now: machine.first_bytes_received(),
    "handshake done": lambda machine, now: machine.handshake_done(TOKEN),
    "certificate rejected": lambda machine, now: machine.certificate_rejected(NO_LEASE),
    "TLS failed": lambda machine, now: machine.tls_failed(),
    "lease search done": lambda machine, now: machine.lease_search_done(),
    "lease search failed": lambda machine, now: machine.lease_search_done(SILENT_STORE),
    "slot taken": lambda machine, now: machine.slot_taken(READY, HoldBudget(LIMITS)),
    "slot taken, not ready": lambda machine, now: machine.slot_taken(NOT_READY, HoldBudget(LIMITS)),
    "slot denied": lambda machine, now: machine.slot_denied(FULL),
    "registration done": lambda machine, now: machine.registration_done(now),
    "registration failed": lambda machine, now: machine.registration_done(now, RELEASED),
    "worker reached": lambda machine, now: machine.worker_reached(),
    "dial failed": lambda machine, now: machine.dial_failed(now, "refused"),
    "dial impossible": lambda machine, now: machine.dial_impossible(now, "Too many open files"),
    "wrong peer": lambda machine, now: machine.wrong_peer(now),
    "route unchanged": lambda machine, now: machine.route_changed(now, READY),
    "route moved": lambda machine, now: machine.route_changed(now, MOVED),
    "route without endpoint": lambda machine, now: machine.route_changed(now, NOT_READY),
    "worker closed sibling": lambda machine, now: machine.worker_closed_sibling(),
    "client sent eof": lambda machine, now: machine.client_sent_eof(),
    "lease ended": lambda machine, now: machine.lease_ended(now, RELEASED, DRAIN),
    "lease ended for good": lambda machine, now: machine.lease_ended(now, RELEASED, 0.0),
    "lease resumed": lambda machine, now: machine.lease_resumed(),
    "deadline reached": lambda machine, now: machine.deadline_reached(now, now - 1),
    "cut": lambda machine, now: machine.cut("cut"),
    "connection ended": lambda machine, now: machine.connection_ended("connection ended"),
}
"""Every event."""

NOTHING = ()
STATE = {
    "accepted": State.ACCEPTED,
    "handshaking": State.HANDSHAKING,
    "finding lease": State.AUTHENTICATED,
    "taking slot": State.AUTHENTICATED,
    "registering": State.AUTHENTICATED,
    "waiting": State.WAITING,
    "dialling": State.DIALLING,
    "relaying": State.RELAYING,
    "draining": State.DRAINING,
    "refused": State.REFUSED,
    "closed": State.CLOSED,
}
"""Every point of a connection, by the step that is running, with the state there."""
UNAUTHENTICATED = ("accepted", "handshaking")
HELD = ("finding lease", "taking slot", "registering", "waiting", "dialling")
CONNECTED = ("relaying", "draining")
SLOT = {"registering", "waiting", "dialling", "relaying", "draining"}


def machine_at(point, now=0.0, budget=None):
    """Returns a machine that has reached this point, at this time."""
    machine = ConnectionMachine(LIMITS, now)
    route = NOT_READY if point == "waiting" else READY
    steps = {
        "accepted": lambda: NOTHING,
        "handshaking": machine.first_bytes_received,
        "finding lease": lambda: machine.handshake_done(TOKEN),
        "taking slot": machine.lease_search_done,
        "registering": lambda: machine.slot_taken(route, budget or HoldBudget(LIMITS)),
        "waiting": lambda: machine.registration_done(now),
        "dialling": lambda: NOTHING,
        "relaying": machine.worker_reached,
        "draining": lambda: machine.lease_ended(now, RELEASED, DRAIN),
        "closed": lambda: machine.connection_ended("ended"),
    }
    if point == "refused":
        machine.certificate_rejected(NO_LEASE)
        return machine
    for at, report in steps.items():
        report()
        if at == point:
            break
    assert machine.state is STATE[point]
    return machine


def released(point):
    """The commands by which a connection at this point releases what it has, before it is refused or closed."""
    return (CancelDial(),) * (point == "dialling") + (ReturnSlot(),) * (point in SLOT)


def refused(why):
    return Refuse(why.code, Refusal.of(why))


# --- from accept to close -------------------------------------------------------------------------------------------


def test_a_connection_without_problems():
    """Each command follows from the result of the one before. The slot is returned before the socket is closed."""
    machine = ConnectionMachine(LIMITS, 100.0)
    assert (machine.state, machine.deadline) == (State.ACCEPTED, 100 + LIMITS.handshake_timeout)
    assert machine.first_bytes_received() == NOTHING
    assert (machine.state, machine.deadline) == (State.HANDSHAKING, 100 + LIMITS.handshake_timeout)
    assert machine.handshake_done(TOKEN) == (FindLease(TOKEN),)
    assert (machine.state, machine.deadline) == (State.AUTHENTICATED, None)
    assert machine.lease_search_done() == (TakeSlot(TOKEN),)
    assert machine.slot_taken(READY, HoldBudget(LIMITS)) == (Register(),)
    assert machine.state is State.AUTHENTICATED
    assert machine.registration_done(101.0) == (DialWorker(),)
    assert (machine.state, machine.deadline) == (State.DIALLING, None)
    assert machine.worker_reached() == (StartRelay(),)
    assert (machine.state, machine.deadline) == (State.RELAYING, None)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


@pytest.mark.parametrize("point", UNAUTHENTICATED)
def test_the_handshake_must_complete_within_its_timeout_from_the_accept(point):
    machine = machine_at(point, now=100.0)
    assert machine.deadline == 100 + LIMITS.handshake_timeout
    assert machine.deadline_reached(machine.deadline) == (CloseClient("the handshake took too long"),)
    assert machine.state is State.CLOSED


@pytest.mark.parametrize("point", UNAUTHENTICATED)
def test_a_client_that_leaves_during_the_handshake_is_closed(point):
    assert machine_at(point).client_sent_eof() == (CloseClient("the client left during the handshake"),)


def test_a_client_that_leaves_while_it_is_held_returns_its_slot():
    assert machine_at("waiting").client_sent_eof() == (ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("point", ["finding lease", "taking slot", "registering", "dialling"])
def test_a_client_that_sent_eof_may_still_read_and_is_connected_to_a_reachable_worker(point):
    machine = machine_at(point)
    assert machine.client_sent_eof() == NOTHING
    machine.lease_search_done()
    machine.slot_taken(READY, HoldBudget(LIMITS))
    machine.registration_done(0.0)
    assert machine.worker_reached() == (StartRelay(),)


@pytest.mark.parametrize("point", ["finding lease", "taking slot", "registering"])
def test_a_client_that_sent_eof_is_not_held_for_a_worker_that_is_not_ready(point):
    machine = machine_at(point)
    machine.client_sent_eof()
    machine.lease_search_done()
    machine.slot_taken(NOT_READY, HoldBudget(LIMITS))
    machine.route_changed(0.0, NOT_READY)
    assert machine.registration_done(0.0) == (ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("how", ["dial failed", "wrong peer", "route changed"])
def test_a_client_that_sent_eof_is_closed_when_the_dial_fails_and_only_a_running_dial_is_cancelled(how):
    machine = machine_at("dialling")
    machine.client_sent_eof()
    commands = {
        "dial failed": lambda: machine.dial_failed(1.0, "refused"),
        "wrong peer": lambda: machine.wrong_peer(1.0),
        "route changed": lambda: machine.route_changed(1.0, NOT_READY),
    }[how]()
    once = (CancelDial(),) if how == "route changed" else NOTHING
    assert commands == (*once, ReturnSlot(), CloseClient("the client left while it was held"))


@pytest.mark.parametrize("point", [*CONNECTED, "refused", "closed"])
def test_the_eof_of_a_client_changes_nothing_once_the_relay_or_the_refusal_owns_the_socket(point):
    machine = machine_at(point)
    assert machine.client_sent_eof() == NOTHING
    assert machine.state is STATE[point]


@pytest.mark.parametrize("point", [*UNAUTHENTICATED, *HELD])
def test_a_client_that_breaks_the_tls_protocol_gets_an_alert_and_its_slot_is_returned(point):
    machine = machine_at(point)
    assert machine.tls_failed() == (*released(point), Refuse("TlsFailed", None))
    assert (machine.state, machine.deadline) == (State.REFUSED, None)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", UNAUTHENTICATED)
def test_a_certificate_without_a_lease_token_is_refused_with_a_sentence(point):
    machine = machine_at(point)
    assert machine.certificate_rejected(NO_LEASE) == (refused(NO_LEASE),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


# --- the lease ------------------------------------------------------------------------------------------------------


def test_a_failed_search_for_the_lease_refuses_the_client():
    machine = machine_at("finding lease")
    assert machine.lease_search_done(SILENT_STORE) == (refused(SILENT_STORE),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


def test_a_client_without_a_slot_returns_none():
    machine = machine_at("taking slot")
    assert machine.slot_denied(FULL) == (refused(FULL),)
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


def test_a_failed_registration_returns_the_slot_and_refuses_the_client():
    machine = machine_at("registering")
    assert machine.registration_done(0.0, RELEASED) == (ReturnSlot(), refused(RELEASED))
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", sorted(STATE.keys() - {"taking slot"}))
def test_a_slot_that_comes_too_late_is_returned_at_once(point):
    """Also if it was asked for before the connection was refused or closed."""
    machine = machine_at(point)
    state = machine.state
    assert machine.slot_taken(MOVED, HoldBudget(LIMITS)) == (ReturnSlot(),)
    assert machine.state is state


# --- a worker that is not ready -------------------------------------------------------------------------------------


def held(now, budget, route=NOT_READY):
    """Returns a machine that has just been registered, with this route to its worker."""
    machine = machine_at("registering", budget=budget)
    machine.route_changed(now, route)
    machine.registration_done(now)
    return machine


def wait_until_refused(now, budget):
    """Waits for a worker that does not become ready; returns the seconds and the refusal at the end."""
    machine = held(now, budget)
    seconds = machine.deadline - now
    assert machine.deadline_reached(machine.deadline - 0.001) == NOTHING
    assert machine.deadline == now + seconds
    released, refuse = machine.deadline_reached(machine.deadline)
    assert released == ReturnSlot()
    assert (machine.state, machine.deadline) == (State.REFUSED, None)
    return seconds, refuse


def test_a_worker_is_dialled_when_it_becomes_ready():
    machine = held(10.0, HoldBudget(LIMITS))
    assert (machine.state, machine.deadline) == (State.WAITING, 10 + LIMITS.first_wait)
    assert machine.route_changed(12.0, replace(NOT_READY, wait_reason="it is nearly there")) == NOTHING
    assert (machine.state, machine.deadline) == (State.WAITING, 10 + LIMITS.first_wait)
    assert machine.route_changed(20.0, READY) == (DialWorker(),)
    assert (machine.state, machine.deadline) == (State.DIALLING, None)
    assert machine.worker_reached() == (StartRelay(),)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))


def test_the_first_failed_wait_ends_with_unavailable_and_the_latest_cause():
    machine = held(10.0, HoldBudget(LIMITS))
    machine.route_changed(12.0, replace(NOT_READY, wait_reason="disk full"))
    _, refuse = machine.deadline_reached(10 + LIMITS.first_wait)
    assert refuse.status == "Waited"
    assert refuse.refusal.code == GrpcCode.UNAVAILABLE == 14
    assert "p-worker-0 is not ready yet: disk full" in refuse.refusal.sentence


def test_each_failed_wait_makes_the_next_one_shorter_and_from_the_second_on_the_user_sees_the_cause():
    budget = HoldBudget(LIMITS)
    waits = [wait_until_refused(20.0 * n, budget) for n in range(4)]
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


def test_failed_waits_are_forgotten_after_some_time_without_one():
    budget = HoldBudget(LIMITS)
    wait_until_refused(0.0, budget)
    just_before = LIMITS.first_wait + LIMITS.failed_wait_memory - 0.001
    assert held(just_before, budget).deadline == just_before + LIMITS.second_wait
    assert wait_until_refused(just_before + 0.001, budget)[0] == LIMITS.first_wait


def test_that_time_starts_at_the_latest_failed_wait():
    budget = HoldBudget(LIMITS)
    wait_until_refused(0.0, budget)
    second = LIMITS.first_wait + 50
    wait_until_refused(second, budget)
    assert wait_until_refused(second + LIMITS.second_wait + 50, budget)[0] == LIMITS.later_wait


def test_simultaneous_failed_waits_count_as_one():
    budget = HoldBudget(LIMITS)
    pair = [held(0.0, budget), held(3.0, budget)]
    ends = [machine.deadline_reached(machine.deadline)[-1].status for machine in pair]
    assert ends == ["Waited", "Waited"]
    assert wait_until_refused(30.0, budget)[0] == LIMITS.second_wait


def test_the_next_wait_is_a_first_one_after_any_connection_of_the_lease_reached_the_worker():
    budget = HoldBudget(LIMITS)
    wait_until_refused(0.0, budget)
    wait_until_refused(20.0, budget)
    held(40.0, budget, READY).worker_reached()
    seconds, refuse = wait_until_refused(41.0, budget)
    assert (seconds, refuse.refusal.code) == (LIMITS.first_wait, GrpcCode.UNAVAILABLE)


# --- retries of a build that was cut --------------------------------------------------------------------------------


def refused_at_once(todo):
    """Returns the refusal of a client that is not held."""
    released, refuse = todo
    assert released == ReturnSlot()
    return refuse.status, refuse.refusal.code, refuse.refusal.sentence


REFUSED_AT_ONCE = (
    "Waited",
    GrpcCode.UNAVAILABLE,
    "worker default/p-worker-0 is not ready yet: {}. Try again in a moment.",
)


def test_a_client_that_was_accepted_within_half_a_second_of_a_cut_is_refused_and_a_later_one_is_held():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(10.0)
    soon = ConnectionMachine(LIMITS, 10 + LIMITS.cut_retry_window - 0.001)
    later = ConnectionMachine(LIMITS, 10 + LIMITS.cut_retry_window)
    for machine in (soon, later):
        machine.handshake_done(TOKEN)
        machine.lease_search_done()
        machine.slot_taken(NOT_READY, budget)
    *status, sentence = REFUSED_AT_ONCE
    assert refused_at_once(soon.registration_done(11.0)) == (*status, sentence.format("it is being started"))
    assert later.registration_done(11.0) == NOTHING
    assert (later.state, later.deadline) == (State.WAITING, 11 + LIMITS.first_wait)


def test_a_client_that_waits_when_the_worker_closes_another_connection_is_refused():
    """A worker that shuts down accepts no new connections for some time before it closes the open ones."""
    machine = held(0.0, HoldBudget(LIMITS), READY)
    machine.dial_failed(1.0, "Connection refused")
    *status, sentence = REFUSED_AT_ONCE
    assert refused_at_once(machine.worker_closed_sibling()) == (
        *status,
        sentence.format("it could not be reached (Connection refused)"),
    )


def test_a_client_after_a_cut_is_connected_if_the_worker_is_reachable():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = held(0.1, budget, READY)
    assert machine.worker_closed_sibling() == NOTHING
    assert machine.worker_reached() == (StartRelay(),)


def test_a_wrong_peer_after_a_cut_is_handled_as_usual():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = held(0.0, budget, READY)
    assert machine.wrong_peer(0.0) == NOTHING
    assert machine.worker_closed_sibling() == NOTHING
    assert machine.deadline_reached(machine.deadline) == (DialWorker(),)


def test_a_refusal_after_a_cut_does_not_count_as_a_failed_wait():
    budget = HoldBudget(LIMITS)
    budget.worker_closed_connection(0.0)
    machine = machine_at("registering", budget=budget)
    machine.route_changed(0.0, NOT_READY)
    refused_at_once(machine.registration_done(0.0))
    assert budget.allowance(1.0) == (0, LIMITS.first_wait)


# --- an address without an answer, or with a wrong peer -------------------------------------------------------------


def test_an_address_without_an_answer_is_dialled_again_until_the_wait_ends():
    now, dials = 10.0, 1
    machine = held(now, HoldBudget(LIMITS), READY)
    while machine.state is State.DIALLING:
        now += 0.25
        assert machine.dial_failed(now, "Connection refused") == NOTHING
        assert machine.state is State.WAITING
        # the first dial starts the wait, and there is one more dial at its end
        assert machine.deadline == min(now + LIMITS.redial_interval, 10.25 + LIMITS.first_wait)
        now = machine.deadline
        commands = machine.deadline_reached(now)
        dials += commands == (DialWorker(),)
    assert now == 10.25 + LIMITS.first_wait
    assert dials == 1 + LIMITS.first_wait // (0.25 + LIMITS.redial_interval)
    assert commands[0] == ReturnSlot()
    assert commands[1].status == "Waited"
    assert "it could not be reached (Connection refused)" in commands[1].refusal.sentence


def test_a_gateway_without_descriptors_blames_itself_and_not_the_worker():
    budget = HoldBudget(LIMITS)
    for code in (GrpcCode.UNAVAILABLE, GrpcCode.RESOURCE_EXHAUSTED):
        machine = held(0.0, budget, READY)
        assert machine.dial_impossible(0.0, "Too many open files") == NOTHING
        assert machine.deadline_reached(machine.deadline) == (DialWorker(),), "it tries again while there is time"
        machine.dial_impossible(1.0, "Too many open files")
        _, refuse = machine.deadline_reached(LIMITS.first_wait)
        assert (refuse.status, refuse.refusal.code) == ("NoCapacity", code)
        assert "the gateway has no resources left" in refuse.refusal.sentence
        assert "not ready" not in refuse.refusal.sentence


def test_a_worker_that_answers_a_later_dial_is_connected():
    machine = held(0.0, HoldBudget(LIMITS), READY)
    machine.dial_failed(0.0, "Connection refused")
    assert machine.deadline_reached(machine.deadline) == (DialWorker(),)
    assert machine.worker_reached() == (StartRelay(),)


def test_a_new_address_is_dialled_at_once_and_the_old_dial_is_cancelled():
    """The old address may have no host any more that refuses the dial."""
    machine = machine_at("dialling")
    assert machine.route_changed(1.0, MOVED) == (CancelDial(), DialWorker())
    assert machine.state is State.DIALLING
    assert machine.worker_reached() == (StartRelay(),)


def test_a_client_is_held_if_the_worker_ends_during_the_dial():
    machine = machine_at("dialling")
    assert machine.route_changed(1.0, NOT_READY) == (CancelDial(),)
    assert (machine.state, machine.deadline) == (State.WAITING, 1 + LIMITS.first_wait)


@pytest.mark.parametrize("point", ["registering", "dialling", *CONNECTED])
def test_a_new_expiry_of_the_lease_changes_nothing(point):
    machine = machine_at(point)
    deadline = machine.deadline
    assert machine.route_changed(1.0, replace(READY, expires_at=3e9)) == NOTHING
    assert (machine.state, machine.deadline) == (STATE[point], deadline)


def test_the_dial_uses_the_route_that_came_before_the_registration_was_done():
    machine = machine_at("registering")
    assert machine.route_changed(1.0, NOT_READY) == NOTHING
    assert machine.registration_done(2.0) == NOTHING
    assert machine.state is State.WAITING


def meet_wrong_peers(machine, until):
    """Dials a wrong peer until the wait ends; returns the commands at the end."""
    now = 0.0
    while machine.state is State.DIALLING:
        assert machine.wrong_peer(now) == NOTHING
        assert machine.wrong_peer_seen
        now = machine.deadline
        commands = machine.deadline_reached(now)
    assert now == until
    return commands


def test_a_wrong_peer_at_the_workers_address_is_tolerated_for_a_short_time():
    budget = HoldBudget(LIMITS)
    machine = held(0.0, budget, READY)
    assert meet_wrong_peers(machine, until=LIMITS.later_wait) == (
        ReturnSlot(),
        Refuse("WrongWorker", wrong_worker(READY.worker)),
    )
    assert budget.allowance(3.0) == (0, LIMITS.first_wait), "it does not count as a failed wait"


def test_a_wrong_peer_is_tolerated_no_longer_than_the_wait_lasts():
    machine = held(0.0, HoldBudget(replace(LIMITS, first_wait=1.0)), READY)
    assert meet_wrong_peers(machine, until=1.0)[-1].status == "WrongWorker"


@pytest.mark.parametrize("how", ["a new route", "a failed dial"])
def test_a_wrong_peer_is_forgotten_after(how):
    """The whole wait counts again, from its start."""
    machine = held(0.0, HoldBudget(LIMITS), READY)
    machine.wrong_peer(0.0)
    if how == "a new route":
        assert machine.route_changed(1.0, MOVED) == (DialWorker(),)
    else:
        machine.deadline_reached(machine.deadline)
        machine.dial_failed(1.0, "Connection refused")
    assert not machine.wrong_peer_seen
    machine.route_changed(1.0, NOT_READY)
    assert (machine.state, machine.deadline) == (State.WAITING, LIMITS.first_wait)
    assert machine.deadline_reached(LIMITS.first_wait)[-1].status == "Waited"


# --- the end of a lease ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", HELD)
def test_a_held_client_is_refused_when_its_lease_ends(point):
    machine = machine_at(point)
    assert machine.lease_ended(1.0, RELEASED, DRAIN) == (*released(point), refused(RELEASED))
    assert machine.connection_ended("refused") == (CloseClient("refused"),)


@pytest.mark.parametrize("point", [*UNAUTHENTICATED, "draining", "refused", "closed"])
def test_the_end_of_the_lease_changes_nothing_for(point):
    machine = machine_at(point)
    deadline = machine.deadline
    assert machine.lease_ended(1.0, RELEASED, 0.0) == NOTHING
    assert (machine.state, machine.deadline) == (STATE[point], deadline)


def test_a_busy_connection_drains_to_its_last_byte():
    machine = machine_at("relaying")
    assert machine.lease_ended(10.0, RELEASED, DRAIN) == NOTHING
    assert (machine.state, machine.deadline) == (State.DRAINING, 10 + LIMITS.drain_idle_timeout)
    assert machine.deadline_reached(machine.deadline, active_at=40.0) == NOTHING
    assert (machine.state, machine.deadline) == (State.DRAINING, 40 + LIMITS.drain_idle_timeout)
    assert machine.connection_ended("ended") == (ReturnSlot(), CloseClient("ended"))


def test_a_silent_draining_connection_is_cut():
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


def test_a_busy_connection_is_cut_at_the_end_of_the_drain():
    machine = machine_at("relaying")
    machine.lease_ended(0.0, RELEASED, 70.0)
    assert machine.deadline_reached(60.0, active_at=59.0) == NOTHING
    assert machine.deadline == 70.0
    assert machine.deadline_reached(70.0, active_at=69.9) == (
        StopRelayOrRefusal("its lease has ended, and so has the time to drain"),
    )
    assert machine.connection_ended("cut") == (ReturnSlot(), CloseClient("cut"))


def test_a_drain_may_have_no_time_at_all():
    machine = machine_at("relaying")
    machine.lease_ended(5.0, RELEASED, 0.0)
    assert machine.deadline == 5.0
    assert [type(do) for do in machine.deadline_reached(5.0, active_at=5.0)] == [StopRelayOrRefusal]


def test_a_resumed_lease_ends_the_drain_and_may_end_again():
    machine = machine_at("draining")
    assert machine.lease_resumed() == NOTHING
    assert (machine.state, machine.deadline) == (State.RELAYING, None)
    assert machine.deadline_reached(1e6) == NOTHING
    assert machine.lease_ended(1e6, RELEASED, DRAIN) == NOTHING
    assert machine.deadline == 1e6 + LIMITS.drain_idle_timeout


# --- cut, late, twice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", sorted(STATE.keys() - {*CONNECTED, "refused", "closed"}))
def test_a_cut_before_the_relay_closes_the_connection_and_releases_everything(point):
    machine = machine_at(point)
    assert machine.cut("closing") == (*released(point), CloseClient("closing"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


@pytest.mark.parametrize("point", [*CONNECTED, "refused"])
def test_a_cut_relay_or_refusal_is_closed_after_its_end_was_sent(point):
    """The end of TLS is sent first, so the slot is kept until then."""
    machine = machine_at(point)
    assert machine.cut("closing") == (StopRelayOrRefusal("closing"),)
    assert machine.state is STATE[point]
    assert machine.connection_ended("closing") == (*released(point), CloseClient("closing"))


@pytest.mark.parametrize("point", sorted(STATE.keys() - {"closed"}))
def test_a_failed_client_socket_ends_everything(point):
    machine = machine_at(point)
    assert machine.connection_ended("client: reset") == (*released(point), CloseClient("client: reset"))
    assert (machine.state, machine.deadline) == (State.CLOSED, None)


EFFECTIVE_AT = {
    **dict.fromkeys(["first bytes", "handshake done", "certificate rejected"], UNAUTHENTICATED),
    "TLS failed": (*UNAUTHENTICATED, *HELD),
    **dict.fromkeys(["lease search done", "lease search failed"], ("finding lease",)),
    "slot denied": ("taking slot",),
    **dict.fromkeys(["registration done", "registration failed"], ("registering",)),
    **dict.fromkeys(["worker reached", "dial failed", "wrong peer"], ("dialling",)),
    **dict.fromkeys(["route unchanged", "route moved", "route without endpoint"], ("waiting", "dialling")),
    "client sent eof": (*UNAUTHENTICATED, "waiting"),
    "worker closed sibling": ("waiting",),
    **dict.fromkeys(["lease ended", "lease ended for good"], (*HELD, "relaying")),
    "lease resumed": ("draining",),
    "deadline reached": (*UNAUTHENTICATED, "waiting", "draining"),
    **dict.fromkeys(["cut", "connection ended"], tuple(STATE.keys() - {"closed"})),
}
"""The points at which an event has an effect. (A late slot is returned at every other point.)"""


@pytest.mark.parametrize("event", EFFECTIVE_AT)
def test_a_late_repeated_or_unexpected_event_changes_nothing(event):
    """No second slot is taken, no worker is dialled without a slot, and a closed connection stays closed."""
    for point in STATE.keys() - EFFECTIVE_AT[event]:
        machine = machine_at(point)
        before = machine.state, machine.deadline
        commands = EVENTS[event](machine, 1.0)
        assert (point, commands, machine.state, machine.deadline) == (point, NOTHING, *before)


# --- any order ------------------------------------------------------------------------------------------------------


ANSWERS = {
    **dict.fromkeys(["lease search done", "lease search failed"], FindLease),
    **dict.fromkeys(["slot taken", "slot taken, not ready", "slot denied"], TakeSlot),
    **dict.fromkeys(["registration done", "registration failed"], Register),
    **dict.fromkeys(["worker reached", "dial failed", "wrong peer"], DialWorker),
}
NORMAL_COURSE = [
    "first bytes",
    "handshake done",
    "lease search done",
    "slot taken",
    "registration done",
    "worker reached",
]
SECONDS = st.sampled_from([0.0, 0.5, 2.0, 15.0, 60.0])
LATER = ["lease ended", "lease resumed"]  # events that do not end a relayed connection


class Driver:
    """Carries out the commands like a connection, but only counts slots, dials and closes."""

    def __init__(self):
        self.now = 1000.0
        self.machine = ConnectionMachine(LIMITS, self.now)
        self.asked = None
        """The command that has no answer yet: about the lease, the worker, or the end of a relay or a refusal."""
        self.issued = []
        self.slots = self.admissions = 0
        self.stopping = False

    def happens(self, event, seconds):
        self.now += seconds
        for _ in range(4):  # a deadline that does not move would fire forever
            if self.machine.deadline is None or self.machine.deadline > self.now or self.stopping:
                break
            self.report("deadline reached")
        else:
            raise AssertionError("the deadline does not move")
        self.report(event)

    def report(self, event):
        machine, now = self.machine, self.now
        if self.asked is not None and ANSWERS.get(event) is self.asked:
            self.asked = None
        if event.startswith("slot taken"):
            self.slots += 1
            self.admissions += 1
        todo = EVENTS[event](machine, now)
        for do in todo:
            self.do(do)
        self.check()

    def do(self, what):
        assert CloseClient not in self.issued or (what == ReturnSlot() and self.slots), "a command follows the close"
        self.issued.append(type(what))
        match what:
            case FindLease() | TakeSlot() | Register():
                assert self.asked is None, "the last command has no answer yet"
                self.asked = type(what)
            case DialWorker():
                assert self.asked is None, "another dial is running"
                assert self.slots, "a worker is dialled without a slot"
                self.asked = DialWorker
            case CancelDial():
                assert self.asked is DialWorker, "there is no dial to cancel"
                self.asked = None
            case StartRelay():
                assert self.asked is None
                assert self.slots, "a client is relayed without a slot"
                self.asked = StartRelay
            case Refuse():
                assert self.asked is not DialWorker, "a dial is still running"
                self.asked = Refuse  # answers to earlier commands are too late now
            case StopRelayOrRefusal():
                assert self.asked in {StartRelay, Refuse}, "there is nothing to stop"
                self.stopping = True
            case ReturnSlot():
                self.slots -= 1
            case CloseClient():
                assert self.asked is not DialWorker, "a dial is still running"
                self.asked = None

    def check(self):
        state, issued = self.machine.state, self.issued
        assert (state is State.CLOSED) == (CloseClient in issued)
        assert issued.count(CloseClient) <= 1
        assert issued.count(StartRelay) + issued.count(Refuse) <= 1, "a client is relayed or refused at most once"
        assert (self.asked is DialWorker) == (state is State.DIALLING)
        assert (self.asked is StartRelay) == (state in {State.RELAYING, State.DRAINING})
        assert (self.asked is Refuse) == (state is State.REFUSED)
        assert (self.asked in {FindLease, TakeSlot, Register}) == (state is State.AUTHENTICATED)
        assert issued.count(ReturnSlot) + self.slots == self.admissions
        assert self.slots in {0, 1}, "a slot is returned twice, or more than one is kept"
        if state in {State.REFUSED, State.CLOSED}:
            assert self.slots == 0, "a slot is kept by a connection that does not need it"
        if state is not State.CLOSED:
            assert self.machine.deadline is not None or self.asked is not None, "the connection would never end"
        if state is State.WAITING:
            assert self.machine.deadline <= self.now + LIMITS.first_wait

    def end(self):
        """The gateway closes. A relay or a refusal that is stopped reports its end."""
        self.report("cut")
        if self.machine.state is not State.CLOSED:
            assert self.stopping
            self.report("connection ended")
        assert self.machine.state is State.CLOSED
        assert self.issued.count(ReturnSlot) == self.admissions
        assert (self.slots, self.asked) == (0, None)
        assert self.issued.count(CloseClient) == 1


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(
    so_far=st.integers(0, len(NORMAL_COURSE)),
    then=st.lists(st.tuples(st.sampled_from(list(EVENTS)), SECONDS), max_size=12),
)
def test_in_any_order_of_events_every_slot_is_returned_every_dial_ends_and_the_close_comes_last(so_far, then):
    """A part of the normal course, then any events. Driver.check verifies the rules after each event."""
    driver = Driver()
    for event in NORMAL_COURSE[:so_far]:
        driver.happens(event, 0.0)
    for event, seconds in then:
        driver.happens(event, seconds)
    driver.end()


@settings(max_examples=examples(150), deadline=None, derandomize=True)
@given(seconds=st.lists(SECONDS, min_size=6, max_size=12), data=st.data())
def test_with_fitting_events_every_connection_ends_too(seconds, data):
    """The same with events that fit: the open command is answered, with success or failure. So it gets further."""
    driver = Driver()
    for gone in seconds:
        fitting = [event for event, question in ANSWERS.items() if question is driver.asked]
        fitting += (
            ["handshake done", "client sent eof", "route without endpoint", "route moved", *LATER]
            if driver.asked in {None, DialWorker, StartRelay}
            else []
        )
        driver.happens(data.draw(st.sampled_from(fitting or ["connection ended"])), gone)
    driver.end()
