"""Streams through a whole gateway that are too large, too many or too long for the fast suite.

The largest has 1 GB in each direction, and 5 GB with BKPOOL_SOAK=1, which `nox -s soak` sets.
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
UNREAD_STREAMS = 16
MEMORY_PER_UNREAD_STREAM = MEGABYTE
"""Bytes: several times what the relay may keep of one stream, and much less than its writer sent."""
WORKER_LOST_WITHIN, CLIENT_LOST_WITHIN = 25.0, 45.0
"""Seconds. The gateway should notice a lost worker after about 15 and a lost client after about 30."""
PAUSE = 8.0
"""Seconds for which a peer does nothing."""


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


async def run_stream_ends(data_path, tmp_path, **task):
    """Runs both ends as processes, and returns the digests of what each sent and received."""
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
    return await asyncio.gather(
        run_stream_end(worker | task, data_path.listener.fileno()), run_stream_end(client | task)
    )


async def run_stream_end(task, *descriptors):
    pipe = asyncio.subprocess.PIPE
    argv = [sys.executable, Path(__file__).with_name("stream_end.py")]
    running = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, pass_fds=descriptors)
    out, _ = await running.communicate(json.dumps(task).encode())
    assert running.returncode == 0
    return json.loads(out)


@pytest.mark.parametrize(
    ("count", "length"),
    [pytest.param(1, (5 if SOAKING else 1) * GIGABYTE, id="one"), pytest.param(64, 2 * MEGABYTE, id="64")],
)
async def test_every_byte_of_large_and_many_streams_in_both_directions_arrives(data_path, tmp_path, count, length):
    worker, client = await run_stream_ends(data_path, tmp_path, count=count, length=length)
    assert client["sent"] == worker["received"]
    assert worker["sent"] == client["received"]
    await data_path.wait_idle()


def resident_memory():
    """Returns the resident memory of this process, which includes the gateway."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_many_fast_writers_that_nobody_reads_need_little_memory_and_lose_nothing(data_path, writer):
    pairs = [await data_path.connected_pair() for _ in range(UNREAD_STREAMS)]
    before = resident_memory()
    fast = [pair[writer == "worker"] for pair in pairs]
    slow = [pair[writer == "client"] for pair in pairs]
    written_by = [await data_path.fill(one) for one in fast]
    grown = resident_memory() - before
    assert sum(one.length for one in written_by) > UNREAD_STREAMS * MEMORY_PER_UNREAD_STREAM, (
        "too little was written to show anything"
    )
    assert grown < UNREAD_STREAMS * MEMORY_PER_UNREAD_STREAM
    for written, reader in zip(written_by, slow, strict=True):
        received, _ = await in_threads((reader.receive, written.length), (written.write_rest,))
        assert written.matches(received)


async def test_hundreds_of_short_connections_are_served_while_the_certificate_changes(new_world):
    world = await new_world(make_loop=new_loop)
    token = world.lease()
    certificates = [world.ca.server() for _ in range(4)]
    seen = set()

    async def connect_and_close():
        for _ in range(20):
            streams = await world.connect(token)
            seen.add(streams.writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            await streams.echo(b"x")
            streams.writer.close()

    clients = [asyncio.create_task(connect_and_close()) for _ in range(10)]
    while not all(task.done() for task in clients):
        for one in certificates:
            world.gateway.set_server_certificate(one.cert, one.key, world.ca.pem)
            await world.settle()
    await asyncio.gather(*clients)
    assert seen >= {one.der for one in certificates}
    assert world.metric("refusals_total") == 0


# --- cut cables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machines():
    if os.geteuid():
        pytest.skip("cutting cables needs network namespaces, which need root")
    made = Machine(), Machine()
    yield made
    for machine in made:
        machine.end()


@pytest.fixture
async def separate_machines(machines, new_world, worker_certificates, tmp_path):
    """The gateway is on one machine, client and worker are on another, each with a separate cable to the gateway."""
    here, there = machines
    client, worker = Cable(here, there, 1), Cable(here, there, 2)
    hosts = Hosts(gateway=client.near, worker=worker.far, call=there.call)
    with inside(here):  # also the gateway's thread and its sockets
        async with running_data_path("tls-uvloop", new_world, worker_certificates, tmp_path, hosts) as data_path:
            yield data_path, client, worker


async def cut(data_path, cable, *, left):
    """Cuts the cable of one side of three streams, and waits until the other side has noticed it on each.

    One stream is silent, the other side sends on the second, and receives on the third.

    Args:
        data_path: The gateway.
        cable: The cable to cut.
        left: The side that stays: 0 for the clients, 1 for the workers.

    Returns:
        The seconds until the side that stays has noticed it on every stream.
    """
    silent, sending, receiving = pairs = [await data_path.connected_pair() for _ in range(3)]
    for pair in pairs:
        pair[left].sock.settimeout(2 * CLIENT_LOST_WITHIN)
    receiving[1 - left].send(bytes(MEGABYTE))
    cable.cut()
    began = time.monotonic()
    sender = asyncio.create_task(asyncio.to_thread(send_until_closed, sending[left]))
    await in_threads(*((read_to_end, pair[left]) for pair in (silent, receiving)))
    await sender
    seconds = time.monotonic() - began
    for pair in pairs:
        pair[left].close()
    await data_path.wait_idle()
    return seconds


async def test_every_client_of_a_worker_whose_cable_is_cut_notices_it_in_time(separate_machines):
    """No packet reports the cut. Silent streams notice it as well as those with data."""
    data_path, _, cable = separate_machines
    assert await cut(data_path, cable, left=0) < WORKER_LOST_WITHIN


async def test_a_client_whose_cable_is_cut_frees_its_slots_and_its_worker_in_time(separate_machines):
    data_path, cable, _ = separate_machines
    assert await cut(data_path, cable, left=1) < CLIENT_LOST_WITHIN


@pytest.mark.parametrize("data_path", ["tls-uvloop"], indirect=True)
@pytest.mark.parametrize("paused_side", ["client", "worker"])
async def test_a_peer_that_pauses_during_a_transfer_loses_no_byte(data_path, paused_side):
    """A busy disk can pause a peer. Its kernel still answers the probes, so it is not lost."""
    client, worker = await data_path.connected_pair()
    paused, other = (client, worker) if paused_side == "client" else (worker, client)
    written = await data_path.fill(other)
    await asyncio.to_thread(select.select, [], [], [], PAUSE)
    received, _ = await in_threads((paused.receive, written.length), (written.write_rest,))
    assert written.matches(received)
