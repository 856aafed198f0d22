"""How long and how much the gateway bears (DESIGN rule 11); tests shorten it.

Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """The bounds of everything in the gateway."""

    handshake: float = 10.0
    """From accept to the end of the TLS handshake."""
    register: float = 5.0
    """For the store to take a registration, or to be looked through for a lease."""
    dial: float = 5.0
    """For the worker's socket to accept and, where it speaks TLS, to shake hands."""
    redial: float = 0.5
    """Between a dial that failed and the next one."""
    first_wait: float = 15.0
    """A client may wait for its worker: under the 20 s for which buildx polls (DESIGN 3)."""
    second_wait: float = 12.0
    """The same, when a client of this lease has waited in vain before."""
    later_wait: float = 2.0
    """The same, when the user has been told: buildx makes two more connections before it ends. Also for the table to
    learn of a worker's new address when another answers at the one it has."""
    bereaved: float = 0.5
    """Who comes so soon after the worker has ended a connection of his lease is told so instead of being held: it is
    the rest of a build that was cut, which ends only once this is answered. gRPC comes again within milliseconds; a
    command that was started after such a build comes later, and buildx then only waits a second longer."""
    forget_waits: float = 60.0
    """After so long without a wait in vain, the next one is a first one again."""
    first_bytes: int = 16 * 1024
    """Kept of a client that waits."""
    refusal: float = 10.0
    """From a refusal to the client's first call, which is answered with the reason."""
    linger: float = 2.0
    """For the client to read the answer and go."""
    refusal_bytes: int = 256 * 1024
    """Read from a client that is refused: more than HTTP/2 lets it send unasked."""
    half_open: float = 60.0
    """One direction of a connection may outlive the other."""
    idle_in_drain: float = 60.0
    """A connection whose lease has ended may be silent (DESIGN rule 8)."""
    renew: float = 20.0
    """Between renewals of a registration in use."""
    registered: float = 50.0
    """A registration is trusted here; others trust it for 60 s (worker.REGISTRATION_LIFE), so clocks may differ."""
    guests: int = 1024
    """Connections that hold no lease: in handshake or being refused. One more and the oldest goes."""
    connections: int = 10_000
    """Connections that hold a lease."""
    per_pool: int = 5_000
    """The same, of one pool: none keeps all the others out."""
    per_lease: int = 256
    """The same, of one lease."""
    accept_pause: float = 0.5
    """Before accepting goes on when the system had no descriptor or memory left."""
