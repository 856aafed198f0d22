"""The real buildkitd with the CA of workers: which clients it accepts, and a build with TLS on both sides of the
gateway."""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.buildkit import TlsSessions, WorkerTls, ask_over_tls
from bkpool.core import tokens
from bkpool.core.errors import Unavailable
from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.net.dial import TlsDialler
from bkpool.gateway.session.lease_table import LeaseRoute, TableChange, WorkerLeases
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.pki import bundle
from bkpool.pki.names import gateway_names
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.worker_tls import check_worker, worker_context
from harness import eventually, free_port, only_on
from support.accepting_registry import AcceptingRegistry

pytestmark = [
    only_on("process", "it runs buildkitd without a pod"),
    pytest.mark.skipif(os.geteuid() != 0, reason="buildkitd alone needs root"),
]
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
UID = "0b8ce2d5-0000-4000-8000-000000000001"
POOL = Key("default", "p")
TOKEN = tokens.derive(b"k" * 32, UID, "lease")
get = TlsSessions.get
SECRETS = bundle.ClusterSecrets.create(NOW)
POOLS = PoolAuthorities(SECRETS.backend)
BACKEND = POOLS.current(POOL)


@pytest.fixture(scope="module")
def port(tools, tmp_path_factory):
    """The port of a buildkitd that has a worker's certificate."""
    directory, port = tmp_path_factory.mktemp("buildkitd"), free_port()
    worker = BACKEND.issue_worker(UID, NOW)
    (directory / "ca.crt").write_bytes(BACKEND.cert_pem)
    (directory / "tls.crt").write_bytes(worker.cert_pem)
    (directory / "tls.key").write_bytes(worker.key_pem)
    command = [tools["buildkitd"], "--root", directory / "root", "--addr", f"tcp://127.0.0.1:{port}"]
    command += [f"--tls{file}={directory}/{name}" for file, name in (("cacert", "ca.crt"), ("cert", "tls.crt"))]
    command += [f"--tlskey={directory}/tls.key", f"--oci-worker-binary={tools['runc']}", "--containerd-worker=false"]
    with (directory / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            eventually(
                lambda: f"running server on 127.0.0.1:{port}" in (directory / "log").read_text(), "buildkitd runs"
            )
            yield port
        finally:
            process.kill()


def settings(leaf):
    return worker_context(leaf.cert_pem, leaf.key_pem, BACKEND.cert_pem)


async def first_words(port, context):
    """Returns the first bytes from buildkitd: HTTP/2 SETTINGS, or a TLS error."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="pod")
    try:
        check_worker(writer.get_extra_info("ssl_object").getpeercert(binary_form=True), UID)
        return await reader.readexactly(9)
    finally:
        writer.transport.abort()


async def test_a_dialler_is_accepted(port):
    settings_frame = await first_words(port, settings(BACKEND.issue_dialler("default/p", NOW, NOW + DAY)))
    assert settings_frame[3:5] == b"\x04\x00"


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (SECRETS.authority.issue_client(TOKEN, NOW, NOW + DAY), "unknown.ca"),
        (SECRETS.authority.issue_dialler("default/p", NOW, NOW + DAY), "unknown.ca"),
        (SECRETS.authority.issue_server(["localhost"], [], NOW, NOW + DAY), "unknown.ca"),
        (POOLS.current(Key("other", "p")).issue_dialler("other/p", NOW, NOW + DAY), "unknown.ca"),
        (SECRETS.backend.issue_dialler("default/p", NOW, NOW + DAY), "unknown.ca"),
        (BACKEND.issue_worker("another", NOW), "bad.certificate"),
        (BACKEND.issue_worker(UID, NOW), "bad.certificate"),
    ],
    ids=[
        "a lease",
        "a dialler of the clients' CA",
        "a gateway's server",
        "another pool's gateway",
        "the CA of all pools",
        "another worker",
        "the worker itself",
    ],
)
async def test_clients_and_workers_are_rejected(port, leaf, says):
    with pytest.raises(ssl.SSLError, match=f"(?i){says}"):
        await first_words(port, settings(leaf))


async def test_a_dialler_that_was_accepted_needs_a_short_handshake_only(port, monkeypatch):
    resumed = []
    monkeypatch.setattr(
        "bkpool.buildkit.tls_client.TlsSessions.get",
        lambda *asked: resumed.append(found := get(*asked)) or found,
    )
    sessions = TlsSessions()
    worker = WorkerTls(settings(BACKEND.issue_dialler("default/p", NOW, NOW + DAY)), UID)
    for _ in range(3):
        await ask_over_tls("the worker", "127.0.0.1", port, worker, sessions)
    assert [one is not None for one in resumed] == [False, True, True]
    assert len({id(one) for one in resumed[1:]}) == 1, "buildkitd has taken the session: else it were another one"


@pytest.mark.parametrize("leaf", [POOLS.current(Key("other", "p")).issue_dialler("other/p", NOW, NOW + DAY)])
async def test_a_session_opens_nothing_for_another_dialler(port, leaf):
    sessions = TlsSessions()
    await ask_over_tls(
        "the worker",
        "127.0.0.1",
        port,
        WorkerTls(settings(BACKEND.issue_dialler("default/p", NOW, NOW + DAY)), UID),
        sessions,
    )
    with pytest.raises(Unavailable, match=r"(?i)unknown.ca"):
        await ask_over_tls("the worker", "127.0.0.1", port, WorkerTls(settings(leaf), UID), sessions)


async def test_a_build_passes_through_the_gateway_with_tls_on_both_sides(port, tools, tmp_path):
    given = bundle.gateway_server(SECRETS.authority, gateway_names("", [POOL]), NOW)
    given |= bundle.gateway_diallers(BACKEND, None, str(POOL), NOW)
    context = worker_context(given["dialler.crt"], given["dialler.key"], given["worker-ca.crt"])
    dial = TlsDialler(lambda _pool: [context])
    gateway = Gateway(
        AcceptingRegistry(), now=lambda: datetime.now(UTC), metrics=GatewayMetrics(), dial=dial, pool=POOL
    )
    gateway.set_server_certificate(given["tls.crt"], given["tls.key"], given["ca.crt"])
    [(_, entrance)] = await gateway.start([("127.0.0.1", 0)])
    route = LeaseRoute(
        token_sha256=tokens.digest(TOKEN),
        lease_id="lease",
        worker=Key("default", "p-worker-0"),
        worker_uid=UID,
        pool=POOL,
        endpoint=f"tcp://127.0.0.1:{port}",
        wait_reason="",
        expires_at=(NOW + DAY).timestamp(),
        not_after=(NOW + DAY).timestamp(),
        drain_timeout=60.0,
    )
    gateway.update(TableChange({route.worker: WorkerLeases(route)}, frozenset({POOL})))
    lease = SECRETS.authority.issue_client(TOKEN, NOW, NOW + DAY)
    for name, data in (("ca.crt", given["ca.crt"]), ("c.crt", lease.cert_pem), ("c.key", lease.key_pem)):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "context").mkdir()
    (tmp_path / "context/Dockerfile").write_text("FROM scratch\nCOPY data /data\n")
    (tmp_path / "context/data").write_bytes(os.urandom(5_000_000))
    built = await asyncio.create_subprocess_exec(
        *[tools["buildctl"], "--addr", f"tcp://127.0.0.1:{entrance}", "--tlsservername", "localhost"],
        *["--tlscacert", "ca.crt", "--tlscert", "c.crt", "--tlskey", "c.key", "build", "--frontend", "dockerfile.v0"],
        *["--local", "context=context", "--local", "dockerfile=context", "--output", "type=local,dest=out"],
        cwd=tmp_path,
    )
    try:
        assert await built.wait() == 0
        assert (tmp_path / "out/data").read_bytes() == (tmp_path / "context/data").read_bytes()
    finally:
        await gateway.close()
