"""One accepted connection in its loop: carries out the commands of its state machine and reports the results.

It decides nothing. It owns the client's socket until there is a worker or a refusal, and then hands the socket to a
`SocketRelay` or a `RefusalResponder`. It gives back everything that it takes.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Protocol, assert_never

import structlog

from bkpool.core.connection_places import origin_of
from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.core.names import Key
from bkpool.gateway.net.dial import DialAttempt, Dialler, DialTarget
from bkpool.gateway.net.endpoint import SocketEndpoint
from bkpool.gateway.net.relay import SocketRelay, WorkerBytes
from bkpool.gateway.session import commands, machine
from bkpool.gateway.session.certificate import token_digest
from bkpool.gateway.session.client_socket import ClientSocket, SocketHost
from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.machine import State
from bkpool.gateway.session.metrics import GatewayMetrics, Meter
from bkpool.gateway.session.refusal import Refusal
from bkpool.gateway.session.refusal_responder import RefusalResponder
from bkpool.gateway.session.shard_leases import ShardLease, ShardLeases
from bkpool.pki.worker_tls import check_worker
from bkpool.ports.acceptor import OUT_OF_RESOURCES

log = structlog.get_logger(__name__)


class ConnectionHost(SocketHost, Protocol):
    """The loop shard of a connection, as the connection sees it."""

    leases: ShardLeases
    metrics: GatewayMetrics
    dial: Dialler
    now: Callable[[], datetime]

    def hand_over(self, connection: Connection, token_sha256: str) -> bool:
        """Moves the connection to the loop that owns its lease.

        Returns:
            Whether that is another loop. Then the connection must not be touched in this loop any more.
        """

    def admitted(self, connection: Connection) -> None:
        """The connection has a lease now."""

    def refused(self, connection: Connection) -> None:
        """The connection has no lease any more, and will soon be closed."""

    def closed(self, connection: Connection) -> None:
        """The connection's sockets are closed."""


class Connection:
    """One accepted connection, from accept to close.

    Args:
        host: The connection's loop.
        sock: Accepted and non-blocking.
        peer: The client's address, for the log.

    Raises:
        OSError: The client has closed the connection already.
    """

    def __init__(self, host: ConnectionHost, sock: socket.socket, peer: str) -> None:
        self._host = host
        self.origin = origin_of(peer.rpartition(":")[0])
        """Where it comes from, for limits of one address."""
        self._log_fields = {"peer": peer, "pool": ""}
        self._pool: Key | None = None
        self._accepted_at = host.loop.time()
        self._machine = machine.ConnectionMachine(host.limits, self._accepted_at)
        self._commands: deque[commands.Command] = deque()
        self._executing = False
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._handshake_running = False
        self._lease: ShardLease | None = None
        self._dial_attempt: DialAttempt | None = None
        self._dialled_at = 0.0
        self._worker: SocketEndpoint | None = None
        self._relay: SocketRelay | None = None
        self._relay_or_refusal: SocketRelay | RefusalResponder | None = None
        self._meter: Meter | None = None
        self._client = ClientSocket(host, sock, self)
        self._update_timer()

    @property
    def state(self) -> State:
        """What the connection is doing."""
        return self._machine.state

    @property
    def relaying(self) -> bool:
        """Whether the client is connected to its worker."""
        return self._relay is not None

    @property
    def worker_bytes(self) -> WorkerBytes | None:
        """What it knows of its worker; None: it is not connected to it."""
        return self._relay.worker_bytes if self._relay else None

    # --- its loop ---------------------------------------------------------------------------------------------------

    def leave_loop(self, host: ConnectionHost) -> None:
        """Leaves its loop for another one. Nothing calls it until `enter_loop` is called in the other loop."""
        self._client.leave_loop(host)
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = self._timer = None
        self._host = host

    def enter_loop(self, token_sha256: str) -> None:
        """Continues in the loop that owns its lease."""
        self._client.enter_loop()
        self._update_timer()
        self._authenticated(token_sha256)

    # --- events of the client's socket (client_socket.ClientSocketEvents) -------------------------------------------

    def first_bytes_received(self) -> None:
        """The client has sent bytes of its handshake."""
        self._handshake_running = True
        self._execute(self._machine.first_bytes_received())

    def handshake_complete(self) -> None:
        """The TLS handshake is complete."""
        self._handshake_running = False
        self._host.metrics.handshake_done(self._age(), ok=True)

    def certificate_received(self, der: bytes | None) -> None:
        """Checks the client's certificate, and moves the connection to the loop that owns its lease."""
        try:
            token_sha256 = token_digest(der, self._host.now())
        except BkpoolError as error:
            self._execute(self._machine.certificate_rejected(error))
            return
        if not self._host.hand_over(self, token_sha256):
            self._authenticated(token_sha256)

    def client_sent_eof(self) -> None:
        """The client sends nothing more."""
        self._execute(self._machine.client_sent_eof())

    def tls_failed(self, reason: str) -> None:
        """The client broke the TLS protocol."""
        self._say(log.info, "connection.tls_failed", reason=reason)
        self._execute(self._machine.tls_failed())

    def socket_failed(self, reason: str) -> None:
        """The client's socket has failed."""
        if self._relay_or_refusal is not None:
            self._relay_or_refusal.stop(f"client: {reason}")
        else:
            self._connection_ended(f"client: {reason}")

    def internal_error(self) -> None:
        """Ends the connection after an unexpected exception, so that its slot is given back."""
        if self._relay_or_refusal is not None:
            self._relay_or_refusal.stop("an internal error")
        self._connection_ended("an internal error")

    def _authenticated(self, token_sha256: str) -> None:
        self._execute(self._machine.handshake_done(token_sha256))
        if self._client.eof_received:  # it came together with the end of the handshake
            self._execute(self._machine.client_sent_eof())
        self._client.flush()

    # --- events of its lease (shard_leases.LeaseMember) -------------------------------------------------------------

    def route_changed(self, route: LeaseRoute) -> None:
        """The worker has started or ended, or the lease has a new expiry."""
        self._execute(self._machine.route_changed(self._host.loop.time(), route))

    def worker_closed_sibling(self) -> None:
        """The worker closed another connection of the lease before its client did."""
        self._execute(self._machine.worker_closed_sibling())

    def lease_ended(self, error: BkpoolError, cut_in: float) -> None:
        """The lease has ended: a relayed connection drains, a held one is refused."""
        self._execute(self._machine.lease_ended(self._host.loop.time(), error, cut_in))
        if self.state is State.DRAINING:
            self._say(log.info, "connection.draining", reason=error.code, seconds=round(cut_in))

    def lease_resumed(self) -> None:
        """The lease was renewed before it ended; this gateway learns of it only now."""
        self._execute(self._machine.lease_resumed())

    def cut(self, reason: str) -> None:
        """Ends the connection now, in whatever state it is."""
        self._execute(self._machine.cut(reason))

    # --- commands ---------------------------------------------------------------------------------------------------

    def _execute(self, todo: commands.Commands) -> None:
        """Carries out these commands, and those that follow from their immediate results."""
        self._commands.extend(todo)
        if self._executing:
            return
        self._executing = True
        try:
            while self._commands:
                self._execute_one(self._commands.popleft())
        except Exception:
            self._commands.clear()
            self._executing = False
            self.internal_error()
            raise
        self._executing = False
        self._update_timer()

    def _execute_one(self, command: commands.Command) -> None:  # noqa: C901 - one case for each command
        match command:
            case commands.FindLease(token_sha256):
                self._find_lease(token_sha256)
            case commands.TakeSlot(token_sha256):
                self._take_slot(token_sha256)
            case commands.Register():
                self._register()
            case commands.DialWorker():
                self._dial_worker()
            case commands.CancelDial():
                self._cancel_dial()
            case commands.StartRelay():
                self._start_relay()
            case commands.Refuse(status, refusal):
                self._refuse(status, refusal)
            case commands.StopRelayOrRefusal(reason):
                if self._relay_or_refusal is not None:
                    self._relay_or_refusal.stop(reason)
            case commands.ReturnSlot():
                self._return_slot()
            case commands.CloseClient(reason):
                self._close(reason)
            case _:
                assert_never(command)

    def _update_timer(self) -> None:
        if self._machine.deadline == self._deadline:
            return
        self._deadline = at = self._machine.deadline
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at is None else self._host.loop.call_at(at, self._deadline_reached)

    def _deadline_reached(self) -> None:
        self._deadline = self._timer = None
        if self.state is State.ACCEPTED:  # a client that sent nothing until the deadline counts as a failed handshake
            self._handshake_running = True
        active_at = self._relay.active_at if self._relay is not None else 0.0
        self._execute(self._machine.deadline_reached(self._host.loop.time(), active_at))

    def _find_lease(self, token_sha256: str) -> None:
        if self._host.leases.knows(token_sha256):
            self._execute(self._machine.lease_search_done())
        else:
            self._host.leases.registry.find(
                token_sha256, lambda error: self._execute(self._machine.lease_search_done(error))
            )

    def _take_slot(self, token_sha256: str) -> None:
        leases = self._host.leases
        try:
            self._lease = lease = leases.take_slot(token_sha256, self, self._client.server_name)
        except BkpoolError as error:
            self._pool = leases.pool_of(token_sha256)
            self._log_fields["pool"] = self._pool.name if self._pool else ""
            self._execute(self._machine.slot_denied(error))
            return
        route = lease.route
        self._pool = route.pool
        self._log_fields |= {"pool": route.pool.name, "worker": str(route.worker), "allocation": route.lease_id}
        self._host.admitted(self)
        self._execute(self._machine.slot_taken(route, lease.hold_budget))

    def _register(self) -> None:
        if self._lease is not None:
            self._lease.registration.ensure(
                lambda error: self._execute(self._machine.registration_done(self._host.loop.time(), error))
            )

    def _dial_worker(self) -> None:
        if self._lease is None:
            return
        host = self._host
        self._dialled_at = host.loop.time()
        route = self._lease.route
        target = DialTarget(route.pool, route.endpoint or "", partial(check_worker, worker_uid=route.worker_uid))
        attempt = host.dial(host.loop, target, host.limits.dial, self._dial_done)
        if self.state is State.DIALLING:
            self._dial_attempt = attempt

    def _dial_done(self, outcome: SocketEndpoint | OSError | WorkerFailed) -> None:
        self._dial_attempt = None
        now = self._host.loop.time()
        count = partial(self._host.metrics.dial_done, self._pool, now - self._dialled_at)
        if isinstance(outcome, SocketEndpoint):
            count("reached")
            self._worker = outcome
            self._execute(self._machine.worker_reached())
        elif isinstance(outcome, WorkerFailed):
            count("stranger")
            if not self._machine.wrong_peer_seen:
                endpoint = self._lease.route.endpoint if self._lease else None
                self._say(log.warning, "connection.wrong_worker", endpoint=endpoint, reason=outcome.message)
            self._execute(self._machine.wrong_peer(now))
        elif outcome.errno in OUT_OF_RESOURCES:
            count("exhausted")
            self._execute(self._machine.dial_impossible(now, outcome.strerror or str(outcome)))
        else:
            count("failed")
            if self._lease is not None:
                self._lease.worker_unreachable()
            self._execute(self._machine.dial_failed(now, outcome.strerror or str(outcome)))

    def _cancel_dial(self) -> None:
        if self._dial_attempt is not None:
            self._dial_attempt.cancel()
            self._dial_attempt = None

    def _start_relay(self) -> None:
        host = self._host
        assert self._lease is not None and self._worker is not None  # noqa: S101, PT018 - the dial has just succeeded
        self._meter = Meter(self._lease.route.pool, self._lease.route.worker.name, self._client.endpoint.stream)
        host.metrics.relay_started(self._meter)
        relay = SocketRelay(
            host.loop,
            host.buffers,
            host.error_watcher,
            self._client.endpoint,
            self._worker,
            half_open_timeout=host.limits.half_open_timeout,
            on_closed=self._connection_ended,
        )
        self._relay = self._relay_or_refusal = relay
        relay.start(self._client.release())

    def _connection_ended(self, reason: str) -> None:
        self._execute(self._machine.connection_ended(reason))

    def _refuse(self, status: str, refusal: Refusal | None) -> None:
        host = self._host
        self._count_failed_handshake()
        self._say(log.info, "connection.refused", reason=status)
        host.metrics.refused(self._pool, status)
        host.refused(self)
        responder = RefusalResponder(
            host.loop, host.buffers, self._client.endpoint, host.limits, self._connection_ended
        )
        self._relay_or_refusal = responder
        responder.start(None if refusal is None else GrpcAnswer(refusal), self._client.release())

    def _return_slot(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._host.leases.return_slot(lease, self)
            if self._relay is not None and self._relay.worker_closed_first:
                lease.worker_closed_connection()

    def _close(self, reason: str) -> None:
        self._count_failed_handshake()
        if self._meter is not None:
            self._host.metrics.relay_ended(self._meter, self._age())
            sums = {"up": self._meter.stream.bytes_in, "down": self._meter.stream.bytes_out}
            self._say(log.info, "connection.closed", reason=reason, **sums, seconds=round(self._age()))
        else:
            self._say(log.debug, "connection.closed", reason=reason)
        self._client.close()
        if self._worker is not None:
            self._worker.close()
        self._relay = self._relay_or_refusal = None  # they refer to this connection
        self._host.closed(self)

    def _count_failed_handshake(self) -> None:
        """Counts a handshake that did not complete. A client that sent nothing, such as a probe, is not counted."""
        if self._handshake_running:
            self._handshake_running = False
            self._host.metrics.handshake_done(self._age(), ok=False)

    def _age(self) -> float:
        return self._host.loop.time() - self._accepted_at

    def _say(self, level: Callable[..., object], event: str, **fields: object) -> None:
        """Writes a log line in the loop's next step: it may fail there (rule 15, docs/rules.md#r15)."""
        self._host.loop.call_soon(partial(level, event, **self._log_fields, **fields))
