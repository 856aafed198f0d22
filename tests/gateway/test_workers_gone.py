"""Workers that do not answer, not yet or not any more: their clients wait, are refused or are closed in bounded time.

test_pods.py tests dials with TLS and servers that are not the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.data_path import FEWEST_DATA_PATHS, NO_DEADLINES, WorkerCertificates, running_data_path
from support.peers import in_threads, read_to_end, send_until_closed

SKEWED_PATHS = ["unix-asyncio", "tls-asyncio"]
"""The clock of their loop can be advanced."""
WORKER_LOST_WITHIN, CLIENT_LOST_WITHIN = 20, 40
"""Seconds within which a lost peer must be noticed: about 15 and 30, and what the kernel's timers add."""

WORKER_PROGRAM = """
import socket, ssl, sys
listener, context = socket.socket(fileno=int(sys.argv[1])), None
if len(sys.argv) > 2:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(sys.argv[2])
socks = []
while True:
    sock = listener.accept()[0]
    socks.append(context.wrap_socket(sock, server_side=True) if context else sock)
    socks[-1].sendall(socks[-1].recv(1))
"""
"""A worker to be killed. It sends the first byte of each connection back, and then does nothing more with it."""


@pytest.fixture(scope="module")
def worker_certificates():
    return WorkerCertificates()


@pytest.fixture
def limits():
    """Fields of GatewayLimits; replaced by tests that need other limits."""
    return {}


@pytest.fixture(params=FEWEST_DATA_PATHS)
async def data_path(request, new_world, worker_certificates, tmp_path, limits):
    async with running_data_path(request.param, new_world, worker_certificates, tmp_path, **limits) as data_path:
        yield data_path


async def redial(data_path):
    """Waits until a client is held, and lets the gateway dial the worker once more."""
    await data_path.world.wait_until(data_path.world.holds_client)
    assert data_path.world.metric("refusals_total") == 0
    await data_path.world.advance(0.5)


# --- not yet reachable ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_path", SKEWED_PATHS, indirect=True)
async def test_clients_of_a_worker_that_starts_and_stops_wait_until_it_is_up(data_path):
    """No client is refused meanwhile, and the bytes that it sent early arrive first."""
    for number in range(3):
        data_path.stop_worker()
        client = await data_path.client()
        client.send(b"early %d" % number)
        for _ in range(3):
            await redial(data_path)
        data_path.start_worker()
        accepting = asyncio.create_task(data_path.accept())
        await redial(data_path)
        worker = await accepting
        assert await asyncio.to_thread(worker.receive, 7) == b"early %d" % number
        worker.send(b"well")
        assert await asyncio.to_thread(client.receive, 4) == b"well"
        client.close()
        await asyncio.to_thread(
            read_to_end, worker
        )  # a client that arrives when the worker ends a connection is not held
        worker.close()
        await data_path.wait_idle()
    assert data_path.world.metric("refusals_total") == 0


@pytest.mark.parametrize("data_path", ["tls-asyncio"], indirect=True)
async def test_a_worker_that_answers_no_syn_is_given_up_in_time_and_the_client_is_refused(data_path):
    """Its client is held for the time of a first wait, and then gets the reason and frees its slot."""
    data_path.listener.listen(0)
    with contextlib.closing(socket.create_connection(data_path.listener.getsockname())):  # fills the backlog
        streams = await data_path.world.connect(data_path.world.lease(endpoint=data_path.endpoint))
        streams.start_call()
        await data_path.world.wait_until(lambda: data_path.world.registry.calls != [])
        for _ in range(4):  # 15 s from the end of the first dial
            assert data_path.world.metric("refusals_total") == 0
            await data_path.world.settle()
            await data_path.world.advance(5)  # for the dial
            await data_path.world.advance(0.5)  # until the next one
        code, sentence = await streams.call_result()
    assert code == 14
    assert "it could not be reached (no answer within 5 s)" in sentence


@pytest.mark.parametrize("data_path", ["unix-asyncio"], indirect=True)
async def test_a_client_waits_for_a_local_worker_whose_backlog_is_full(data_path):
    data_path.listener.listen(0)
    filling = []
    with contextlib.suppress(BlockingIOError):
        while True:
            filling.append(socket.socket(socket.AF_UNIX))
            filling[-1].setblocking(False)
            filling[-1].connect(data_path.listener.getsockname())
    client = await data_path.client()
    client.send(b"preface")
    for _ in range(3):
        await redial(data_path)
    for _ in filling[:-1]:
        (await data_path.accept()).close()
    accepting = asyncio.create_task(data_path.accept())
    await redial(data_path)
    worker = await accepting
    assert await asyncio.to_thread(worker.receive, 7) == b"preface"
    for sock in filling:
        sock.close()


# --- no longer reachable --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [NO_DEADLINES], ids=["no deadlines"])
async def test_a_client_of_a_worker_that_accepts_and_then_resets_is_closed_at_once(data_path):
    """The client does not wait for it: it was reached, and may have acted on what the client sent."""
    client, worker = await asyncio.gather(data_path.client(), data_path.accept())
    worker.reset()
    await asyncio.to_thread(read_to_end, client)
    client.close()
    await data_path.wait_idle()


@contextlib.contextmanager
def worker_process(data_path, directory):
    """Runs the worker of this data path in another process."""
    argv = [sys.executable, "-c", WORKER_PROGRAM, str(data_path.listener.fileno())]
    if data_path.tls:
        leaf = data_path.worker_certificates.authority.issue_worker("uid", data_path.world.now())
        (directory / "pem").write_bytes(leaf.key_pem + leaf.cert_pem)
        argv.append(str(directory / "pem"))
    data_path.listener.setblocking(True)
    with subprocess.Popen(argv, pass_fds=[data_path.listener.fileno()]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("limits", [NO_DEADLINES], ids=["no deadlines"])
async def test_the_clients_of_a_killed_worker_are_closed_at_once(data_path, tmp_path):
    """Also those that only wait for its answer, and those that send while it does not read."""
    with worker_process(data_path, tmp_path) as process:
        clients = [await data_path.client() for _ in range(3)]
        for client in clients:
            client.send(b"?")
            assert await asyncio.to_thread(client.receive, 1) == b"?"
        sending = asyncio.create_task(asyncio.to_thread(send_until_closed, clients[0]))
        await data_path.fill(clients[1])
        process.kill()
        await in_threads(*((read_to_end, client) for client in clients[1:]))
        await sending
        for client in clients:
            client.close()
        await data_path.wait_idle()


@pytest.mark.parametrize("data_path", SKEWED_PATHS, indirect=True)
@pytest.mark.parametrize("how", ["FIN", "RST", "bytes unread"])
async def test_clients_that_wait_or_arrive_when_the_worker_ends_are_refused_at_once_and_later_ones_wait(
    data_path, how
):
    """A cut build makes another connection within milliseconds, and ends only when that is answered."""
    world = data_path.world
    client = await data_path.client()
    worker = await data_path.accept()
    data_path.stop_worker()
    await data_path.client()
    await world.wait_until(world.holds_client)
    if how == "bytes unread":  # both directions of a Unix socket then end at once
        client.send(b"?")
        await asyncio.to_thread(worker.sock.recv, 1, socket.MSG_PEEK)
    worker.reset() if how == "RST" else worker.close()
    await asyncio.to_thread(read_to_end, client)
    client.close()
    await world.wait_until(lambda: not world.holds_client() and world.metric("refusals_total", reason="Waited") == 1)
    await data_path.client()
    await world.wait_until(lambda: world.metric("refusals_total", reason="Waited") == 2)
    await world.advance(0.5)
    await data_path.client()
    await world.wait_until(world.holds_client)
    assert world.metric("refusals_total", reason="Waited") == 2


@pytest.mark.parametrize("data_path", SKEWED_PATHS, indirect=True)
async def test_a_client_that_ends_its_connection_itself_does_not_get_later_clients_refused(data_path):
    """A client that arrives after it waits, however soon it arrives."""
    client = await data_path.client()
    worker = await data_path.accept()
    data_path.stop_worker()
    client.close()
    await asyncio.to_thread(read_to_end, worker)
    worker.close()
    await data_path.wait_idle()
    await data_path.client()
    await data_path.world.wait_until(data_path.world.holds_client)
    assert data_path.world.metric("refusals_total", reason="Waited") == 0


# --- lost without a packet ------------------------------------------------------------------------------------------


def peer_timeouts(data_path):
    """Returns the peer timeouts of the gateway's two sockets, found among the file descriptors of this process."""
    timeouts = {}
    for sock in sockets():
        with contextlib.suppress(OSError):  # not connected
            far, near = sock.getpeername(), sock.getsockname()
            if far == data_path.listener.getsockname():
                timeouts["worker"] = peer_timeout(sock)
            elif near[1:2] == (data_path.world.port,):
                timeouts["client"] = peer_timeout(sock)
    return timeouts


def sockets():
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            number = os.dup(int(path.name))
            try:
                with contextlib.closing(socket.socket(fileno=number)) as sock:
                    yield sock
            except OSError:  # something else
                os.close(number)


def peer_timeout(sock):
    """Returns the seconds after which this socket gives up a lost peer: without bytes to send, and with.

    tcp(7): keepalive counts probes. If a user timeout is set, it alone decides, at the next probe.
    """
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return float("inf"), float("inf")
    idle, between, probes = (
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    )
    timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    if not timeout:
        return idle + between * probes, float("inf")
    silent = idle + between
    while silent < timeout:
        silent += between
    return silent, timeout


@pytest.mark.parametrize("data_path", ["tls-uvloop"], indirect=True)
async def test_both_sockets_give_up_a_lost_peer_in_bounded_time(data_path):
    """Checks the options of the sockets. e2e/gateway/test_streams_heavy.py cuts cables to show that they work."""
    await data_path.connected_pair()
    timeouts = peer_timeouts(data_path)
    assert max(timeouts["worker"]) <= WORKER_LOST_WITHIN, f"silent, under data_path: {timeouts['worker']} s"
    assert max(timeouts["client"]) <= CLIENT_LOST_WITHIN, f"silent, under data_path: {timeouts['client']} s"


async def test_the_times_for_lost_peers_are_limits(new_world, worker_certificates, tmp_path):
    limits = {"worker_peer_timeout": 60.0, "client_peer_timeout": 90.0}
    async with running_data_path("tls-uvloop", new_world, worker_certificates, tmp_path, **limits) as data_path:
        await data_path.connected_pair()
        assert peer_timeouts(data_path) == {"worker": (60, 60), "client": (90, 90)}
