"""The life of one connection: from accept, through handshake, lease and dial, to relay or refusal, to its end.

It only reacts: to its socket, its timer, its lease and its dial, all in the gateway's loop. In the end it hands the
socket to a `Relay` or a `Farewell`; every way out goes through `_close`, which gives everything back.

    handshaking -> authenticated -> dialling (<-> waiting) -> relaying (<-> draining) -> closed
    any of these before relaying -> refused -> closed
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

import structlog

from bkpool.core import tokens
from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.gateway.answer import Answer
from bkpool.gateway.certificate import token_of
from bkpool.gateway.dial import Attempt, Dialler
from bkpool.gateway.exchange import End, Scratch, Tls
from bkpool.gateway.farewell import Farewell
from bkpool.gateway.leases import Lease, Leases
from bkpool.gateway.limits import Limits
from bkpool.gateway.metrics import Metrics
from bkpool.gateway.refusal import Refusal, strange, waited_again, waited_first
from bkpool.gateway.relay import Leg, Relay

log = structlog.get_logger(__name__)


class State(StrEnum):
    """Where a connection is in its life."""

    HANDSHAKING = "handshaking"
    AUTHENTICATED = "authenticated"
    WAITING = "waiting"
    DIALLING = "dialling"
    RELAYING = "relaying"
    DRAINING = "draining"
    REFUSED = "refused"
    CLOSED = "closed"


_HOLDING = frozenset({State.AUTHENTICATED, State.WAITING, State.DIALLING})


class Host(Protocol):
    """What a connection needs of the loop that it lives in."""

    loop: asyncio.AbstractEventLoop
    context: ssl.SSLContext
    scratch: Scratch
    leases: Leases
    limits: Limits
    metrics: Metrics
    dial: Dialler
    now: Callable[[], datetime]

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

    def __init__(self, host: Host, sock: socket.socket, peer: str) -> None:
        self.state = State.HANDSHAKING
        self._host = host
        self._peer = peer
        self._begun_at = host.loop.time()
        self._tls = Tls(host.context)
        self._client = Leg(host.loop, sock, End(self._tls))
        self._first = bytearray()
        self._deadline: asyncio.TimerHandle | None = None
        self._lease: Lease | None = None
        self._pool = ""
        self._attempt: Attempt | None = None
        self._trouble = ""
        self._strange_until: float | None = None
        self._patience_ends: float | None = None
        self._waits_before = 0
        self._relay: Relay | None = None
        self._successor: Relay | Farewell | None = None
        self._drains_since = self._cut_at = 0.0
        self._client.attach(self._readable, self._writable)
        self._client.watch(read=True, write=False)
        self._enter(State.HANDSHAKING, host.limits.handshake, lambda: self._close("the handshake took too long"))

    @property
    def relaying(self) -> bool:
        """The client is connected to its worker."""
        return self._relay is not None

    # --- the socket -------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._client.receive(self._host.scratch.received[: self._room()])
            if data is None:
                return
            if self.state is State.HANDSHAKING:
                self._shake(data)
            else:
                self._hold(data)
        except ssl.SSLError as error:
            self._fail(error)
        except OSError as error:
            self._close(f"client: {error.strerror}")
        except Exception:
            self._close("an internal fault")  # no slot is leaked; the loop's handler logs the rest
            raise

    def _writable(self) -> None:
        try:
            self._flush()
        except OSError as error:
            self._close(f"client: {error.strerror}")

    def _flush(self) -> None:
        """Sends what can be sent, and watches for what can happen next."""
        if self._successor is not None or self.state is State.CLOSED:
            return
        end = self._client.end
        self._client.flush()
        self._client.watch(read=not end.heard_end and self._room() > 0, write=bool(end.unsent))

    def _room(self) -> int:
        """How much may be read now."""
        limits = self._host.limits
        return limits.first_bytes - len(self._first) if self.state in _HOLDING else limits.first_bytes

    # --- handshake and lease ----------------------------------------------------------------------------------------

    def _shake(self, data: memoryview) -> None:
        if not data:
            self._close("the client left during the handshake")
            return
        try:
            complete = self._tls.handshake(data)
        finally:
            self._client.end.queue(self._tls.take())
        if complete:
            self._enter(State.AUTHENTICATED)  # the registry answers in bounded time
            self._keep(memoryview(b""))  # what came with the last of the handshake
            self._authenticate()
        self._flush()

    def _authenticate(self) -> None:
        """Admits the client, once the store has been asked for a lease that may be newer than our table."""
        leases = self._host.leases
        try:
            token_sha256 = tokens.digest(token_of(self._tls.peer_certificate(), self._host.now()))
        except BkpoolError as error:
            self._refuse(Refusal.of(error))
            return
        if leases.knows(token_sha256):
            self._admit(token_sha256)
        else:
            leases.registry.find(token_sha256, partial(self._sought, token_sha256))

    def _sought(self, token_sha256: str, error: BkpoolError | None) -> None:
        if self.state is not State.AUTHENTICATED:
            return
        if error is None:
            self._admit(token_sha256)
        else:
            self._refuse(Refusal.of(error))

    def _admit(self, token_sha256: str) -> None:
        host = self._host
        try:
            self._lease = host.leases.admit(token_sha256, self, self._tls.asked_for)
        except BkpoolError as error:
            self._pool = host.leases.pool_of(token_sha256)
            self._refuse(Refusal.of(error))
            return
        self._pool = self._lease.route.pool.name
        host.admitted(self)
        self._lease.registration.ensure(self._registered)

    def _registered(self, error: BkpoolError | None) -> None:
        if self.state is not State.AUTHENTICATED:
            return
        if error is None:
            self._go()
        else:
            self._refuse(Refusal.of(error))

    # --- held: the worker is awaited or dialled ---------------------------------------------------------------------

    def _hold(self, data: memoryview) -> None:
        if data:
            self._keep(data)
        else:
            self._client.end.heard_end = True
        if self._client.end.heard_end and self.state is State.WAITING:
            self._close("the client left while it was held")
        self._flush()

    def _keep(self, data: memoryview) -> None:
        self._first += self._client.end.decode(data, self._host.scratch.plain)

    def _go(self) -> None:
        """Dials the worker, or waits for it."""
        if self._lease is None or self._lease.route.endpoint is None:
            self._wait()
            return
        self._enter(State.DIALLING)  # the dial has a deadline of its own
        attempt = self._host.dial(self._host.loop, self._lease.route, self._host.limits.dial, self._dialled)
        if self.state is State.DIALLING:
            self._attempt = attempt

    def _dialled(self, outcome: Leg | OSError | WorkerFailed) -> None:
        self._attempt = None
        if isinstance(outcome, Leg):
            self._join(outcome)
            return
        if isinstance(outcome, WorkerFailed):
            self._distrust(outcome)
        else:
            self._strange_until = None
            self._trouble = f"it could not be reached ({outcome.strerror})"
        self._wait()

    def _distrust(self, why: WorkerFailed) -> None:
        """Another answers at the worker's address. The table may learn of a better one at any moment, or never."""
        if self._strange_until is not None or self._lease is None:
            return
        self._strange_until = self._host.loop.time() + self._host.limits.later_wait
        endpoint = self._lease.route.endpoint
        log.warning("connection.wrong-worker", **self._described(), endpoint=endpoint, reason=why.message)

    def _wait(self) -> None:
        if self._lease is None:
            return
        if self._client.end.heard_end:
            self._close("the client left while it was held")
            return
        limits, now = self._host.limits, self._host.loop.time()
        if self._patience_ends is None:
            self._waits_before, patience = self._lease.patience()
            self._patience_ends = now + patience
        left = min(self._patience_ends, self._strange_until or self._patience_ends) - now
        retry = self._lease.route.endpoint is not None and limits.redial < left
        if retry:
            self._enter(State.WAITING, limits.redial, self._go)
        else:
            self._enter(State.WAITING, max(0.0, left), self._wait_no_longer)

    def _wait_no_longer(self) -> None:
        if self._lease is None:
            return
        route = self._lease.route
        if self._strange_until is not None:
            self._refuse(strange(route.worker))
            return
        self._lease.waited_in_vain(self._waits_before)
        waited = waited_again if self._waits_before else waited_first
        self._refuse(waited(route.worker, route.waiting or self._trouble))

    # --- joined -----------------------------------------------------------------------------------------------------

    def _join(self, worker: Leg) -> None:
        host = self._host
        if self._lease is not None:
            self._lease.reached()
        self._enter(State.RELAYING)
        host.metrics.opened(self._pool)
        relay = Relay(
            host.loop, host.scratch, self._client, worker, half_open=host.limits.half_open, over=self._close
        )
        self._relay = self._successor = relay
        first, self._first = bytes(self._first), bytearray()
        relay.start(first)

    def way_changed(self) -> None:
        """The lease's worker came or went."""
        self._strange_until = None
        if self._attempt is not None:  # nobody may be left at the old address to refuse it
            self._attempt.cancel()
            self._attempt = None
        if self.state in {State.WAITING, State.DIALLING}:
            self._go()

    def lease_ended(self, why: BkpoolError, cut_in: float) -> None:
        """The lease is over: an open connection drains, any other is refused."""
        if self.state is State.RELAYING:
            self._enter(State.DRAINING)
            self._drains_since = self._host.loop.time()
            self._cut_at = self._drains_since + cut_in
            log.info("connection.draining", **self._described(), reason=why.code, seconds=round(cut_in))
            self._drain()
        elif self.state in _HOLDING:
            self._refuse(Refusal.of(why))

    def lease_resumed(self) -> None:
        """The lease was renewed after all."""
        if self.state is State.DRAINING:
            self._enter(State.RELAYING)

    def cut(self, reason: str) -> None:
        """Ends the connection now, whatever it is doing."""
        if self._successor is not None:
            self._successor.stop(reason)
        else:
            self._close(reason)

    def _drain(self) -> None:
        """Cuts the connection at its end or after too long a silence, and otherwise looks again then."""
        if self._relay is None:
            return
        now = self._host.loop.time()
        silent_at = max(self._relay.active_at, self._drains_since) + self._host.limits.idle_in_drain
        if now >= self._cut_at:
            self.cut("its lease has ended, and so has the time to drain")
        elif now >= silent_at:
            self.cut("its lease has ended, and it was silent")
        else:
            self._enter(State.DRAINING, min(self._cut_at, silent_at) - now, self._drain)

    # --- refused ----------------------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        """Tells the client why, in HTTP/2."""
        self._part(refusal.status, Answer(refusal))

    def _fail(self, error: ssl.SSLError) -> None:
        """TLS itself failed: the client gets its alert."""
        log.debug("connection.tls-failed", **self._described(), reason=error.reason)
        self._part("TlsFailed", None)

    def _part(self, status: str, answer: Answer | None) -> None:
        host = self._host
        log.info("connection.refused", **self._described(), reason=status)
        host.metrics.refused(self._pool, status)
        self._enter(State.REFUSED)
        self._leave()
        host.refused(self)
        self._successor = farewell = Farewell(host.loop, host.scratch, self._client, host.limits, self._close)
        first, self._first = bytes(self._first), bytearray()
        farewell.start(answer, first)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _enter(self, state: State, seconds: float | None = None, then: Callable[[], None] | None = None) -> None:
        """Changes the state; its deadline replaces the former one."""
        if self._deadline is not None:
            self._deadline.cancel()
        self.state = state
        self._deadline = self._host.loop.call_later(seconds, then) if seconds is not None and then else None

    def _leave(self) -> None:
        """Gives up the lease and the dial."""
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None
        if self._lease is not None:
            self._host.leases.leave(self._lease, self)
            self._lease = None

    def _close(self, reason: str) -> None:
        if self.state is State.CLOSED:
            return
        if self._relay is not None:
            seconds = self._host.loop.time() - self._begun_at
            self._host.metrics.closed(self._pool, seconds)
            up, down = self._client.end.heard, self._client.end.said
            log.info(
                "connection.closed", **self._described(), reason=reason, up=up, down=down, seconds=round(seconds)
            )
        else:
            log.debug("connection.closed", **self._described(), reason=reason)
        self._enter(State.CLOSED)
        self._client.close()
        self._leave()
        self._host.closed(self)

    def _described(self) -> dict[str, Any]:
        """What the log says of it; nothing of it is secret."""
        described = {"peer": self._peer, "pool": self._pool}
        if self._lease is not None:
            described |= {"worker": str(self._lease.route.worker), "allocation": self._lease.route.allocation_id}
        return described
