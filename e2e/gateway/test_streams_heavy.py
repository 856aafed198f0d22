"""Streams through a whole gateway that are too large, too many or too long for the fast suite.

The largest has 1 GB each way, and 5 GB with BKPOOL_SOAK=1, which `nox -s soak` sets.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
import time
from pathlib import Path

import pytest
from gateway.cables import Cable, Machine, inside

from bkpool.gateway.control.server import new_loop
from support.certificates import CertificateFactory
from support.data_path import FEWEST_DATA_PATHS, Hosts, WorkerCertificates, running_data_path
from support.gateway_world import gateway_worlds
from support.loops import open_libuv_pipe
from support.peers import in_threads, read_to_end, send_until_closed

MEGABYTE, GIGABYTE = 2**20, 10**9
SOAKING = bool(os.environ.get("BKPOOL_SOAK"))
STUCK = 16
PER_STUCK_STREAM = MEGABYTE  # several times what the relay may keep of one, far less than what its writer sent
WORKER_GONE, CLIENT_GONE = 25.0, 45.0
"""Seconds: the gateway means to know of a vanished worker in about 15 and of a vanished client in about 30."""
HICCUP = 8.0  # seconds


@pytest.fixture(scope="module")
def _libuv():
    open_libuv_pipe()


@pytest.fixture
async def new_world(_libuv, tmp_path):
    async with gateway_worlds(CertificateFactory(tmp_path), tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def worker_certificates():
    return WorkerCertificates()


@pytest.fixture(params=FEWEST_DATA_PATHS)
async def data_path(request, new_world, worker_certificates, tmp_path):
    async with running_data_path(request.param, new_world, worker_certificates, tmp_path) as data_path:
        yield data_path


# --- large and many -------------------------------------------------------------------------------------------------


async def pump(data_path, tmp_path, **task):
    """Both ends as processes; returns what each of them sent and heard."""
    cert, key = data_path.world.certificate(data_path.world.lease(endpoint=data_path.endpoint)).files
    client = {"connect": ("127.0.0.1", data_path.world.port)}
    client["tls"] = {"cert": cert, "key": key, "ca": str(data_path.world.ca.file)}
    worker = {"listener": data_path.listener.fileno()}
    if data_path.worker_certificates:
        leaf = data_path.worker_certificates.authority.issue_worker("uid", data_path.world.now())
        worker["tls"] = {"cert": str(tmp_path / "cert"), "key": str(tmp_path / "key")}
        (tmp_path / "cert").write_bytes(leaf.cert_pem)
        (tmp_path / "key").write_bytes(leaf.key_pem)
    data_path.listener.setblocking(True)
    return await asyncio.gather(process(worker | task, data_path.listener.fileno()), process(client | task))


async def process(task, *descriptors):
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, Path(__file__).with_name("pump.py")]
    running = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, pass_fds=descriptors)
    out, _ = await running.communicate(json.dumps(task).encode())
    assert running.returncode == 0
    return json.loads(out)


@pytest.mark.parametrize(
    ("count", "length"),
    [pytest.param(1, (5 if SOAKING else 1) * GIGABYTE, id="one"), pytest.param(64, 2 * MEGABYTE, id="64")],
)
async def test_every_byte_of_large_and_of_many_streams_both_ways_at_once_arrives_as_it_was_sent(
    data_path, tmp_path, count, length
):
    worker, client = await pump(data_path, tmp_path, count=count, length=length)
    assert client["sent"] == worker["received"]
    assert worker["sent"] == client["received"]
    await data_path.wait_idle()


def resident():
    """Bytes of this process in memory; those of the gateway are among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_many_fast_writers_that_nobody_reads_cost_little_memory_and_lose_nothing(data_path, writer):
    pairs = [await data_path.connected_pair() for _ in range(STUCK)]
    before = resident()
    fast = [pair[writer == "worker"] for pair in pairs]
    slow = [pair[writer == "client"] for pair in pairs]
    floods = [await data_path.fill(one) for one in fast]
    grown = resident() - before
    assert sum(one.length for one in floods) > STUCK * PER_STUCK_STREAM, "so it was not held anywhere"
    assert grown < STUCK * PER_STUCK_STREAM
    for written, one in zip(floods, slow, strict=True):
        received, _ = await in_threads((one.receive, written.length), (written.write_rest,))
        assert written.matches(received)


async def test_hundreds_of_short_connections_all_get_through_while_the_certificate_changes(new_world):
    world = await new_world(make_loop=new_loop)
    token = world.lease()
    certificates = [world.ca.server() for _ in range(4)]
    seen = set()

    async def come_and_go():
        for _ in range(20):
            streams = await world.connect(token)
            seen.add(streams.writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            await streams.echo(b"x")
            streams.writer.close()

    coming = [asyncio.create_task(come_and_go()) for _ in range(10)]
    while not all(task.done() for task in coming):
        for one in certificates:
            world.gateway.set_server_certificate(one.cert, one.key, world.ca.pem)
            await world.settle()
    await asyncio.gather(*coming)
    assert seen >= {one.der for one in certificates}
    assert world.metric("refusals_total") == 0


# --- cut cables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machines():
    if os.geteuid():
        pytest.skip("cutting cables takes network namespaces, and those take root")
    made = Machine(), Machine()
    yield made
    for machine in made:
        machine.end()


@pytest.fixture
async def laboratory(machines, new_world, worker_certificates, tmp_path):
    """The gateway is in one machine, its client and its worker in another, each of them on a cable of its own."""
    here, there = machines
    client, worker = Cable(here, there, 1), Cable(here, there, 2)
    hosts = Hosts(gateway=client.near, worker=worker.far, call=there.do)
    with inside(here):  # and so are the gateway's thread and its sockets
        async with running_data_path("tls-uvloop", new_world, worker_certificates, tmp_path, hosts) as data_path:
            yield data_path, client, worker


async def cut(data_path, cable, *, left):
    """Three streams (one silent, one being sent to, one being heard), and then one machine is gone.

    Returns after how many seconds those who are left (0 the clients, 1 the workers) knew it of every stream.
    """
    silent, sending, hearing = pairs = [await data_path.connected_pair() for _ in range(3)]
    for pair in pairs:
        pair[left].sock.settimeout(2 * CLIENT_GONE)
    hearing[1 - left].send(bytes(MEGABYTE))
    cable.cut()
    began = time.monotonic()
    flooding = asyncio.create_task(asyncio.to_thread(send_until_closed, sending[left]))
    await in_threads(*((read_to_end, pair[left]) for pair in (silent, hearing)))
    await flooding
    seconds = time.monotonic() - began
    for pair in pairs:
        pair[left].close()
    await data_path.wait_idle()
    return seconds


async def test_a_worker_that_vanishes_without_a_word_is_known_to_every_client_in_seconds(laboratory):
    """A cable is cut: no packet says so. Silent streams learn it as well as those with bytes under way."""
    data_path, _, cable = laboratory
    assert await cut(data_path, cable, left=0) < WORKER_GONE


async def test_a_client_that_vanishes_without_a_word_gives_its_slots_and_its_worker_back_in_seconds(laboratory):
    data_path, cable, _ = laboratory
    assert await cut(data_path, cable, left=1) < CLIENT_GONE


@pytest.mark.parametrize("data_path", ["tls-uvloop"], indirect=True)
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_who_stands_still_for_a_moment_with_bytes_under_way_loses_none(data_path, who):
    """A page fault, a busy disk: it answers the kernel's probes all the while, so it has not vanished."""
    client, worker = await data_path.connected_pair()
    still, other = (client, worker) if who == "client" else (worker, client)
    written = await data_path.fill(other)
    await asyncio.to_thread(select.select, [], [], [], HICCUP)
    received, _ = await in_threads((still.receive, written.length), (written.write_rest,))
    assert written.matches(received)
