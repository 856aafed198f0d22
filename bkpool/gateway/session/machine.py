"""The life of one connection as a conversation: what has happened goes in, what is to be done comes out.

It decides everything and does nothing: it has no socket, no timer and no lease, and is told the time. `connection`
carries out what it says and tells it what came of that.

    accepted -> handshaking -> authenticated -> dialling (<-> waiting) -> relaying (<-> draining) -> closed
    any of these before relaying -> refused -> closed
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from bkpool.core.errors import BkpoolError
from bkpool.gateway.session.hold_budget import HoldBudget
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.refusal import Refusal, strange, waited_again, waited_first


class State(StrEnum):
    """Where a connection is in its life."""

    ACCEPTED = "accepted"
    HANDSHAKING = "handshaking"
    AUTHENTICATED = "authenticated"
    WAITING = "waiting"
    DIALLING = "dialling"
    RELAYING = "relaying"
    DRAINING = "draining"
    REFUSED = "refused"
    CLOSED = "closed"


GREETING = frozenset({State.ACCEPTED, State.HANDSHAKING})
HOLDING = frozenset({State.AUTHENTICATED, State.WAITING, State.DIALLING})
JOINED = frozenset({State.RELAYING, State.DRAINING})


@dataclass(frozen=True, slots=True)
class Seek:
    """Find the lease, in the store if need be: `found`."""

    token_sha256: str


@dataclass(frozen=True, slots=True)
class Admit:
    """Take a slot of the lease: `admitted` or `denied`."""

    token_sha256: str


@dataclass(frozen=True, slots=True)
class Register:
    """See that this gateway is entered at the worker: `registered`."""


@dataclass(frozen=True, slots=True)
class DialWorker:
    """Dial the worker: `dialled`, `unreached` or `met_a_stranger`."""


@dataclass(frozen=True, slots=True)
class GiveUpDial:
    """Stop dialling; nothing more comes of it."""


@dataclass(frozen=True, slots=True)
class Join:
    """Relay between client and worker: `over`."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """See the client off, with this answer or with the alert that TLS has ready: `over`."""

    status: str
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Stop:
    """End the relay or the refusal that is under way: `over`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """Give back the slot of the lease."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close the client's socket. It is the last thing that is to be done."""

    reason: str


Command = Seek | Admit | Register | DialWorker | GiveUpDial | Join | Refuse | Stop | Leave | Close
Commands = tuple[Command, ...]

NOTHING: Commands = ()


class ConnectionMachine:
    """One connection, from accept to close.

    Every method tells what has happened and returns what is to be done, in that order; what is told too late, or
    twice, changes nothing. Times are seconds of one clock that never goes back.

    Args:
        limits: The bounds.
        now: When it was accepted.
    """

    def __init__(self, limits: GatewayLimits, now: float) -> None:
        self.state = State.ACCEPTED
        self.deadline: float | None = now + limits.handshake
        """When `time_is_up` is to be told, unless it changes before."""
        self._limits = limits
        self._accepted_at = now
        self._token_sha256 = ""
        self._asked: type[Command] | None = None  # of an authenticated one: what is not answered yet
        self._route: LeaseRoute | None = None
        self._patience: HoldBudget | None = None
        self._has_slot = False
        self._waits_before = 0
        self._patience_ends: float | None = None
        self._strange_until: float | None = None
        self._trouble = ""
        self._client_ended = False
        self._drains_since = self._cut_at = 0.0

    @property
    def distrusts(self) -> bool:
        """Another answered at the worker's address, and no better one is known yet."""
        return self._strange_until is not None

    # --- handshake and lease ----------------------------------------------------------------------------------------

    def spoke(self) -> Commands:
        """The client's first bytes are here."""
        if self.state is State.ACCEPTED:
            self.state = State.HANDSHAKING
        return NOTHING

    def shaken(self, token_sha256: str) -> Commands:
        """The handshake is complete, and the client's certificate is of this token."""
        if self.state not in GREETING:
            return NOTHING
        self._enter(State.AUTHENTICATED)  # the registry answers in bounded time
        self._token_sha256 = token_sha256
        return self._ask(Seek(token_sha256))

    def unfit(self, why: BkpoolError) -> Commands:
        """The handshake is complete, but the client's certificate is of no lease."""
        return self._refuse(Refusal.of(why)) if self.state in GREETING else NOTHING

    def tls_failed(self) -> Commands:
        """The client broke the rules of TLS before it was joined."""
        return self._part("TlsFailed", None) if self.state in GREETING | HOLDING else NOTHING

    def found(self, error: BkpoolError | None = None) -> Commands:
        """The lease is known as far as it can be; or cannot be looked for."""
        if not self._awaits(Seek):
            return NOTHING
        return self._ask(Admit(self._token_sha256)) if error is None else self._refuse(Refusal.of(error))

    def admitted(self, route: LeaseRoute, patience: HoldBudget) -> Commands:
        """A slot of the lease is taken."""
        if not self._awaits(Admit):
            return (Leave(),)
        self._route, self._patience, self._has_slot = route, patience, True
        return self._ask(Register())

    def denied(self, why: BkpoolError) -> Commands:
        """There is no slot for it."""
        return self._refuse(Refusal.of(why)) if self._awaits(Admit) else NOTHING

    def registered(self, now: float, error: BkpoolError | None = None) -> Commands:
        """This gateway is entered at the worker; or cannot be."""
        if not self._awaits(Register):
            return NOTHING
        return self._go(now) if error is None else self._refuse(Refusal.of(error))

    # --- held: the worker is dialled or awaited ---------------------------------------------------------------------

    def dialled(self) -> Commands:
        """The worker is there."""
        if self.state is not State.DIALLING:
            return NOTHING
        if self._patience is not None:
            self._patience.reached()
        self._enter(State.RELAYING)
        return (Join(),)

    def unreached(self, now: float, why: str) -> Commands:
        """Nobody answers at the worker's address."""
        if self.state is not State.DIALLING:
            return NOTHING
        self._strange_until = None
        self._trouble = f"it could not be reached ({why})"
        return self._wait(now)

    def met_a_stranger(self, now: float) -> Commands:
        """Another answers at the worker's address. The table may learn of a better one at any moment, or never."""
        if self.state is not State.DIALLING:
            return NOTHING
        if self._strange_until is None:
            self._strange_until = now + self._limits.later_wait
        return self._wait(now)

    def rerouted(self, now: float, route: LeaseRoute) -> Commands:
        """The lease's worker came or went, or the lease has a new end."""
        moved = self._route is not None and route.endpoint != self._route.endpoint
        self._route = route
        if not moved or self.state not in {State.WAITING, State.DIALLING}:
            return NOTHING
        self._strange_until = None
        # Nobody may be left at the old address to refuse a dial that is under way.
        given_up: Commands = (GiveUpDial(),) if self.state is State.DIALLING else NOTHING
        return given_up + self._go(now)

    def parted(self) -> Commands:
        """The worker has ended another connection of the lease: who waits may be the rest of a build that was cut."""
        return self._not_held() if self.state is State.WAITING and not self.distrusts else NOTHING

    def client_ended(self) -> Commands:
        """The client sends nothing more, and may still listen."""
        self._client_ended = True
        if self.state in GREETING:
            return self._close("the client left during the handshake")
        if self.state is State.WAITING:
            return self._close("the client left while it was held")
        return NOTHING

    # --- the lease's end --------------------------------------------------------------------------------------------

    def lease_ended(self, now: float, why: BkpoolError, cut_in: float) -> Commands:
        """The lease is over: a joined connection drains, for so many seconds at most; any other is refused."""
        if self.state is State.RELAYING:
            self._drains_since, self._cut_at = now, now + cut_in
            self._enter(State.DRAINING, min(self._cut_at, now + self._limits.idle_in_drain))
            return NOTHING
        return self._refuse(Refusal.of(why)) if self.state in HOLDING else NOTHING

    def lease_resumed(self) -> Commands:
        """The lease was renewed after all."""
        if self.state is State.DRAINING:
            self._enter(State.RELAYING)
        return NOTHING

    # --- the end ----------------------------------------------------------------------------------------------------

    def time_is_up(self, now: float, active_at: float = 0.0) -> Commands:
        """The deadline has come.

        Args:
            now: The time.
            active_at: When bytes last moved, of a joined connection.
        """
        match self.state:
            case State.ACCEPTED | State.HANDSHAKING:
                return self._close("the handshake took too long")
            case State.WAITING:
                return self._waited(now)
            case State.DRAINING:
                return self._drain(now, active_at)
        return NOTHING

    def cut(self, reason: str) -> Commands:
        """It is to end now, whatever it is doing."""
        if self.state in JOINED or self.state is State.REFUSED:
            return (Stop(reason),)
        return self._close(reason)

    def over(self, reason: str) -> Commands:
        """The relay, the refusal or the client's socket has ended."""
        return self._close(reason)

    # --- decisions --------------------------------------------------------------------------------------------------

    def _ask(self, question: Command) -> Commands:
        self._asked = type(question)
        return (question,)

    def _awaits(self, question: type[Command]) -> bool:
        return self.state is State.AUTHENTICATED and self._asked is question

    def _go(self, now: float) -> Commands:
        """Dials the worker, or waits for it."""
        if self._route is None or self._route.endpoint is None:
            return self._wait(now)
        self._enter(State.DIALLING)  # the dial has a deadline of its own
        return (DialWorker(),)

    def _wait(self, now: float) -> Commands:
        self._enter(State.WAITING)  # no dial is under way any more
        if self._client_ended:
            return self._close("the client left while it was held")
        if self._patience is not None and self._patience.bereaved(self._accepted_at) and not self.distrusts:
            return self._not_held()
        if self._patience_ends is None and self._patience is not None:
            self._waits_before, seconds = self._patience.now(now)
            self._patience_ends = now + seconds
        ends = self._end_of_wait(now)
        again = now + self._limits.redial
        reachable = self._route is not None and self._route.endpoint is not None
        self.deadline = again if reachable and again < ends else max(now, ends)
        return NOTHING

    def _waited(self, now: float) -> Commands:
        """Dials again while there is time, and tells the client when there is none."""
        if now < self._end_of_wait(now):
            return self._go(now)
        if self._route is None or self._patience is None:
            return NOTHING
        if self._strange_until is not None:
            return self._refuse(strange(self._route.worker))
        self._patience.in_vain(now, self._waits_before)
        waited = waited_again if self._waits_before else waited_first
        return self._refuse(waited(self._route.worker, self._route.waiting or self._trouble))

    def _not_held(self) -> Commands:
        """Whoever polls, as buildx does when it begins, comes again and is held then; whatever else fails at once."""
        assert self._route is not None  # noqa: S101 - it has a lease
        return self._refuse(waited_first(self._route.worker, self._route.waiting or self._trouble))

    def _end_of_wait(self, now: float) -> float:
        ends = now if self._patience_ends is None else self._patience_ends
        return ends if self._strange_until is None else min(ends, self._strange_until)

    def _drain(self, now: float, active_at: float) -> Commands:
        """Cuts it at its end or after too long a silence, and otherwise looks again then."""
        silent_at = max(active_at, self._drains_since) + self._limits.idle_in_drain
        if now >= self._cut_at:
            return self.cut("its lease has ended, and so has the time to drain")
        if now >= silent_at:
            return self.cut("its lease has ended, and it was silent")
        self.deadline = min(self._cut_at, silent_at)
        return NOTHING

    def _refuse(self, refusal: Refusal) -> Commands:
        return self._part(refusal.status, refusal)

    def _part(self, status: str, refusal: Refusal | None) -> Commands:
        given_back = self._given_back()
        self._enter(State.REFUSED)
        return (*given_back, Refuse(status, refusal))

    def _close(self, reason: str) -> Commands:
        if self.state is State.CLOSED:
            return NOTHING
        given_back = self._given_back()
        self._enter(State.CLOSED)
        return (*given_back, Close(reason))

    def _given_back(self) -> Commands:
        """What it holds and will not need any more."""
        dial: Commands = (GiveUpDial(),) if self.state is State.DIALLING else NOTHING
        slot: Commands = (Leave(),) if self._has_slot else NOTHING
        self._has_slot = False
        return dial + slot

    def _enter(self, state: State, deadline: float | None = None) -> None:
        self.state = state
        self.deadline = deadline
