"""The section of the settings about the gateway. `bkpool.settings.model` says what belongs in a setting."""

from __future__ import annotations

from bkpool.settings.fields import Section, seconds, setting
from bkpool.settings.kinds import Count, Duration, ListenOrDefault, OptionalPool, Texts

SESSION_CHECK = seconds(15)
"""How long BuildKit waits for the answer to its health check of a session (docs/clients.md#cuts)."""
_NOT_BEFORE_BUILDKIT = "BuildKit itself waits 15s for the answer to its health check of a session"


class GatewaySettings(Section):
    """The gateway that passes the connections of builds to workers.

    In a cluster the controller passes the times and numbers of this section on to the gateways of its pools.
    """

    address: ListenOrDefault = setting(
        None,
        "Where the gateway listens.",
        option="--gateway-address",
        unset="port 1235 on 127.0.0.1, or on every interface with --gateway-host",
    )
    hosts: Texts = setting(
        (),
        "Names and addresses of this machine by which clients reach the gateway. They go into its certificate; "
        "clients get the first one as the endpoint.",
        option="--gateway-host",
        unset="localhost",
    )
    pool: OptionalPool = setting(
        None, "The pool of a gateway that runs alone, in a cluster.", option="--pool", remembered=False
    )
    handshake_timeout: Duration = setting(
        seconds(10),
        "From accepting a connection to the end of its TLS handshake. If it is too short for a slow network, "
        "clients are cut off. If it is long, clients that never finish it keep connections open for longer.",
        between=(seconds(1), seconds(120)),
    )
    register_timeout: Duration = setting(
        seconds(5),
        "How long the store may take to register a connection or to find a lease. If it is too short for a busy API "
        "server, clients are refused. If it is long, they wait that long for a store that is gone.",
        between=(seconds(1), seconds(60)),
    )
    dial_timeout: Duration = setting(
        seconds(5),
        "How long a worker may take to accept a connection. If it is too short for a busy worker, it is dialled "
        "again and again. If it is long, a worker that is gone is noticed late.",
        between=(seconds(0.1), seconds(60)),
    )
    first_wait: Duration = setting(
        seconds(15),
        "How long the gateway holds the first client of a lease whose worker does not answer. If it is short, "
        "builds fail that a restarted worker would have served. buildx gives up after 20s: if it is longer than "
        "that, users do not see the reason.",
        between=(seconds(0), seconds(300)),
    )
    second_wait: Duration = setting(
        seconds(12),
        "The same for the next client, after one has waited in vain. A short or a long value has the effects that "
        "gateway.first_wait describes.",
        between=(seconds(0), seconds(300)),
    )
    refusal_timeout: Duration = setting(
        seconds(10),
        "How long a client that is refused may take to make its first call, which is answered with the reason. If "
        "this is too short for a slow network, the client sees only a closed connection. If it is long, refused "
        "clients take up gateway.pending_connections for longer.",
        between=(seconds(1), seconds(120)),
    )
    linger_timeout: Duration = setting(
        seconds(2),
        "How long a client may take to read this answer and to close the connection. A short or a long "
        "value has the effects that gateway.refusal_timeout describes.",
        between=(seconds(0.1), seconds(60)),
    )
    client_peer_timeout: Duration = setting(
        seconds(30),
        "A client that does not answer at all for this long is given up (TCP user timeout and keepalive). If it is "
        "short, a build ends when the client's network fails for a moment. If it is long, the connection of a client "
        "that is gone stays open for that long.",
        between=(SESSION_CHECK, seconds(3600)),
        lowest_because=_NOT_BEFORE_BUILDKIT,
    )
    worker_peer_timeout: Duration = setting(
        seconds(15),
        "The same for a worker on another machine. A worker whose disk is too busy for it to read does not answer "
        "either: raise it if builds are cut there. If it is long, a build on a machine that is gone notices it late.",
        between=(SESSION_CHECK, seconds(3600)),
        lowest_because=_NOT_BEFORE_BUILDKIT,
    )
    half_open_timeout: Duration = setting(
        seconds(60),
        "How long one direction of a connection may stay open after the other has ended. If it is short, an answer "
        "that takes long may be cut. If it is long, connections of peers that hang stay open for longer.",
        between=(seconds(1), seconds(3600)),
    )
    drain_idle_timeout: Duration = setting(
        seconds(60),
        "How long a connection may be silent after its lease has ended. If it is less than about 20s, builds may be "
        "cut between two of BuildKit's health checks. If it is long, an idle builder keeps the worker from the next "
        "caller for that long.",
        between=(seconds(1), seconds(3600)),
    )
    pending_connections: Count = setting(
        1024,
        "Connections that are in their handshake or are being refused. One more closes the oldest of the address "
        "that has most of them. If it is small, clients without a certificate can push out those with one. If it is "
        "large, they take up memory. The limit of file descriptors may allow fewer; the log says how many.",
        between=(16, 100_000),
    )
    pending_connections_per_address: Count = setting(
        512,
        "Those of one address, or of one IPv6 network of 64 bits. One more closes the oldest one of that address. If "
        "it is small, clients behind one address push each other out. If it is large, one client can take up all of "
        "gateway.pending_connections.",
        between=(16, 100_000),
    )
    connections: Count = setting(
        10_000,
        "Open connections with a lease. One more is refused. If it is small, builds are refused. If it is large, "
        "memory may run out. The limit of file descriptors may allow fewer; the log says how many.",
        between=(1, 1_000_000),
    )
    connections_per_pool: Count = setting(
        5_000,
        "Open connections of one pool. One more is refused. If it is small, builds of a large pool are refused. If "
        "it is large, one pool can take all connections.",
        between=(1, 1_000_000),
    )
    connections_per_lease: Count = setting(
        256,
        "Open connections of one lease. One more is refused. If it is small, parallel builds of one job are "
        "refused. If it is large, one job can take all connections of its pool.",
        between=(1, 100_000),
    )
