"""Callers who hang up while their answer is being made or is on its way: no lease stays that nobody has.

Their sockets are real: TCP, TLS and Unix. Only the clock after which the controller ends a lease is the test's.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from bkpool.api import listen
from bkpool.core.reconcile.undelivered import LONGEST_STEP
from bkpool.core.worker import UNDELIVERED_LIFE
from bkpool.gateway.control.server import new_loop
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from support.api import ADMIN, ALLOCATE, Api, running_api

pytestmark = pytest.mark.slow

NO_LIMITS = {"limits": {"identity": {"leases": 1000, "waiters": 1000}}}
HELD = {"scaling": {"max": 1}}
"""A pool with one worker."""
CLOSE_RESETS = struct.pack("ii", 1, 0)


def request(version: str = "1.1", **body: object) -> bytes:
    content = json.dumps({"poolName": "p", **body})
    lines = [f"POST {ALLOCATE} HTTP/{version}", "Host: x", f"Authorization: Bearer {ADMIN}"]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "", content]).encode()


def read_answer(sock: socket.socket) -> dict[str, Any]:
    """The body of the answer; empty if the connection ends first."""
    got = b""
    while not got.endswith(b"}"):
        part = sock.recv(65_536)
        if not part:
            return {}
        got += part
    head, _, body = got.rpartition(b"\r\n\r\n")
    assert b" 200 OK" in head, got
    answer: dict[str, Any] = json.loads(body)
    return answer


class Callers:
    """Connects to the API in one of three ways. The sockets block, so a test uses them in threads."""

    def __init__(self, api: Api, kind: str, directory: Path) -> None:
        self._api = api
        self.kind = kind
        self._path = str(directory / "api.sock")
        self._tls: ssl.SSLContext | None = None

    async def serve(self) -> None:
        if self.kind == "unix":
            await web.UnixSite(self._api.runner, self._path).start()
        if self.kind == "tls":
            now = datetime.now(UTC)
            authority = Authority.create(now)
            leaf = authority.issue_server([], [IPv4Address("127.0.0.1")], now, now + timedelta(days=1))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            load_chain(context, leaf.cert_pem, leaf.key_pem or b"")
            _, self._api.port = await listen(self._api.runner, "127.0.0.1", 0, context)
            self._tls = ssl.create_default_context(cadata=authority.cert_pem.decode())

    async def send(self, sent: bytes) -> socket.socket:
        """A connection over which this request was sent."""
        sock = await self.connect()
        await asyncio.to_thread(sock.sendall, sent)
        return sock

    async def connect(self) -> socket.socket:
        """A connection."""

        def connect() -> socket.socket:
            if self.kind == "unix":
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(self._path)
            else:
                sock = socket.create_connection((self._api.host, self._api.port))
            sock.settimeout(60)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname="127.0.0.1")
            return sock

        return await asyncio.to_thread(connect)


Scenario = Callable[[Api, Callers], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture(params=[asyncio.new_event_loop, new_loop], ids=["asyncio", "as the appliance"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """Runs a scenario on a loop of asyncio, and on one as the appliance has it."""

    async def main(scenario: Scenario, kind: str, spec: dict[str, Any]) -> None:
        async with running_api(tmp_path) as api:
            api.world.moment = 0.1  # as in production
            await api.world.pool(**spec)
            callers = Callers(api, kind, tmp_path)
            await callers.serve()
            await scenario(api, callers)

    def run(scenario: Scenario, kind: str = "tcp", **spec: Any) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main(scenario, kind, spec))

    return run


kinds = pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])


async def time_passes(api: Api) -> None:
    """The time after which leases end that nobody has. The controller looks at every step."""

    def looks() -> float:
        return api.world.registry.get_sample_value("buildkit_controller_decisions_total") or 0

    for _ in range(UNDELIVERED_LIFE // LONGEST_STEP + 2):
        before = looks()
        api.world.clock.advance(seconds=LONGEST_STEP.total_seconds())
        await api.world.until(lambda before=before: looks() > before)


async def nobody_has_a_lease(api: Api) -> None:
    await api.world.until(lambda: not api.world.held())


def test_400_callers_who_hang_up_at_random_leave_no_lease(run):
    chosen = random.Random(7)

    async def hang_up(api: Api, number: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, (api.host, api.port))
            await loop.sock_sendall(sock, request(jobId=f"job-{number}" if number % 2 else ""))
            await asyncio.sleep(chosen.uniform(0, 0.06))

    async def scenario(api: Api, _callers: Callers) -> None:
        await api.world.until(lambda: len(api.world.replicas[0].mirror.workers) >= 20)
        for turn in range(26):
            await asyncio.gather(*(hang_up(api, 16 * turn + number) for number in range(16)))
        await time_passes(api)
        await nobody_has_a_lease(api)

    run(scenario, scaling={"min": 20, "max": 40}, auth=NO_LIMITS)


@kinds
def test_a_caller_who_closed_before_the_answer_leaves_no_lease(run, kind):
    async def scenario(api: Api, callers: Callers) -> None:
        sock = await callers.connect()
        api.before_answer = sock.close
        await asyncio.to_thread(sock.sendall, request())
        await api.world.until(api.world.held)
        await nobody_has_a_lease(api)

    run(scenario, kind)


@kinds
def test_a_caller_who_reads_their_answer_keeps_the_lease(run, kind):
    async def scenario(api: Api, callers: Callers) -> None:
        with await callers.send(request()) as sock:
            assert (await asyncio.to_thread(read_answer, sock))["token"]
        await api.world.until(lambda: [w.undelivered for w in api.world.held()] == [None])
        await time_passes(api)
        assert [w.held_lease.ended_at for w in api.world.held()] == [None]

    run(scenario, kind)


@kinds
def test_who_resets_the_connection_after_reading_nothing_has_no_lease(run, kind):
    """Over TCP their system had the answer. So it may have been a proxy that passed it on, and the lease waits."""

    async def scenario(api: Api, callers: Callers) -> None:
        api.world.moment = 1
        sock = await callers.send(request())
        await asyncio.to_thread(sock.recv, 1)
        sock.close()  # the rest is unread, so this is a reset
        await time_passes(api)
        await nobody_has_a_lease(api)

    run(scenario, kind)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_caller_who_only_ends_their_own_stream_gets_the_answer(run, kind):
    async def scenario(api: Api, callers: Callers) -> None:
        first = await api.world.replicas[0].allocate()
        sock = await callers.send(request())
        sock.shutdown(socket.SHUT_WR)
        await api.world.until(lambda: api.world.replicas[0].allocator.waiting(first.worker.pool) == 1)
        await api.world.replicas[0].leases.release(first.token)
        answer = await asyncio.to_thread(read_answer, sock)
        assert answer["token"]
        assert await asyncio.to_thread(sock.recv, 1) == b"", "no further request can come"
        sock.close()
        await api.world.until(lambda: [w.undelivered for w in api.world.held()] == [None])

    run(scenario, kind, **HELD)


@kinds
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_caller_who_hangs_up_while_waiting_leaves_the_queue(run, kind, version):
    async def scenario(api: Api, callers: Callers) -> None:
        first = await api.world.replicas[0].allocate()
        sock = await callers.send(request(version))
        waiting = api.world.replicas[0].allocator.waiting
        await api.world.until(lambda: waiting(first.worker.pool) == 1)
        sock.close()
        await api.world.until(lambda: waiting(first.worker.pool) == 0)

    run(scenario, kind, **HELD)


def test_a_connection_that_ends_right_after_its_answer_keeps_no_place(run):
    """Its end may come before the server waits for the next request."""

    async def scenario(api: Api, callers: Callers) -> None:
        def ask_and_close() -> None:
            for sent in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", request()):
                with socket.create_connection((api.host, api.port)) as sock:
                    sock.settimeout(60)
                    sock.sendall(sent)
                    read_answer(sock)

        for _ in range(10):
            await asyncio.gather(*(asyncio.to_thread(ask_and_close) for _ in range(4)))
        async with asyncio.timeout(60):
            while api.runner.server.connections:  # noqa: ASYNC110 - no event announces a connection's end
                await asyncio.sleep(0.01)

    run(scenario, scaling={"max": 200}, **NO_LIMITS)


def test_a_request_that_ends_its_stream_at_once_is_answered(run):
    async def scenario(_api: Api, callers: Callers) -> None:
        sock = await callers.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)

        def read() -> bytes:
            return b"".join(iter(lambda: sock.recv(65_536), b""))

        got = await asyncio.to_thread(read)
        assert got.count(b"HTTP/1.1 200 OK") == 2, got
        sock.close()

    run(scenario)


def test_half_a_request_whose_stream_has_ended_is_not_waited_for(run):
    async def scenario(_api: Api, callers: Callers) -> None:
        sock = await callers.send(request()[:-5])
        sock.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(sock.recv, 65_536) == b""
        sock.close()

    run(scenario)


@pytest.mark.parametrize("event", ["lease.claimed", "audit.decision"])
def test_a_log_line_that_fails_leaves_no_lease_that_nobody_has(run, event):
    def fail(_logger: object, _method: str, line: dict[str, Any]) -> dict[str, Any]:
        if line["event"] == event:
            raise OSError(28, "No space left on device")
        if line["event"] == "api.crashed":
            raise structlog.DropEvent
        return line

    async def scenario(api: Api, callers: Callers) -> None:
        structlog.configure(processors=[fail, *structlog.get_config()["processors"]])
        with await callers.send(request()) as sock:
            got = await asyncio.to_thread(sock.recv, 65_536)
        if b" 200 OK" in got:  # the answer came before the line, so the caller has the lease
            await api.world.until(lambda: [w.undelivered for w in api.world.held()] == [None])
        else:
            assert b" 500 " in got
            await nobody_has_a_lease(api)

    run(scenario)
