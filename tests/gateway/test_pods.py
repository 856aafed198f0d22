"""Workers behind TLS: the lease's own is reached, no other is told a byte, and whoever is not there is awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from bkpool.core.worker import EndReason
from bkpool.gateway.net.dial import TlsDialler
from bkpool.gateway.net.tls_stream import TlsStream
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain
from bkpool.pki.worker_tls import worker_context

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
YEAR = timedelta(days=365)


@pytest.fixture(scope="module")
def backend():
    return Authority.create(NOW)


@pytest.fixture
def dialler(backend):
    return TlsDialler(settings(backend, "one"))


@pytest.fixture
async def world(new_world, dialler):
    return await new_world(dial=dialler)


def settings(backend, name):
    leaf = backend.issue_dialler(name, NOW, NOW + 10 * YEAR)
    return worker_context(leaf.cert_pem, leaf.key_pem, backend.cert_pem)


def serving(leaf, clients):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=clients.cert_pem.decode())
    load_chain(context, leaf.cert_pem, leaf.key_pem)
    return context


def pod(backend, uid="uid"):
    return serving(backend.issue_worker(uid, NOW), backend)


def called(world, number=-1):
    """What a worker sees of who has dialled it."""
    return world.worker_writers[number].get_extra_info("ssl_object")


async def served(world, handle):
    world.tls_workers.append(await asyncio.start_server(handle, "127.0.0.1", 0))
    return f"tcp://127.0.0.1:{world.tls_workers[-1].sockets[0].getsockname()[1]}"


async def test_the_worker_of_the_lease_is_reached_over_tls(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(pod(backend))))
    await streams.echo(b"hello")
    await streams.echo(os.urandom(300_000))
    assert called(world).version() == "TLSv1.3"
    assert called(world).selected_alpn_protocol() == "h2"
    assert called(world).getpeercert()["subjectAltName"] == (("URI", "buildkit://gateway/one"),)


async def test_an_end_of_the_worker_reaches_the_client(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(pod(backend))))
    await streams.echo(b"x")
    world.worker_writers[0].write(b"goodbye")
    world.worker_writers[0].close()
    assert await streams.read_to_end() == b"goodbye"


@pytest.mark.parametrize("who", ["another worker", "a foreign CA's", "a dialler", "a lease", "the gateway itself"])
async def test_a_stranger_is_told_nothing_and_the_client_and_the_log_are_told_of_it(world, backend, who):
    other = Authority.create(NOW)
    leaf = {
        "another worker": lambda: backend.issue_worker("uid-2", NOW),
        "a foreign CA's": lambda: other.issue_worker("uid", NOW),
        "a dialler": lambda: backend.issue_dialler("uid", NOW, NOW + 10 * YEAR),
        "a lease": lambda: backend.issue_client("T" * 43, NOW, NOW + 10 * YEAR),
        "the gateway itself": lambda: backend.issue_server(["localhost"], [], NOW, NOW + 10 * YEAR),
    }[who]()
    endpoint = await world.start_tls_worker(serving(leaf, backend))
    with capture_logs() as logs:
        streams = await world.connect(world.lease(endpoint=endpoint))
        streams.start_call()
        for _ in range(3):  # the table might learn better
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


async def test_a_stranger_at_an_old_address_does_no_harm_once_the_new_one_is_known(world, backend):
    stranger, right = await world.start_tls_worker(pod(backend, "uid-2")), await world.start_tls_worker(pod(backend))
    streams = await world.connect(world.lease(endpoint=stranger))
    streams.writer.write(b"hello")
    await world.wait_until(world.holds_client)
    world.lease(endpoint=None)  # it is seen to be gone, and is started again elsewhere
    await world.settle()
    await world.advance(10)
    world.lease(endpoint=right)
    assert await streams.reader.readexactly(5) == b"hello"


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28"])
async def test_what_is_no_tls_or_refuses_the_handshake_is_a_stranger(world, said):
    async def speak(_reader, writer):
        writer.write(said)
        await writer.drain()
        with contextlib.suppress(ConnectionError):
            await _reader.read()
        writer.close()

    streams = await world.connect(world.lease(endpoint=await served(world, speak)))
    streams.start_call()
    await world.wait_until(world.holds_client)
    await world.advance(2)
    await world.wait_until(lambda: world.holds_client() or world.metric("refusals_total", reason="WrongWorker"))
    await world.advance(2)
    code, sentence = await streams.call_result()
    assert code == 9
    assert "another server than worker" in sentence


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_a_proxy_that_hangs_up_is_a_worker_that_is_not_there_yet(world, backend, how):
    """As docker's for a host port behind which nobody listens yet."""
    hung_up = 0

    async def hang_up(_reader, writer):
        nonlocal hung_up
        hung_up += 1
        writer.transport.abort() if how == "reset" else writer.close()

    streams = await world.connect(world.lease(endpoint=await served(world, hang_up)))
    streams.writer.write(b"hello")
    for tries in range(1, 4):
        await world.wait_until(lambda tries=tries: hung_up == tries and world.holds_client())
        await world.advance(0.5)
    world.lease(endpoint=await world.start_tls_worker(pod(backend)))
    assert await streams.reader.readexactly(5) == b"hello"


async def test_a_worker_that_accepts_and_says_nothing_is_given_up_in_time(world):
    silent = []

    async def accept(_reader, writer):
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await served(world, accept)))
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


async def test_a_dial_of_an_old_address_is_given_up_for_the_new_one(world, backend):
    silent = []

    async def accept(_reader, writer):
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await served(world, accept)))
    streams.writer.write(b"hello")
    await world.wait_until(lambda: silent != [])
    world.lease(endpoint=await world.start_tls_worker(pod(backend)))
    async with asyncio.timeout(2):  # of the 5 s that a dial may take
        assert await streams.reader.readexactly(5) == b"hello"
    silent[0].transport.abort()


async def test_a_lease_that_ends_while_its_worker_is_dialled_leaves_nothing_behind(world):
    silent = []

    async def accept(reader, writer):
        assert (await reader.read(1)) == b"\x16"  # a ClientHello
        silent.append(writer)

    streams = await world.connect(world.lease(endpoint=await served(world, accept)))
    await world.wait_until(lambda: silent != [])
    world.lease(end_reason=EndReason.RELEASED)
    code, _ = await streams.call()
    assert code == 16
    silent[0].transport.abort()


async def test_a_new_certificate_is_used_for_new_dials_while_old_ones_go_on(world, backend, dialler):
    token = world.lease(endpoint=await world.start_tls_worker(pod(backend)))
    old = await world.connect(token)
    await old.echo(b"x")
    dialler.swap(settings(backend, "two"))
    new = await world.connect(token)
    await new.echo(b"x")
    assert called(world).getpeercert()["subjectAltName"] == (("URI", "buildkit://gateway/two"),)
    await old.echo(b"x")


async def test_a_worker_that_does_not_take_our_certificate_ends_the_connection_and_the_log_says_why(world, backend):
    context = serving(backend.issue_worker("uid", NOW), Authority.create(NOW))

    async def refuse(reader, writer):
        tls = TlsStream(context)
        with contextlib.suppress(ssl.SSLError):
            while not tls.handshake(memoryview(await reader.read(4096))):
                writer.write(tls.take())
        writer.write(tls.take())  # the alert, which asyncio's own TLS would not send
        writer.close()

    endpoint = await served(world, refuse)
    with capture_logs() as logs:
        streams = await world.connect(world.lease(endpoint=endpoint))
        assert await streams.read_to_end() == b""
        await world.wait_until(lambda: world.metric("active_connections") == 0)
    [closed] = [entry for entry in logs if entry["event"] == "connection.closed"]
    assert closed["reason"].startswith("worker: TLS failed: TLSV1_ALERT_UNKNOWN_CA")


async def test_a_drained_gateway_says_goodbye_to_the_worker_too(world, backend):
    streams = await world.connect(world.lease(endpoint=await world.start_tls_worker(pod(backend))))
    await streams.echo(b"x")
    await world.gateway.drain(0)
    assert await streams.read_to_end() == b""
    await world.wait_until(world.worker_writers[0].is_closing)
