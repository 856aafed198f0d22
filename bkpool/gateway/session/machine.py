"""The state of one connection: events go in, commands come out.

It makes every decision about a connection and carries out none of them. It has no socket, no timer, no lease and no
clock. `connection` carries out the commands and reports their results as events.

    accepted -> handshaking -> authenticated -> dialling (<-> waiting) -> relaying (<-> draining) -> closed
    any state before relaying -> refused -> closed
"""

from __future__ import annotations

from enum import StrEnum

from bkpool.core.errors import BkpoolError
from bkpool.gateway.session.commands import (
    NOTHING,
    CancelDial,
    CloseClient,
    Command,
    Commands,
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
from bkpool.gateway.session.refusal import (
    Refusal,
    gateway_exhausted,
    wait_failed_again,
    worker_not_ready,
    wrong_worker,
)


class State(StrEnum):
    """What a connection is doing."""

    ACCEPTED = "accepted"
    HANDSHAKING = "handshaking"
    AUTHENTICATED = "authenticated"
    WAITING = "waiting"
    DIALLING = "dialling"
    RELAYING = "relaying"
    DRAINING = "draining"
    REFUSED = "refused"
    CLOSED = "closed"


UNAUTHENTICATED = frozenset({State.ACCEPTED, State.HANDSHAKING})
"""The TLS handshake is not complete."""
HELD = frozenset({State.AUTHENTICATED, State.WAITING, State.DIALLING})
"""The client has a valid certificate and waits for its worker."""
CONNECTED = frozenset({State.RELAYING, State.DRAINING})
"""Bytes are relayed between client and worker."""


class ConnectionMachine:
    """The state machine of one connection, from accept to close.

    Every method reports an event and returns the commands that follow from it, in order. An event that comes too late
    or twice changes nothing. Times are seconds of one monotonic clock.

    Args:
        limits: The gateway's limits.
        now: When the connection was accepted.
    """

    def __init__(self, limits: GatewayLimits, now: float) -> None:
        self.state = State.ACCEPTED
        self.deadline: float | None = now + limits.handshake_timeout
        """When `deadline_reached` must be called, unless the deadline changes before; None for never."""
        self._limits = limits
        self._accepted_at = now
        self._token_sha256 = ""
        self._open_question: type[Command] | None = None  # while authenticated: the command that has no answer yet
        self._route: LeaseRoute | None = None
        self._hold_budget: HoldBudget | None = None
        self._has_slot = False
        self._failed_waits = 0
        self._hold_ends_at: float | None = None
        self._wrong_peer_until: float | None = None
        self._dial_failure = ""
        self._gateway_exhausted = False  # the last dial failed because of this gateway
        self._client_sent_eof = False
        self._draining_since = self._cut_at = 0.0

    @property
    def wrong_peer_seen(self) -> bool:
        """Whether another peer than the worker answered at the worker's address, and no newer address is known."""
        return self._wrong_peer_until is not None

    # --- handshake and lease ----------------------------------------------------------------------------------------

    def first_bytes_received(self) -> Commands:
        """The client has sent its first bytes."""
        if self.state is State.ACCEPTED:
            self.state = State.HANDSHAKING
        return NOTHING

    def handshake_done(self, token_sha256: str) -> Commands:
        """The TLS handshake is complete, and the client's certificate holds the token with this digest."""
        if self.state not in UNAUTHENTICATED:
            return NOTHING
        self._enter(State.AUTHENTICATED)  # no deadline: the registry answers in bounded time
        self._token_sha256 = token_sha256
        return self._ask(FindLease(token_sha256))

    def certificate_rejected(self, error: BkpoolError) -> Commands:
        """The TLS handshake is complete, but the client's certificate is not a valid one of a lease."""
        return self._refuse(Refusal.of(error)) if self.state in UNAUTHENTICATED else NOTHING

    def tls_failed(self) -> Commands:
        """The client broke the TLS protocol before it was connected to its worker."""
        return self._start_refusal("TlsFailed", None) if self.state in UNAUTHENTICATED | HELD else NOTHING

    def lease_search_done(self, error: BkpoolError | None = None) -> Commands:
        """The table of leases is as new as it can be; or the search failed with this error."""
        if not self._awaits(FindLease):
            return NOTHING
        return self._ask(TakeSlot(self._token_sha256)) if error is None else self._refuse(Refusal.of(error))

    def slot_taken(self, route: LeaseRoute, hold_budget: HoldBudget) -> Commands:
        """The connection has a slot of the lease."""
        if not self._awaits(TakeSlot):
            return (ReturnSlot(),)
        self._route, self._hold_budget, self._has_slot = route, hold_budget, True
        return self._ask(Register())

    def slot_denied(self, error: BkpoolError) -> Commands:
        """The connection gets no slot of the lease."""
        return self._refuse(Refusal.of(error)) if self._awaits(TakeSlot) else NOTHING

    def registration_done(self, now: float, error: BkpoolError | None = None) -> Commands:
        """This gateway is registered at the worker; or the registration failed with this error."""
        if not self._awaits(Register):
            return NOTHING
        return self._dial_or_wait(now) if error is None else self._refuse(Refusal.of(error))

    # --- held: the worker is dialled or awaited ---------------------------------------------------------------------

    def worker_reached(self) -> Commands:
        """The dial succeeded."""
        if self.state is not State.DIALLING:
            return NOTHING
        if self._hold_budget is not None:
            self._hold_budget.worker_reached()
        self._enter(State.RELAYING)
        return (StartRelay(),)

    def dial_failed(self, now: float, reason: str) -> Commands:
        """Nothing answers at the worker's address."""
        if self.state is not State.DIALLING:
            return NOTHING
        self._wrong_peer_until = None
        self._gateway_exhausted, self._dial_failure = False, f"it could not be reached ({reason})"
        return self._wait(now)

    def dial_impossible(self, now: float, reason: str) -> Commands:
        """This gateway has no descriptor or memory left to dial. That says nothing about the worker."""
        if self.state is not State.DIALLING:
            return NOTHING
        self._gateway_exhausted, self._dial_failure = True, reason
        return self._wait(now)

    def wrong_peer(self, now: float) -> Commands:
        """Another peer than the worker answers at the worker's address.

        The table of leases may get the new address at any moment, so the connection waits for a short time.
        """
        if self.state is not State.DIALLING:
            return NOTHING
        if self._wrong_peer_until is None:
            self._wrong_peer_until = now + self._limits.later_wait
        return self._wait(now)

    def route_changed(self, now: float, route: LeaseRoute) -> Commands:
        """The lease's worker has started or ended, or the lease has a new expiry."""
        moved = self._route is not None and route.endpoint != self._route.endpoint
        self._route = route
        if not moved or self.state not in {State.WAITING, State.DIALLING}:
            return NOTHING
        self._wrong_peer_until = None
        # The old address may have no host any more, so a dial to it may not even be refused.
        cancelled: Commands = (CancelDial(),) if self.state is State.DIALLING else NOTHING
        return cancelled + self._dial_or_wait(now)

    def worker_closed_sibling(self) -> Commands:
        """The worker closed another connection of the lease, so this one may belong to the build that was cut."""
        return self._refuse_now() if self.state is State.WAITING and not self.wrong_peer_seen else NOTHING

    def client_sent_eof(self) -> Commands:
        """The client sends nothing more. It may still read."""
        self._client_sent_eof = True
        if self.state in UNAUTHENTICATED:
            return self._close("the client left during the handshake")
        if self.state is State.WAITING:
            return self._close("the client left while it was held")
        return NOTHING

    # --- the lease's end --------------------------------------------------------------------------------------------

    def lease_ended(self, now: float, error: BkpoolError, cut_in: float) -> Commands:
        """The lease has ended. A relayed connection drains for at most `cut_in` seconds; a held one is refused."""
        if self.state is State.RELAYING:
            self._draining_since, self._cut_at = now, now + cut_in
            self._enter(State.DRAINING, min(self._cut_at, now + self._limits.drain_idle_timeout))
            return NOTHING
        return self._refuse(Refusal.of(error)) if self.state in HELD else NOTHING

    def lease_resumed(self) -> Commands:
        """The lease was renewed before it ended; this gateway learns of it only now."""
        if self.state is State.DRAINING:
            self._enter(State.RELAYING)
        return NOTHING

    # --- the connection's end ---------------------------------------------------------------------------------------

    def deadline_reached(self, now: float, active_at: float = 0.0) -> Commands:
        """The time of `deadline` has come.

        Args:
            now: The time.
            active_at: When bytes last moved; only used for a relayed connection.
        """
        match self.state:
            case State.ACCEPTED | State.HANDSHAKING:
                return self._close("the handshake took too long")
            case State.WAITING:
                return self._redial_or_refuse(now)
            case State.DRAINING:
                return self._continue_or_end_drain(now, active_at)
        return NOTHING

    def cut(self, reason: str) -> Commands:
        """The connection must end now, in whatever state it is."""
        if self.state in CONNECTED or self.state is State.REFUSED:
            return (StopRelayOrRefusal(reason),)
        return self._close(reason)

    def connection_ended(self, reason: str) -> Commands:
        """The relay, the refusal or the client's socket has ended."""
        return self._close(reason)

    # --- decisions --------------------------------------------------------------------------------------------------

    def _ask(self, question: Command) -> Commands:
        self._open_question = type(question)
        return (question,)

    def _awaits(self, question: type[Command]) -> bool:
        return self.state is State.AUTHENTICATED and self._open_question is question

    def _dial_or_wait(self, now: float) -> Commands:
        if self._route is None or self._route.endpoint is None:
            return self._wait(now)
        self._enter(State.DIALLING)  # no deadline: the dial has its own
        return (DialWorker(),)

    def _wait(self, now: float) -> Commands:
        self._enter(State.WAITING)  # no dial is running any more
        if self._client_sent_eof:
            return self._close("the client left while it was held")
        if self._follows_a_cut() and not self.wrong_peer_seen:
            return self._refuse_now()
        if self._hold_ends_at is None and self._hold_budget is not None:
            self._failed_waits, seconds = self._hold_budget.allowance(now)
            self._hold_ends_at = now + seconds
        wait_ends_at = self._wait_ends_at(now)
        redial_at = now + self._limits.redial_interval
        has_endpoint = self._route is not None and self._route.endpoint is not None
        self.deadline = redial_at if has_endpoint and redial_at < wait_ends_at else max(now, wait_ends_at)
        return NOTHING

    def _follows_a_cut(self) -> bool:
        return self._hold_budget is not None and self._hold_budget.follows_a_cut(self._accepted_at)

    def _redial_or_refuse(self, now: float) -> Commands:
        """Dials again while there is time left, and refuses the client when there is none."""
        if now < self._wait_ends_at(now):
            return self._dial_or_wait(now)
        if self._route is None or self._hold_budget is None:
            return NOTHING
        if self._wrong_peer_until is not None:
            return self._refuse(wrong_worker(self._route.worker))
        self._hold_budget.wait_failed(now, self._failed_waits)
        return self._refuse(self._not_connected(self._route, again=self._failed_waits > 0))

    def _refuse_now(self) -> Commands:
        """Refuses without a wait. A client that polls, such as a new buildx, tries again and is held then."""
        assert self._route is not None  # noqa: S101 - it has a slot, so it has a route
        return self._refuse(self._not_connected(self._route, again=False))

    def _not_connected(self, route: LeaseRoute, *, again: bool) -> Refusal:
        """Why the client has no worker.

        Args:
            route: Its route.
            again: Whether an earlier client of the lease waited in vain.
        """
        if self._gateway_exhausted and route.endpoint is not None:
            return gateway_exhausted(route.worker, self._dial_failure, again=again)
        refusal = wait_failed_again if again else worker_not_ready
        return refusal(route.worker, route.wait_reason or self._dial_failure)

    def _wait_ends_at(self, now: float) -> float:
        ends_at = now if self._hold_ends_at is None else self._hold_ends_at
        return ends_at if self._wrong_peer_until is None else min(ends_at, self._wrong_peer_until)

    def _continue_or_end_drain(self, now: float, active_at: float) -> Commands:
        """Cuts a draining connection at its end or after too long a silence; otherwise sets the next deadline."""
        idle_at = max(active_at, self._draining_since) + self._limits.drain_idle_timeout
        if now >= self._cut_at:
            return self.cut("its lease has ended, and so has the time to drain")
        if now >= idle_at:
            return self.cut("its lease has ended, and it was silent")
        self.deadline = min(self._cut_at, idle_at)
        return NOTHING

    def _refuse(self, refusal: Refusal) -> Commands:
        return self._start_refusal(refusal.status, refusal)

    def _start_refusal(self, status: str, refusal: Refusal | None) -> Commands:
        released = self._release()
        self._enter(State.REFUSED)
        return (*released, Refuse(status, refusal))

    def _close(self, reason: str) -> Commands:
        if self.state is State.CLOSED:
            return NOTHING
        released = self._release()
        self._enter(State.CLOSED)
        return (*released, CloseClient(reason))

    def _release(self) -> Commands:
        """Cancels the dial and gives the slot back, if the connection has them."""
        dial: Commands = (CancelDial(),) if self.state is State.DIALLING else NOTHING
        slot: Commands = (ReturnSlot(),) if self._has_slot else NOTHING
        self._has_slot = False
        return dial + slot

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state = state
        self.deadline = deadline
