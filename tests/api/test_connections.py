"""Clients that connect to the API and ask for nothing: others are served, and they are closed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import pytest
from aiohttp import ClientError, ClientSession, web

from bkpool.api import HttpLimits, listen, open_runner
from bkpool.core.names import Key
from bkpool.gateway.control.server import new_loop
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from support.api import ALLOCATE, Api, running_api
from support.gateway_world import open_descriptors

pytestmark = pytest.mark.slow

HALF = b"POST /api/v1/workers/allocate HTTP/1.1\r\nHost: x\r\n"
BODYLESS = HALF + b"Content-Length: 1000\r\nAuthorization: Bearer x\r\n\r\n"
LONG = 600.0
"""Seconds: longer than each test, so that nothing happens because of a deadline."""


@contextlib.asynccontextmanager
async def clients(
    port: int, count: int, sent: bytes, hosts: tuple[str, ...] = ("127.0.0.1",)
) -> AsyncIterator[list[socket.socket]]:
    """Opens this many connections, in turn from these addresses, and sends these bytes on each."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        opened = []
        for number in range(count):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.bind((hosts[number % len(hosts)], 0))
            await loop.sock_connect(one, ("127.0.0.1", port))
            with contextlib.suppress(ConnectionError):  # closed already to make room
                await loop.sock_sendall(one, sent)
            opened.append(one)
        yield opened


async def closed(many: list[socket.socket], count: int) -> None:
    """Waits until at least this many of the connections are closed by the server, and they are the first ones."""
    async with asyncio.timeout(60):
        for sock in many[:count]:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""


@pytest.mark.parametrize("sent", [b"", HALF, BODYLESS], ids=["nothing", "half a header", "no body"])
async def test_an_admin_is_answered_beside_1100_clients_that_do_not_finish_their_request(tmp_path, sent):
    http = HttpLimits(connections=64, connections_per_address=48, header_timeout=LONG)
    async with running_api(tmp_path, http=http) as api:
        await api.world.pool()
        async with (
            clients(api.port, 550, sent) as first,
            clients(api.port, 550, sent, ("127.0.0.2", "127.0.0.3")) as more,
        ):
            async with asyncio.timeout(60):
                status, lease, _ = await api("POST", ALLOCATE, {"poolName": "p"})
            assert status == 200, lease
            await closed(first, 500)
            await closed(more, 480)


async def test_one_address_cannot_close_the_connections_of_another(tmp_path):
    http = HttpLimits(connections=64, connections_per_address=16, header_timeout=LONG)
    async with (
        running_api(tmp_path, http=http) as api,
        clients(api.port, 16, HALF, ("127.0.0.2",)) as others,
        clients(api.port, 200, HALF) as many,
    ):
        await closed(many, 184)
        for sock in others:
            await asyncio.get_running_loop().sock_sendall(sock, b"\r\n")
            async with asyncio.timeout(60):
                answer = await asyncio.get_running_loop().sock_recv(sock, 100)
            assert answer.startswith(b"HTTP/1.1 4")


async def test_nothing_is_left_of_connections_that_were_closed_to_make_room(tmp_path):
    """Also of those that send more than is read, and of those that are closed before their transport is made."""
    http = HttpLimits(connections=20, connections_per_address=8, header_timeout=LONG)
    async with running_api(tmp_path, http=http) as api:
        assert (await api("GET", "/health"))[0] == 200
        descriptors = open_descriptors()
        unread = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 100_000
        async with clients(api.port, 40, unread):
            await api.world.until(lambda: open_descriptors() <= descriptors + 40 + 8)
        with contextlib.ExitStack() as stack:
            for number in range(200):
                one = stack.enter_context(socket.socket())
                one.bind((f"127.0.0.{number % 4 + 1}", 0))
                one.connect(("127.0.0.1", api.port))
            assert (await api("GET", "/health"))[0] == 200
        await api.world.until(lambda: open_descriptors() <= descriptors)


async def test_a_caller_who_waits_for_a_worker_is_not_closed_to_make_room(tmp_path):
    http = HttpLimits(connections=16, connections_per_address=16, header_timeout=LONG)
    async with running_api(tmp_path, http=http) as api:
        await api.world.pool(scaling={"max": 1})
        lease = (await api("POST", ALLOCATE, {"poolName": "p"}))[1]
        waiting = asyncio.create_task(api("POST", ALLOCATE, {"poolName": "p", "wait": "60s"}))
        await api.world.until(lambda: api.world.replicas[0].allocator.waiting(Key("default", "p")) == 1)
        async with clients(api.port, 100, HALF) as many:
            await closed(many, 80)
            assert not waiting.done()
            assert (await api("POST", "/api/v1/workers/release", {"token": lease["token"]}))[0] == 200
            async with asyncio.timeout(60):
                assert (await waiting)[0] == 200


async def answered(api: Api) -> bool:
    with contextlib.suppress(ClientError):
        return (await api("GET", "/health"))[0] == 200
    return False


@pytest.mark.parametrize("sent", [b"", HALF], ids=["nothing", "half a header"])
async def test_a_first_header_that_does_not_come_in_time_ends_the_connection(tmp_path, sent):
    async with running_api(tmp_path, http=HttpLimits(header_timeout=0.2)) as api:
        begin = time.monotonic()
        async with clients(api.port, 3, sent) as many:
            await closed(many, 3)
        assert time.monotonic() - begin >= 0.2
        async with asyncio.timeout(60):
            while not await answered(api):  # a busy machine may need more than 0.2 s for a header, too
                pass


async def test_an_idle_connection_ends_and_a_header_in_bytes_gets_no_more_time(tmp_path):
    asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    async with running_api(tmp_path, http=HttpLimits(idle_timeout=0.2)) as api, clients(api.port, 1, asked) as (one,):
        answer = await asyncio.get_running_loop().sock_recv(one, 1000)
        assert answer.startswith(b"HTTP/1.1 200")
        one.send(b"GET")
        await closed([one], 1)


async def test_a_request_that_takes_long_is_not_cut_by_any_of_these_times(tmp_path):
    http = HttpLimits(header_timeout=0.5, idle_timeout=0.1)
    async with running_api(tmp_path, http=http) as api:
        await api.world.pool(scaling={"max": 1})
        await api.world.replicas[0].allocate()
        status, reply, _ = await api("POST", ALLOCATE, {"poolName": "p", "wait": "1s"})
        assert (status, reply["error"]["code"]) == (503, "NoCapacity")


# --- with TLS, and on the loop of the appliance ---------------------------------------------------------------------


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, new_loop], ids=["asyncio", "as the appliance"])
def test_clients_that_do_not_finish_the_tls_handshake_are_closed_too(make_loop):
    authority, now = Authority.create(datetime.now(UTC)), datetime.now(UTC)
    leaf = authority.issue_server(["localhost"], [IPv4Address("127.0.0.1")], now, now + timedelta(hours=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_chain(context, leaf.cert_pem, leaf.key_pem or b"")
    client = ssl.create_default_context(cadata=authority.cert_pem.decode())

    async def attack() -> None:
        async def answer(_request: web.Request) -> web.Response:
            return web.json_response({})

        app = web.Application()
        app.router.add_get("/", answer)
        limits = HttpLimits(connections=32, connections_per_address=24, header_timeout=LONG)
        async with AsyncExitStack() as stack, ClientSession() as session:
            runner = await open_runner(stack, app, shutdown_timeout=1, limits=limits)
            _, port = await listen(runner, "127.0.0.1", 0, context)
            hosts = ("127.0.0.1", "127.0.0.2")
            async with clients(port, 100, b"", hosts) as silent, clients(port, 100, b"\x16\x03\x01", hosts) as half:
                async with asyncio.timeout(60), session.get(f"https://localhost:{port}/", ssl=client) as got:
                    assert got.status == 200
                await closed(silent, 100)
                await closed(half, 60)
            brief = await open_runner(stack, app, shutdown_timeout=1, limits=HttpLimits(header_timeout=0.2))
            _, port = await listen(brief, "127.0.0.1", 0, context)
            async with clients(port, 3, b"\x16\x03\x01") as half:
                await closed(half, 3)
            async with clients(port, 3, b"") as left:
                await runner.cleanup()
                await brief.cleanup()
                await closed(left, 3)

    with asyncio.Runner(loop_factory=make_loop) as loop:
        loop.run(attack())
