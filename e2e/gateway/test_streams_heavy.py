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

import tests.gateway.conftest
from bkpool.gateway.control.server import Gateway, new_loop
from support.ways import BOTH, Backend, Where, drink, flood, in_threads, running_way
from tests.gateway.conftest import _libuv, ca, new_world  # noqa: F401 - fixtures

MEGABYTE, GIGABYTE = 2**20, 10**9
SOAKING = bool(os.environ.get("BKPOOL_SOAK"))
STUCK = 16
PER_STUCK_STREAM = MEGABYTE  # several times what the relay may keep of one, far less than what its writer sent
WORKER_GONE, CLIENT_GONE = 25.0, 45.0
"""Seconds: the gateway means to know of a vanished worker in about 15 and of a vanished client in about 30."""
HICCUP = 8.0  # seconds


@pytest.fixture(scope="module")
def backend():
    return Backend()


@pytest.fixture(params=BOTH)
async def way(request, new_world, backend, tmp_path):  # noqa: F811
    async with running_way(request.param, new_world, backend, tmp_path) as way:
        yield way


# --- large and many -------------------------------------------------------------------------------------------------


async def pump(way, tmp_path, **task):
    """Both ends as processes; returns what each of them sent and heard."""
    cert, key = way.world.identity(way.world.lease(endpoint=way.endpoint)).files
    client = {"connect": ("127.0.0.1", way.world.port)}
    client["tls"] = {"cert": cert, "key": key, "ca": str(way.world.ca.file)}
    worker = {"listener": way.listener.fileno()}
    if way.backend:
        leaf = way.backend.authority.issue_worker("uid", way.world.now())
        worker["tls"] = {"cert": str(tmp_path / "cert"), "key": str(tmp_path / "key")}
        (tmp_path / "cert").write_bytes(leaf.cert_pem)
        (tmp_path / "key").write_bytes(leaf.key_pem)
    way.listener.setblocking(True)
    return await asyncio.gather(process(worker | task, way.listener.fileno()), process(client | task))


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
    way, tmp_path, count, length
):
    worker, client = await pump(way, tmp_path, count=count, length=length)
    assert client["sent"] == worker["heard"]
    assert worker["sent"] == client["heard"]
    await way.over()


def resident():
    """Bytes of this process in memory; those of the gateway are among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_many_fast_writers_that_nobody_reads_cost_little_memory_and_lose_nothing(way, writer):
    pairs = [await way.joined() for _ in range(STUCK)]
    before = resident()
    fast = [pair[writer == "worker"] for pair in pairs]
    slow = [pair[writer == "client"] for pair in pairs]
    floods = [await way.fill(one) for one in fast]
    grown = resident() - before
    assert sum(one.length for one in floods) > STUCK * PER_STUCK_STREAM, "so it was not held anywhere"
    assert grown < STUCK * PER_STUCK_STREAM
    for written, one in zip(floods, slow, strict=True):
        heard, _ = await in_threads((one.receive, written.length), (written.finish,))
        assert written.is_all(heard)


async def test_hundreds_of_short_connections_all_get_through_while_the_certificate_changes(new_world):  # noqa: F811
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
            await world.settled()
    await asyncio.gather(*coming)
    assert seen >= {one.der for one in certificates}
    assert world.count("refusals_total") == 0


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
async def laboratory(machines, new_world, backend, tmp_path, monkeypatch):  # noqa: F811
    """The gateway is in one machine, its client and its worker in another, each of them on a cable of its own."""
    here, there = machines
    client, worker = Cable(here, there, 1), Cable(here, there, 2)

    class Reachable(Gateway):
        async def start(self, _addresses):
            return await super().start([(client.near, 0)])

    monkeypatch.setattr(tests.gateway.conftest, "Gateway", Reachable)
    where = Where(gateway=client.near, worker=worker.far, do=there.do)
    with inside(here):  # and so are the gateway's thread and its sockets
        async with running_way("tls-uvloop", new_world, backend, tmp_path, where) as way:
            yield way, client, worker


async def cut(way, cable, *, left):
    """Three streams (one silent, one being sent to, one being heard), and then one machine is gone.

    Returns after how many seconds those who are left (0 the clients, 1 the workers) knew it of every stream.
    """
    silent, sending, hearing = pairs = [await way.joined() for _ in range(3)]
    for pair in pairs:
        pair[left].sock.settimeout(2 * CLIENT_GONE)
    hearing[1 - left].send(bytes(MEGABYTE))
    cable.cut()
    began = time.monotonic()
    flooding = asyncio.create_task(asyncio.to_thread(flood, sending[left]))
    await in_threads(*((drink, pair[left]) for pair in (silent, hearing)))
    await flooding
    seconds = time.monotonic() - began
    for pair in pairs:
        pair[left].close()
    await way.over()
    return seconds


async def test_a_worker_that_vanishes_without_a_word_is_known_to_every_client_in_seconds(laboratory):
    """A cable is cut: no packet says so. Silent streams learn it as well as those with bytes under way."""
    way, _, cable = laboratory
    assert await cut(way, cable, left=0) < WORKER_GONE


async def test_a_client_that_vanishes_without_a_word_gives_its_slots_and_its_worker_back_in_seconds(laboratory):
    way, cable, _ = laboratory
    assert await cut(way, cable, left=1) < CLIENT_GONE


@pytest.mark.parametrize("way", ["tls-uvloop"], indirect=True)
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_who_stands_still_for_a_moment_with_bytes_under_way_loses_none(way, who):
    """A page fault, a busy disk: it answers the kernel's probes all the while, so it has not vanished."""
    client, worker = await way.joined()
    still, other = (client, worker) if who == "client" else (worker, client)
    written = await way.fill(other)
    await asyncio.to_thread(select.select, [], [], [], HICCUP)
    heard, _ = await in_threads((still.receive, written.length), (written.finish,))
    assert written.is_all(heard)
