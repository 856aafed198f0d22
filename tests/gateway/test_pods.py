"""Workers with TLS: only the worker of the lease gets bytes, and a client waits for a worker that does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl

import pytest

from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.net.dial import TlsDialler
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.worker_tls import worker_context
from support.captured_logs import capture_logs
from support.certificates import NOW, YEAR


@pytest.fixture(scope="module")
def backend():
    return Authority.create(NOW)


@pytest.fixture
def dialler(backend):
    context = dialler_context(backend, "one")
    return TlsDialler(lambda _pool: [context])


@pytest.fixture
async def world(new_world, dialler):
    return await new_world(dial=dialler)


def dialler_context(backend, name):
    leaf = backend.issue_dialler(name, NOW, NOW + 10 * YEAR)
    return worker_context(leaf.cert_pem, leaf.key_pem, backend.cert_pem)


def server_context(leaf, clients):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=clients.cert_pem.decode())
    load_chain(context, leaf.cert_pem, leaf.key_pem)
    return context


def worker_server(backend, uid="uid"):
    return server_context(backend.issue_worker(uid, NOW), backend)


def connection_at_worker(world, number=-1):
    """Returns the TLS connection as the worker sees it."""
    return world.worker_writers[number].get_extra_info("ssl_object")


async def start_server(world, handle):
    world.tls_workers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
    return f"tcp://127.0.0.1:{world.tls_workers[-1].sockets[0].getsockname()[1]}"


async def test_the_worker_of_the_lease_is_reached_over_tls(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(backend))))
    await streams.echo(b"hello")
    await streams.echo(os.urandom(300_000))
    assert connection_at_worker(world).version() == "TLSv1.3"
    assert connection_at_worker(world).selected_alpn_protocol() == "h2"
    assert connection_at_worker(world).getpeercert()["subjectAltName"] == (("URI", "buildkit://gateway/one"),)


async def test_a_worker_of_a_former_ca_is_reached_until_it_ends(new_world, backend):
    newer = Authority.create(NOW)
    contexts = [dialler_context(newer, "one"), dialler_context(backend, "one")]
    world = await new_world(dial=TlsDialler(lambda _pool: contexts))
    for authority in (backend, newer):
        streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(authority))))
        await streams.echo(b"hello")
    del contexts[1]
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(backend))))
    await world.wait_until(lambda: world.holds_client() or world.metric("refusals_total", reason="WrongWorker"))
    streams.writer.close()


async def test_the_gateway_of_one_pool_gets_nothing_from_the_worker_of_another(new_world):
    pools = PoolAuthorities(Authority.create(NOW))
    mine, other = pools.current(Key("default", "p")), pools.current(Key("other", "p"))
    leaf = mine.issue_dialler("p-gateway.default", NOW, NOW + 10 * YEAR)
    # The attacker has the certificate of a gateway, and believes everything that the worker shows.
    stolen = worker_context(leaf.cert_pem, leaf.key_pem, other.cert_pem)
    world = await new_world(dial=TlsDialler(lambda _pool: [stolen]))
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(other))))
    streams.writer.write(b"hello")
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        assert await streams.reader.read(5) != b"hello"
    assert world.worker_writers == []


async def test_the_end_of_the_workers_direction_reaches_the_client(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(backend))))
    await streams.echo(b"x")
    world.worker_writers[0].write(b"goodbye")
    world.worker_writers[0].close()
    assert await streams.read_to_end() == b"goodbye"


@pytest.mark.parametrize("who", ["another worker", "a foreign CA's", "a dialler", "a lease", "the gateway itself"])
async def test_another_server_gets_no_bytes_and_the_client_and_the_log_name_it(world, backend, who):
    other = Authority.create(NOW)
    leaf = {
        "another worker": lambda: backend.issue_worker("uid-2", NOW),
        "a foreign CA's": lambda: other.issue_worker("uid", NOW),
        "a dialler": lambda: backend.issue_dialler("uid", NOW, NOW + 10 * YEAR),
        "a lease": lambda: backend.issue_client("T" * 43, NOW, NOW + 10 * YEAR),
        "the gateway itself": lambda: backend.issue_server(["localhost"], [], NOW, NOW + 10 * YEAR),
    }[who]()
    endpoint = await world.start_tls_worker(server_context(leaf, backend))
    with capture_logs() as logs:
        streams = await world.connect(world.lease(endpoint=endpoint))
        streams.start_call()
        for _ in range(3):  # a newer table may have another endpoint
            await world.wait_until(
                lambda: world.holds_client() or world.metric("refusals_total", reason="WrongWorker")
            )
            await world.advance(1)
        code, sentence = await streams.call_result()
    assert code == 9
    assert "another server than worker default/p-worker-0 answers at the worker's address" in sentence
    assert world.worker_writers == []
    [entry] = [entry for entry in logs if entry["event"] == "connection.wrong_worker"]
    assert (entry["log_level"], entry["worker"], entry["endpoint"]) == ("warning", "default/p-worker-0", endpoint)


async def test_a_client_is_served_at_the_new_address_when_another_server_has_the_old_one(world, backend):
    wrong, right = (
        await world.start_tls_worker(worker_server(backend, "uid-2")),
        await world.start_tls_worker(worker_server(backend)),
    )
    streams = await world.connect(world.lease(endpoint=wrong))
    streams.writer.write(b"hello")
    await world.wait_until(world.holds_client)
    world.lease(endpoint=None)  # the worker is started again at another address
    await world.settle()
    await world.advance(10)
    world.lease(endpoint=right)
    assert await streams.reader.readexactly(5) == b"hello"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"])
async def test_a_server_without_tls_or_that_refuses_the_handshake_is_not_the_worker(world, answer):
    async def reply(reader, writer):
        writer.write(answer)
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    streams = await world.connect(world.lease(endpoint=await start_server(world, reply)))
    streams.start_call()
    await world.wait_until(world.holds_client)
    await world.advance(2)
    await world.wait_until(lambda: world.holds_client() or world.metric("refusals_total", reason="WrongWorker"))
    await world.advance(2)
    code, sentence = await streams.call_result()
    assert code == 9
    assert "another server than worker" in sentence


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_client_waits_for_a_worker_whose_proxy_closes_connections(world, backend, how):
    """Docker's proxy for a host port does that while nothing listens behind it."""
    closed = 0

    async def close(_reader, writer):
        nonlocal closed
        closed += 1
        writer.transport.abort() if how == "reset" else writer.close()

    streams = await world.connect(world.lease(endpoint=await start_server(world, close)))
    streams.writer.write(b"hello")
    for tries in range(1, 4):
        await world.wait_until(lambda tries=tries: closed == tries and world.holds_client())
        await world.advance(0.5)
    world.lease(endpoint=await world.start_tls_worker(worker_server(backend)))
    assert await streams.reader.readexactly(5) == b"hello"


async def test_a_worker_that_accepts_and_sends_nothing_is_given_up_in_time(world):
    silent = []

    async def accept(_reader, writer):
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await start_server(world, accept)))
    streams.start_call()
    for tries in range(1, 5):
        await world.wait_until(lambda tries=tries: len(silent) == tries)
        await world.advance(5)  # for the dial
        await world.advance(0.5)  # for the next one
    code, sentence = await streams.call_result()
    assert code == 14
    assert "it could not be reached (no TLS handshake within 5 s)" in sentence
    for writer in silent:
        writer.transport.abort()


async def test_a_dial_of_an_old_address_is_cancelled_for_the_new_one(world, backend):
    silent = []

    async def accept(_reader, writer):
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await start_server(world, accept)))
    streams.writer.write(b"hello")
    await world.wait_until(lambda: silent != [])
    world.lease(endpoint=await world.start_tls_worker(worker_server(backend)))
    async with asyncio.timeout(60):  # the clock of the gateway stands still, so the first dial does not end by itself
        assert await streams.reader.readexactly(5) == b"hello"
    silent[0].transport.abort()


async def test_a_lease_that_ends_while_its_worker_is_dialled_frees_everything(world):
    silent = []

    async def accept(reader, writer):
        assert (await reader.read(1)) == b"\x16"  # a ClientHello
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await start_server(world, accept)))
    await world.wait_until(lambda: silent != [])
    world.lease(end_reason=EndReason.RELEASED)
    code, _ = await streams.call()
    assert code == 16
    silent[0].transport.abort()


async def test_a_new_certificate_is_used_for_new_dials_and_open_connections_stay(new_world, backend):
    contexts = [dialler_context(backend, "one")]
    world = await new_world(dial=TlsDialler(lambda _pool: contexts))
    token = world.lease(endpoint=await world.start_tls_worker(worker_server(backend)))
    old = await world.connect(token)
    await old.echo(b"x")
    contexts[:] = [dialler_context(backend, "two")]
    new = await world.connect(token)
    await new.echo(b"x")
    assert connection_at_worker(world).getpeercert()["subjectAltName"] == (("URI", "buildkit://gateway/two"),)
    await old.echo(b"x")


async def test_a_worker_that_refuses_our_certificate_ends_the_connection_and_the_log_says_why(world, backend):
    context = server_context(backend.issue_worker("uid", NOW), Authority.create(NOW))

    async def refuse(reader, writer):
        tls = TlsStream(context)
        with contextlib.suppress(ssl.SSLError):
            while not tls.handshake(memoryview(await reader.read(4096))):
                writer.write(tls.take())
        writer.write(tls.take())  # the alert; asyncio's TLS would not send it
        writer.close()

    endpoint = await start_server(world, refuse)
    with capture_logs() as logs:
        streams = await world.connect(world.lease(endpoint=endpoint))
        assert await streams.read_to_end() == b""
        await world.wait_until(lambda: world.metric("active_connections") == 0)
        await world.settle()  # the line follows the change
    [closed] = [entry for entry in logs if entry["event"] == "connection.closed"]
    assert closed["reason"].startswith("worker: TLS failed: TLSV1_ALERT_UNKNOWN_CA")


async def test_a_drained_gateway_also_closes_the_connection_to_the_worker(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(worker_server(backend))))
    await streams.echo(b"x")
    await world.gateway.drain(0)
    assert await streams.read_to_end() == b""
    await world.wait_until(world.worker_writers[0].is_closing)
