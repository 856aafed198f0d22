"""Workers that are not there, not yet or not any more: the client is held, told or ended in bounded time.

Which strangers are refused, and what a dial over TLS bears, is in test_pods.py; here is the rest of what can go wrong
between the gateway and a worker's address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.data_path import FEWEST_DATA_PATHS, PASS_ON_WITHIN, WorkerCertificates, running_data_path
from support.peers import in_threads, read_to_end, send_until_closed

SKEWED_PATHS = ["unix-asyncio", "tls-asyncio"]  # whose loop's clock can be put forward
WORKER_LEG, CLIENT_LEG = 20, 40
"""Seconds in which a leg must notice that its peer has vanished: about 15 and 30, and what timers add."""

MORTAL = """
import socket, ssl, sys
listener, context = socket.socket(fileno=int(sys.argv[1])), None
if len(sys.argv) > 2:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(sys.argv[2])
held = []
while True:
    sock = listener.accept()[0]
    held.append(context.wrap_socket(sock, server_side=True) if context else sock)
    held[-1].sendall(held[-1].recv(1))
"""
"""A worker to be killed: gives the first byte of each connection back, and then only holds it."""


@pytest.fixture(scope="module")
def worker_certificates():
    return WorkerCertificates()


@pytest.fixture(params=FEWEST_DATA_PATHS)
async def data_path(request, new_world, worker_certificates, tmp_path):
    async with running_data_path(request.param, new_world, worker_certificates, tmp_path) as data_path:
        yield data_path


async def redialled(data_path):
    """A client is held, and the worker is dialled once more."""
    await data_path.world.wait_until(data_path.world.holds_client)
    assert data_path.world.metric("refusals_total") == 0
    await data_path.world.advance(0.5)


# --- not there yet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_path", SKEWED_PATHS, indirect=True)
async def test_a_worker_that_flaps_holds_its_clients_and_gets_each_of_them_when_it_is_up(data_path):
    """Nobody is told anything while it refuses, and what was said early is said first."""
    for number in range(3):
        data_path.stop_worker()
        client = await data_path.client()
        client.send(b"early %d" % number)
        for _ in range(3):
            await redialled(data_path)
        data_path.start_worker()
        accepting = asyncio.create_task(data_path.accept())
        await redialled(data_path)
        worker = await accepting
        assert await asyncio.to_thread(worker.receive, 7) == b"early %d" % number
        worker.send(b"well")
        assert await asyncio.to_thread(client.receive, 4) == b"well"
        client.close()
        await asyncio.to_thread(read_to_end, worker)  # who comes as a worker ends a connection is not held
        worker.close()
        await data_path.wait_idle()
    assert data_path.world.metric("refusals_total") == 0


@pytest.mark.parametrize("data_path", ["tls-asyncio"], indirect=True)
async def test_a_worker_that_swallows_every_syn_is_given_up_in_time_and_named(data_path):
    """Its client is held for as long as a first wait lasts, told why, and holds nothing afterwards."""
    data_path.listener.listen(0)
    with contextlib.closing(socket.create_connection(data_path.listener.getsockname())):  # fills the line
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
async def test_a_local_worker_with_a_full_line_is_awaited(data_path):
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
        await redialled(data_path)
    for _ in filling[:-1]:
        (await data_path.accept()).close()
    accepting = asyncio.create_task(data_path.accept())
    await redialled(data_path)
    worker = await accepting
    assert await asyncio.to_thread(worker.receive, 7) == b"preface"
    for sock in filling:
        sock.close()


# --- not there any more ---------------------------------------------------------------------------------------------


async def test_a_worker_that_accepts_and_then_hangs_up_ends_its_client_within_a_second(data_path):
    """It has been reached, so there is nobody to wait for: what the client said may have been acted on."""
    client, worker = await asyncio.gather(data_path.client(), data_path.accept())
    began = time.monotonic()
    worker.reset()
    await asyncio.to_thread(read_to_end, client)
    assert time.monotonic() - began < PASS_ON_WITHIN
    client.close()
    await data_path.wait_idle()


@contextlib.contextmanager
def mortal(data_path, directory):
    """The data_path's worker, in a process of its own."""
    argv = [sys.executable, "-c", MORTAL, str(data_path.listener.fileno())]
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


async def test_the_clients_of_a_killed_worker_know_within_a_second(data_path, tmp_path):
    """Whatever they were doing: waiting for it in silence, or sending to it while it did not read."""
    with mortal(data_path, tmp_path) as process:
        clients = [await data_path.client() for _ in range(3)]
        for client in clients:
            client.send(b"?")
            assert await asyncio.to_thread(client.receive, 1) == b"?"
        flooding = asyncio.create_task(asyncio.to_thread(send_until_closed, clients[0]))
        await data_path.fill(clients[1])
        began = time.monotonic()
        process.kill()
        await in_threads(*((read_to_end, client) for client in clients[1:]))
        await flooding
        assert time.monotonic() - began < PASS_ON_WITHIN
        for client in clients:
            client.close()
        await data_path.wait_idle()


@pytest.mark.parametrize("data_path", SKEWED_PATHS, indirect=True)
@pytest.mark.parametrize("how", ["FIN", "RST", "words unread"])
async def test_who_waits_or_comes_back_as_the_worker_ends_is_told_at_once_and_who_comes_later_is_held(data_path, how):
    """A build that was cut ends only once its next connection, made within milliseconds, is answered."""
    world = data_path.world
    client = await data_path.client()
    worker = await data_path.accept()
    data_path.stop_worker()
    await data_path.client()
    await world.wait_until(world.holds_client)
    if how == "words unread":  # of a Unix socket both directions then end at once
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
async def test_a_client_that_has_ended_by_itself_leaves_nobody_behind(data_path):
    """Who comes after it is held, however soon."""
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


# --- vanished without a word ----------------------------------------------------------------------------------------


def of_the_gateway(data_path):
    """The patience of the gateway's own ends of its two legs, found among the descriptors of this process."""
    legs = {}
    for sock in sockets():
        with contextlib.suppress(OSError):  # not connected
            far, near = sock.getpeername(), sock.getsockname()
            if far == data_path.listener.getsockname():
                legs["worker"] = patience(sock)
            elif near[1:2] == (data_path.world.port,):
                legs["client"] = patience(sock)
    return legs


def sockets():
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            number = os.dup(int(path.name))
            try:
                with contextlib.closing(socket.socket(fileno=number)) as sock:
                    yield sock
            except OSError:  # something else
                os.close(number)


def patience(sock):
    """After how many seconds this socket gives a vanished peer up: when it is silent, and when bytes are under way.

    tcp(7): keepalive counts probes, but where a user timeout is set that alone decides, at the next probe.
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
async def test_both_legs_give_up_a_peer_that_has_vanished_in_bounded_time(data_path):
    """What the kernel is told; that it does so is shown with cut cables in e2e/gateway/test_streams_heavy.py."""
    await data_path.connected_pair()
    legs = of_the_gateway(data_path)
    assert max(legs["worker"]) <= WORKER_LEG, f"silent, under data_path: {legs['worker']} s"
    assert max(legs["client"]) <= CLIENT_LEG, f"silent, under data_path: {legs['client']} s"
