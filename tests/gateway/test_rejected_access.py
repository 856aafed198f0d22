"""Access that is refused: the name of another pool, a certificate for another purpose, an earlier TLS session."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.cli.client import Client
from bkpool.core.errors import Unavailable
from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.net.tls_context import ignore_invalid_server_names
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=3650)


# --- server names of pools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q.team.svc", "q.team.svc.cluster.local", "Q.TEAM.Svc", "q.team.svc."])
async def test_the_server_name_of_another_pool_is_refused_with_a_sentence(world, name):
    code, sentence = await (await world.connect(world.lease(), name=name)).call()
    assert code == 7
    assert sentence.startswith(f"the name {name} is that of pool team/q, ")
    assert "but the client certificate is for a lease of pool default/p." in sentence
    assert world.metric("refusals_total", pool="p", reason="WrongPool") == 1
    assert world.worker_connections == 0
    assert world.registry.calls == []


@pytest.mark.parametrize(
    "name",
    [
        *("p.default.svc", "p.default.svc.cluster.local", "localhost", "127.0.0.1", "::1", "build.example.com"),
        *("q", "q.team", "q.team.svc.example.com", "gateway.infra.svc", "x.q.team.svc", "_q.team.svc"),
    ],
)
async def test_every_other_server_name_leads_to_the_pool_of_the_lease(world, name):
    await (await world.connect(world.lease(), name=name)).echo(b"x")


async def test_the_server_name_of_a_new_pool_is_recognized(world):
    world.pools.discard(Key("team", "q"))
    await (await world.connect(world.lease(), name="q.team.svc")).echo(b"x")
    world.pools.add(Key("team", "q"))
    assert (await (await world.connect(world.lease(), name="q.team.svc")).call())[0] == 7


async def test_the_wrong_pool_is_reported_before_the_end_of_the_lease(world):
    world.lease()
    world.end_lease("a", EndReason.RELEASED)
    assert (await (await world.connect(world.token("a"), name="q.team.svc")).call())[0] == 7


@pytest.mark.parametrize("name", [b"\xff\xfe\xfd", b"q\0t", b"\r\n\t", b"%s;", b"..."])
async def test_an_invalid_server_name_does_not_affect_others(world, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", ignore_invalid_server_names)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = world.ca.client_context().wrap_bio(incoming, outgoing, server_hostname="n" * len(name))
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read().replace(b"n" * len(name), name)
    assert name in hello
    with closing(await asyncio.to_thread(socket.create_connection, ("127.0.0.1", world.port))) as sock:
        sock.setblocking(False)
        sock.send(hello)
        assert await asyncio.get_running_loop().sock_recv(sock, 1)  # an alert, or the server's part of the handshake
    await (await world.connect(world.lease())).echo(b"x")
    assert capsys.readouterr().err == ""


# --- certificates for other purposes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clients():
    return Authority.create(NOW)


@pytest.fixture(scope="module")
def backend():
    return Authority.create(NOW)


@pytest.mark.parametrize(
    ("make", "alert"),
    [
        (lambda clients, backend: backend.issue_worker("uid", NOW), r"(?i)unknown.ca"),
        (lambda clients, backend: backend.issue_dialler("default/p", NOW, LATER), r"(?i)unknown.ca"),
        (lambda clients, backend: backend.issue_client("T" * 43, NOW, LATER), r"(?i)unknown.ca"),
        (lambda clients, backend: clients.issue_server(["p.default.svc"], [], NOW, LATER), r"(?i)unsupported.cert"),
        (lambda clients, backend: clients.issue_worker("uid", NOW), r"(?i)unsupported.cert"),
    ],
    ids=["a worker", "a dialler", "a token signed by the backend's CA", "the gateway's own", "a worker of our CA"],
)
async def test_certificates_for_other_purposes_are_not_accepted_from_clients(world, clients, backend, make, alert):
    gateway = world.ca.server()
    world.gateway.set_server_certificate(gateway.cert, gateway.key, clients.cert_pem)
    world.lease()
    leaf = make(clients, backend)
    streams = await world.connect(certificate=world.ca.stored(leaf.cert_pem, leaf.key_pem))
    with pytest.raises(ssl.SSLError, match=alert):
        await streams.reader.read()
    assert world.worker_connections == 0


@pytest.mark.parametrize("name", ["default/p", f"alloc:{'T' * 43}"])
async def test_a_diallers_certificate_of_the_clients_ca_is_not_that_of_a_lease(world, clients, name):
    gateway = world.ca.server()
    world.gateway.set_server_certificate(gateway.cert, gateway.key, clients.cert_pem)
    leaf = clients.issue_dialler(name, NOW, LATER)
    code, sentence = await (await world.connect(certificate=world.ca.stored(leaf.cert_pem, leaf.key_pem))).call()
    assert code == 16
    assert "its subject contains no lease token" in sentence


def test_the_cli_does_not_accept_a_leases_certificate_as_that_of_an_api(tmp_path, monkeypatch):
    """Its CA is one that a user of the API over TLS may trust."""
    now = datetime.now(UTC)
    authority = Authority.create(now)
    leaf = authority.issue_client("T" * 43, now, now + timedelta(hours=1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_chain(context, leaf.cert_pem, leaf.key_pem)
    (tmp_path / "ca.crt").write_bytes(authority.cert_pem)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:

        def serve():
            listener.settimeout(60)  # or the test would hang where nobody connects
            sock, _ = listener.accept()
            sock.settimeout(60)
            with closing(sock), pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(sock, server_side=True).close()

        served = pool.submit(serve)
        monkeypatch.setenv("BKPOOL_HOME", str(tmp_path))
        monkeypatch.setenv("BKCTL_TLS_CA_CERT", str(tmp_path / "ca.crt"))
        monkeypatch.setenv("BKCTL_ENDPOINT", f"https://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("BKCTL_TOKEN", "a-token")
        with pytest.raises(
            Unavailable, match=r"no TLS connection to .*: (unsuitable|unsupported) certificate purpose"
        ):
            Client().pools()
        served.result()


# --- earlier TLS sessions -------------------------------------------------------------------------------------------


def connect_with_session(world, context, session=None):
    """Returns a client's TLS connection after the first byte of the worker or of a refusal."""
    sock = socket.create_connection(("127.0.0.1", world.port), timeout=60)
    tls = context.wrap_socket(sock, server_hostname="localhost", session=session)
    tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert tls.recv(1)
    return tls


async def test_a_tls_session_is_not_resumed_after_the_release(world):
    context = world.ca.client_context(world.certificate(world.lease()))
    with await asyncio.to_thread(connect_with_session, world, context) as first:
        session = first.session
    world.end_lease("a", EndReason.RELEASED)
    with await asyncio.to_thread(connect_with_session, world, context, session) as second:
        assert not second.session_reused
    await world.wait_until(lambda: world.metric("refusals_total", reason="LeaseReleased") == 1)
    assert world.worker_connections == 1


async def s_client(port, *options, session=None):
    """Returns what openssl's client prints about its handshake. With `session` it waits for a ticket in that file."""
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-tls1_3"]
    async with _running(*command, *options) as client, asyncio.timeout(60):
        output = [await client.stdout.readline()]
        while b"Early data was" not in output[-1]:
            assert output[-1], b"".join(output)
            output.append(await client.stdout.readline())
        while session and not await asyncio.to_thread(_is_complete, session):
            pass
    return b"".join(output).decode(errors="replace")


def _is_complete(session):
    return session.exists() and session.read_bytes().endswith(b"END SSL SESSION PARAMETERS-----\n")


@asynccontextmanager
async def _running(*command):
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def test_early_data_and_the_session_of_another_server_are_not_accepted(world, tmp_path):
    """Another server with the same certificate issues tickets and accepts 0-RTT, so the client has both to offer."""
    identity = world.ca.server()
    session, early = tmp_path / "session", tmp_path / "early"
    early.write_bytes(b"EARLY")
    server = ["-cert", identity.files[0], "-key", identity.files[1], "-early_data", "-num_tickets", "1"]
    server.append("-no_anti_replay")  # otherwise the ticket is forgotten when the client disconnects
    offer = ["-sess_in", session, "-early_data", early]
    async with _running("openssl", "s_server", "-accept", "127.0.0.1:0", *server) as other_server:
        port = await _port_of(other_server)
        await s_client(port, "-sess_out", session, session=session)
        assert "Early data was accepted" in await s_client(port, *offer)
    lease = world.certificate(world.lease())
    output = await s_client(world.port, *offer, "-cert", lease.files[0], "-key", lease.files[1])
    assert "Early data was rejected" in output
    assert "New, TLSv1.3" in output
    assert "Reused" not in output
    await world.wait_until(lambda: world.metric("connections_total", status="success") == 1)
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    assert world.metric("bytes_total", direction="up") == 0, "the worker must not get early data"


async def _port_of(s_server):
    """Waits until openssl's server listens, and returns the port that it has chosen."""
    output = []
    async with asyncio.timeout(60):
        async for line in s_server.stdout:
            if line.startswith(b"ACCEPT "):
                return int(line.rpartition(b":")[2])
            output.append(line)
    raise AssertionError(b"".join(output))
