"""What the state machine of a connection tells `connection` to do, and which event answers each command.

Nothing here does anything or decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkpool.gateway.session.refusal import Refusal


@dataclass(frozen=True, slots=True)
class FindLease:
    """Look for the lease, in the store if the table does not have it. Answered by `lease_search_done`."""

    token_sha256: str


@dataclass(frozen=True, slots=True)
class TakeSlot:
    """Take a slot of the lease. Answered by `slot_taken` or `slot_denied`."""

    token_sha256: str


@dataclass(frozen=True, slots=True)
class Register:
    """Make sure that this gateway is registered at the worker. Answered by `registration_done`."""


@dataclass(frozen=True, slots=True)
class DialWorker:
    """Dial the worker. Answered by `worker_reached`, `dial_failed`, `dial_impossible` or `wrong_peer`."""


@dataclass(frozen=True, slots=True)
class CancelDial:
    """Cancel the dial. No answer to it will come."""


@dataclass(frozen=True, slots=True)
class StartRelay:
    """Relay bytes between client and worker. Answered by `connection_ended`."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send the client this refusal, or only the pending TLS alert if it is None. Answered by `connection_ended`."""

    status: str
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class StopRelayOrRefusal:
    """End the relay or the refusal that is running. Answered by `connection_ended`."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReturnSlot:
    """Give the slot of the lease back."""


@dataclass(frozen=True, slots=True)
class CloseClient:
    """Close the client's socket. No command follows this one."""

    reason: str


Command = (
    FindLease
    | TakeSlot
    | Register
    | DialWorker
    | CancelDial
    | StartRelay
    | Refuse
    | StopRelayOrRefusal
    | ReturnSlot
    | CloseClient
)
Commands = tuple[Command, ...]

NOTHING: Commands = ()
