"""The gateway's limits of time and size (rule 11, docs/rules.md#r11).

Times are in seconds, sizes in bytes. Nothing here enforces a limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from bkpool.gateway.net.dial import DialLimits


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """All limits of a gateway. Tests use shorter ones."""

    handshake_timeout: float = 10.0
    """From accept to the end of the TLS handshake."""
    register_timeout: float = 5.0
    """For the store to write a registration or to search for a lease."""
    dial_timeout: float = 5.0
    """For the worker to accept a connection and, if it uses TLS, to complete the handshake."""
    redial_interval: float = 0.5
    """Between a failed dial and the next one."""
    first_wait: float = 15.0
    """How long a client is held until its worker is reachable. It is less than the 20 s for which buildx polls
    (docs/clients.md#waiting)."""
    second_wait: float = 12.0
    """The same, after one failed wait of the same lease."""
    later_wait: float = 2.0
    """The same, after two failed waits. The user has seen the reason then, but buildx makes two more connections
    before it ends. Also how long a connection waits for the worker's new address, after another peer answered at the
    old one."""
    cut_retry_window: float = 0.5
    """Refuse, instead of holding, connections that arrive this soon after the worker closed one of the same lease:
    they are retries of the cut build, which ends only when they are answered. gRPC retries within milliseconds. A
    command that is started after such a build arrives later; if not, buildx only waits a second longer."""
    failed_wait_memory: float = 60.0
    """After this time without a failed wait, the next wait is a first one again."""
    max_held_bytes: int = 16 * 1024
    """Most bytes kept of a client that is held."""
    refusal_timeout: float = 10.0
    """From a refusal to the client's first call, which is answered with the reason."""
    linger_timeout: float = 2.0
    """For the client to read the answer and to close."""
    max_refusal_bytes: int = 256 * 1024
    """Most bytes read from a refused client. HTTP/2 lets a client send less than this before it is answered."""
    client_peer_timeout: float = 30.0
    """A client that does not answer for this long is given up. It may use a network that loses packets for
    some time."""
    worker_peer_timeout: float = 15.0
    """A worker that does not answer for this long is given up. It must not be shorter than BuildKit's own health
    check of a session (docs/clients.md#cuts): a worker whose disk is too busy for it to read looks the same to the
    system once its buffers are full (tcp(7), TCP_USER_TIMEOUT). The end of a worker's process is noticed at once."""
    worker_first_byte: float = 2.0
    """A worker from which no byte has come for so long after it was connected is reported as silent: buildkitd sends
    its settings at once."""
    worker_quiet: float = 8.0
    """The same after the last byte. During a build buildkitd checks its session every 5 s (docs/clients.md#cuts)."""
    worker_look_interval: float = 2.0
    """How often a lease with connections looks for that."""
    report_interval: float = 5.0
    """The shortest time between two reports about the worker of one lease, where each may write to the store."""
    half_open_timeout: float = 60.0
    """How long one direction of a connection may stay open after the other has ended."""
    drain_idle_timeout: float = 60.0
    """How long a connection may be silent after its lease has ended (rule 8, docs/rules.md#r8)."""
    heartbeat_interval: float = 20.0
    """Between two heartbeats, which renew all registrations that are in use."""
    heartbeat_phase: float = 0.0
    """By how much they are later than multiples of the interval, so that not all gateways write at once."""
    renew_interval: float = 30.0
    """After this time without a renewal by a heartbeat, a registration that is in use is renewed on its worker."""
    retry_renewal_after: float = 5.0
    """After a renewal or a heartbeat that failed, until the next attempt."""
    unused_pause: float = 5.0
    """After the last connection of a lease that ends when it is unused, before the gateway tells that it has none. A
    command that ends in order has released its lease by then."""
    registration_trust: float = 50.0
    """How long this gateway relies on its own registration. The controller relies on it for REGISTRATION_LIFE (60 s,
    core.registrations), counted from when it saw it change, so always for longer."""
    pending_connections: int = 1024
    """Most connections without a lease: in the handshake, or being refused. One more closes the oldest of the
    address that has most of them."""
    pending_connections_per_address: int = 512
    """Most of them from one address, or from one IPv6 network of 64 bits."""
    connections: int = 10_000
    """Most connections with a lease."""
    connections_per_pool: int = 5_000
    """Most connections with a lease of one pool, so that one pool cannot take all of them."""
    connections_per_lease: int = 256
    """Most connections of one lease."""
    accept_pause: float = 0.5
    """Before accepting continues, after the system had no file descriptor or memory left."""

    @property
    def dial(self) -> DialLimits:
        """The limits of one dial of a worker."""
        return DialLimits(self.dial_timeout, self.worker_peer_timeout)
