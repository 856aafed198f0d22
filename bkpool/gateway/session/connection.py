"""One accepted socket: carries out what its `life` says, in the gateway's loop, and tells it what came of that.

It decides nothing: it moves bytes until there is a worker or a refusal, and then hands the socket to a `Relay` or a
`Farewell`. Whatever it was given it gives back.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Protocol, assert_never

import structlog

from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.gateway.net.buffers import LoopBuffers
from bkpool.gateway.net.dial import DialAttempt, Dialler, DialTarget
from bkpool.gateway.net.duplex import PeerStream
from bkpool.gateway.net.endpoint import CLIENT_PEER_TIMEOUT, SocketEndpoint
from bkpool.gateway.net.relay import SocketRelay
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.gateway.session import machine
from bkpool.gateway.session.certificate import credential_of
from bkpool.gateway.session.grpc_answer import GrpcAnswer
from bkpool.gateway.session.lease_table import LeaseRoute
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.machine import State
from bkpool.gateway.session.metrics import GatewayMetrics, Meter
from bkpool.gateway.session.refusal import Refusal
from bkpool.gateway.session.refusal_responder import RefusalResponder
from bkpool.gateway.session.shard_leases import ShardLease, ShardLeases
from bkpool.pki.worker_tls import check_worker

log = structlog.get_logger(__name__)


class ConnectionHost(Protocol):
    """What a connection needs of the loop that it lives in."""

    loop: asyncio.AbstractEventLoop
    context: ssl.SSLContext
    buffers: LoopBuffers
    error_watcher: SocketErrorWatcher
    leases: ShardLeases
    limits: GatewayLimits
    metrics: GatewayMetrics
    dial: Dialler
    now: Callable[[], datetime]

    def lead_home(self, connection: Connection, token_sha256: str) -> bool:
        """Whether this lease's home is another loop; then the connection is on its way there, and not ours."""

    def admitted(self, connection: Connection) -> None:
        """It holds a lease now."""

    def refused(self, connection: Connection) -> None:
        """It holds no lease any more, and will soon be closed."""

    def closed(self, connection: Connection) -> None:
        """Its sockets are closed."""


class Connection:
    """One accepted socket and what becomes of it.

    Args:
        host: The loop's shared things.
        sock: Accepted and non-blocking.
        peer: Where it comes from, for the log.
    """

    def __init__(self, host: ConnectionHost, sock: socket.socket, peer: str) -> None:
        self._host = host
        self._about = {"peer": peer, "pool": ""}
        self._begun_at = host.loop.time()
        self._life = machine.ConnectionMachine(host.limits, self._begun_at)
        self._todo: deque[machine.Command] = deque()
        self._doing = False
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tls = TlsStream(host.context)
        self._client = SocketEndpoint(host.loop, sock, PeerStream(self._tls), peer_timeout=CLIENT_PEER_TIMEOUT)
        self._shaking = False
        self._first = bytearray()
        self._lease: ShardLease | None = None
        self._attempt: DialAttempt | None = None
        self._dialled_at = 0.0
        self._worker: SocketEndpoint | None = None
        self._relay: SocketRelay | None = None
        self._successor: SocketRelay | RefusalResponder | None = None
        self._meter: Meter | None = None
        self._settle_in()

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._life.state

    @property
    def relaying(self) -> bool:
        """The client is connected to its worker."""
        return self._relay is not None

    # --- its loop ---------------------------------------------------------------------------------------------------

    def _settle_in(self) -> None:
        self._client.set_callbacks(self._readable, self._writable)
        self._client.watch(read=True, write=False)
        self._client.watch_errors(self._host.error_watcher, self._broken)
        self._await_deadline()

    def move_out(self, host: ConnectionHost) -> None:
        """Leaves its loop for another's: nothing of it is left there, and nothing calls it until it moves in."""
        self._client.watch(read=False, write=False)
        self._client.move_to_loop(host.loop)
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = self._timer = None
        self._host = host

    def move_in(self, token_sha256: str) -> None:
        """Goes on in the loop that is home to its lease."""
        self._settle_in()
        self._authenticated(token_sha256)

    # --- the client's socket ----------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._client.receive(self._host.buffers.received[: self._room()])
            if data is None:
                return
            if self.state in machine.GREETING:
                self._shake(data)
            else:
                self._hold(data)
        except ssl.SSLError as error:
            log.info("connection.tls-failed", **self._about, reason=error.reason)
            self._tell(self._life.tls_failed())
        except OSError as error:
            self._tell(self._life.over(f"client: {error.strerror}"))
        except Exception:
            self._fail()
            raise

    def _writable(self) -> None:
        try:
            self._flush()
        except OSError as error:
            self._tell(self._life.over(f"client: {error.strerror}"))

    def _broken(self) -> None:
        """The client has broken off, with or without bytes before that, which nobody needs any more."""
        reason = f"client: {self._client.take_error()}"
        if self._successor is not None:
            self._successor.stop(reason)
        else:
            self._tell(self._life.over(reason))

    def _flush(self) -> None:
        """Sends what can be sent, and watches for what can happen next."""
        if self._successor is not None or self.state is State.CLOSED:
            return
        stream = self._client.stream
        self._client.flush()
        self._client.watch(read=not stream.eof_received and self._room() > 0, write=bool(stream.unsent))

    def _room(self) -> int:
        """How much may be read now."""
        limits = self._host.limits
        return limits.first_bytes - len(self._first) if self.state in machine.HOLDING else limits.first_bytes

    def _shake(self, data: memoryview) -> None:
        self._tell(self._life.spoke() if data else self._life.client_ended())
        if not data:
            return
        self._shaking = True
        try:
            complete = self._tls.handshake(data)
        finally:
            self._client.stream.queue(self._tls.take())
        if complete:
            self._shaken()
        else:
            self._flush()

    def _shaken(self) -> None:
        self._shaking = False
        self._host.metrics.shaken(self._age(), ok=True)
        self._keep(memoryview(b""))  # what came with the last of the handshake
        try:
            token_sha256 = credential_of(self._tls.peer_certificate(), self._host.now())
        except BkpoolError as error:
            self._tell(self._life.unfit(error))
            return
        if not self._host.lead_home(self, token_sha256):  # else it is another thread's now
            self._authenticated(token_sha256)

    def _authenticated(self, token_sha256: str) -> None:
        self._tell(self._life.shaken(token_sha256))
        if self._client.stream.eof_received:  # with the last of the handshake
            self._tell(self._life.client_ended())
        self._writable()

    def _hold(self, data: memoryview) -> None:
        stream = self._client.stream
        if data:
            self._keep(data)
        else:
            stream.eof_received = True
        if stream.eof_received:
            self._tell(self._life.client_ended())
        self._flush()

    def _keep(self, data: memoryview) -> None:
        self._first += self._client.stream.decode(data, self._host.buffers.plaintext)

    # --- what its lease tells (leases.Member) -----------------------------------------------------------------------

    def rerouted(self, route: LeaseRoute) -> None:
        """The lease's worker came or went, or the lease has a new end."""
        self._tell(self._life.rerouted(self._host.loop.time(), route))

    def parted(self) -> None:
        """The worker has ended another connection of the lease, before its client did."""
        self._tell(self._life.parted())

    def lease_ended(self, why: BkpoolError, cut_in: float) -> None:
        """The lease is over: an open connection drains, any other is refused."""
        self._tell(self._life.lease_ended(self._host.loop.time(), why, cut_in))
        if self.state is State.DRAINING:
            log.info("connection.draining", **self._about, reason=why.code, seconds=round(cut_in))

    def lease_resumed(self) -> None:
        """The lease was renewed after all."""
        self._tell(self._life.lease_resumed())

    def cut(self, reason: str) -> None:
        """Ends the connection now, whatever it is doing."""
        self._tell(self._life.cut(reason))

    # --- what is to be done -----------------------------------------------------------------------------------------

    def _tell(self, todo: machine.Commands) -> None:
        """Does what is to be done, and what follows from it when that is known at once."""
        self._todo.extend(todo)
        if self._doing:
            return
        self._doing = True
        try:
            while self._todo:
                self._do(self._todo.popleft())
        except Exception:
            self._todo.clear()
            self._doing = False
            self._fail()
            raise
        self._doing = False
        self._await_deadline()

    def _fail(self) -> None:
        """A fault of our own: no slot is leaked, and the loop's handler logs the rest."""
        if self._successor is not None:
            self._successor.stop("an internal fault")
        self._tell(self._life.over("an internal fault"))

    def _do(self, what: machine.Command) -> None:  # noqa: C901 - a line a command
        match what:
            case machine.Seek(token_sha256):
                self._seek(token_sha256)
            case machine.Admit(token_sha256):
                self._admit(token_sha256)
            case machine.Register():
                self._register()
            case machine.DialWorker():
                self._dial()
            case machine.GiveUpDial():
                self._give_up_dial()
            case machine.Join():
                self._join()
            case machine.Refuse(status, refusal):
                self._refuse(status, refusal)
            case machine.Stop(reason):
                if self._successor is not None:
                    self._successor.stop(reason)
            case machine.Leave():
                self._leave()
            case machine.Close(reason):
                self._close(reason)
            case _:
                assert_never(what)

    def _await_deadline(self) -> None:
        if self._life.deadline == self._deadline:
            return
        self._deadline = at = self._life.deadline
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at is None else self._host.loop.call_at(at, self._time_is_up)

    def _time_is_up(self) -> None:
        self._deadline = self._timer = None
        self._shaking = self._shaking or self.state is State.ACCEPTED  # who says nothing for so long has failed, too
        active_at = self._relay.active_at if self._relay is not None else 0.0
        self._tell(self._life.time_is_up(self._host.loop.time(), active_at))

    def _seek(self, token_sha256: str) -> None:
        if self._host.leases.knows(token_sha256):
            self._tell(self._life.found())
        else:
            self._host.leases.registry.find(token_sha256, lambda error: self._tell(self._life.found(error)))

    def _admit(self, token_sha256: str) -> None:
        leases = self._host.leases
        try:
            self._lease = lease = leases.admit(token_sha256, self, self._tls.server_name)
        except BkpoolError as error:
            self._about["pool"] = leases.pool_of(token_sha256)
            self._tell(self._life.denied(error))
            return
        route = lease.route
        self._about |= {"pool": route.pool.name, "worker": str(route.worker), "allocation": route.allocation_id}
        self._host.admitted(self)
        self._tell(self._life.admitted(route, lease.patience))

    def _register(self) -> None:
        if self._lease is not None:
            self._lease.registration.ensure(
                lambda error: self._tell(self._life.registered(self._host.loop.time(), error))
            )

    def _dial(self) -> None:
        if self._lease is None:
            return
        host = self._host
        self._dialled_at = host.loop.time()
        route = self._lease.route
        target = DialTarget(route.endpoint or "", partial(check_worker, worker_uid=route.worker_uid))
        attempt = host.dial(host.loop, target, host.limits.dial, self._dialled)
        if self.state is State.DIALLING:
            self._attempt = attempt

    def _dialled(self, outcome: SocketEndpoint | OSError | WorkerFailed) -> None:
        self._attempt = None
        now = self._host.loop.time()
        dialled = partial(self._host.metrics.dialled, self._about["pool"], now - self._dialled_at)
        if isinstance(outcome, SocketEndpoint):
            dialled("reached")
            self._worker = outcome
            self._tell(self._life.dialled())
        elif isinstance(outcome, WorkerFailed):
            dialled("stranger")
            if not self._life.distrusts:
                self._log_stranger(outcome)
            self._tell(self._life.met_a_stranger(now))
        else:
            dialled("failed")
            self._tell(self._life.unreached(now, outcome.strerror or str(outcome)))

    def _log_stranger(self, why: WorkerFailed) -> None:
        endpoint = self._lease.route.endpoint if self._lease else None
        log.warning("connection.wrong-worker", **self._about, endpoint=endpoint, reason=why.message)

    def _give_up_dial(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None

    def _join(self) -> None:
        host = self._host
        assert self._lease is not None and self._worker is not None  # noqa: S101, PT018 - it has just been dialled
        self._meter = Meter(self._about["pool"], self._lease.route.worker.name, self._client.stream)
        host.metrics.opened(self._meter)
        relay = SocketRelay(
            host.loop,
            host.buffers,
            host.error_watcher,
            self._client,
            self._worker,
            half_open_timeout=host.limits.half_open,
            on_closed=self._over,
        )
        self._relay = self._successor = relay
        relay.start(self._first_bytes())

    def _over(self, reason: str) -> None:
        self._tell(self._life.over(reason))

    def _refuse(self, status: str, refusal: Refusal | None) -> None:
        host = self._host
        self._count_handshake_that_failed()
        log.info("connection.refused", **self._about, reason=status)
        host.metrics.refused(self._about["pool"], status)
        host.refused(self)
        farewell = RefusalResponder(host.loop, host.buffers, self._client, host.limits, self._over)
        self._successor = farewell
        farewell.start(None if refusal is None else GrpcAnswer(refusal), self._first_bytes())

    def _leave(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._host.leases.leave(lease, self)
            if self._relay is not None and self._relay.worker_closed_first:
                lease.parted()

    def _close(self, reason: str) -> None:
        self._count_handshake_that_failed()
        if self._meter is not None:
            self._host.metrics.closed(self._meter, self._age())
            self._log_closed(reason, self._meter)
        else:
            log.debug("connection.closed", **self._about, reason=reason)
        self._client.close()
        if self._worker is not None:
            self._worker.close()
        self._host.closed(self)

    def _count_handshake_that_failed(self) -> None:
        """Whoever said nothing, as a health probe does, has not failed."""
        if self._shaking:
            self._shaking = False
            self._host.metrics.shaken(self._age(), ok=False)

    def _first_bytes(self) -> bytes:
        first, self._first = bytes(self._first), bytearray()
        return first

    def _age(self) -> float:
        return self._host.loop.time() - self._begun_at

    def _log_closed(self, reason: str, meter: Meter) -> None:
        up, down = meter.end.bytes_in, meter.end.bytes_out
        seconds = round(self._age())
        log.info("connection.closed", **self._about, reason=reason, up=up, down=down, seconds=seconds)
