"""Bytes and their ends through the whole gateway, from TLS to a Unix socket and to mTLS, on both loops.

What the relay does alone is in test_relay.py; here a lease, its slot and the counters hang on every stream (and
`new_world` asserts after each test that all of them came back).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import time

import pytest

from support.data_path import DATA_PATHS, FEWEST_DATA_PATHS, PASS_ON_WITHIN, WorkerCertificates, running_data_path
from support.peers import in_threads, read_to_end, sees_hangup, send_until_closed

KILOBYTE, MEGABYTE = 1024, 1024 * 1024
UNIX_PATHS = [data_path for data_path in DATA_PATHS if data_path.startswith("unix")]
LAST_WORDS = bytes(range(256)) * 400  # more than one chunk of the relay (buffers.PLAINTEXT_CHUNK)
TLS_PATHS = [data_path for data_path in DATA_PATHS if data_path.startswith("tls")]  # a Unix socket knows no reset


@pytest.fixture(scope="module")
def worker_certificates():
    return WorkerCertificates()


@pytest.fixture(params=FEWEST_DATA_PATHS)
async def data_path(request, new_world, worker_certificates, tmp_path):
    async with running_data_path(request.param, new_world, worker_certificates, tmp_path) as data_path:
        yield data_path


def digest(data):
    return hashlib.sha256(data).hexdigest()


# --- resets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_the_client_in_mid_transfer_passes_to_the_worker_and_frees_its_slot(data_path):
    client, worker = await data_path.connected_pair()
    sending = asyncio.create_task(asyncio.to_thread(send_until_closed, worker))
    await asyncio.to_thread(client.receive, MEGABYTE)
    began = time.monotonic()
    client.reset()
    await sending
    await data_path.wait_idle()
    assert time.monotonic() - began < PASS_ON_WITHIN
    assert sees_hangup(worker, PASS_ON_WITHIN)


@pytest.mark.parametrize("data_path", TLS_PATHS, indirect=True)
async def test_a_reset_of_the_worker_in_mid_transfer_passes_to_the_client_as_a_reset(data_path):
    client, worker = await data_path.connected_pair()
    drinking = asyncio.create_task(asyncio.to_thread(read_to_end, client))
    worker.send(os.urandom(MEGABYTE))
    began = time.monotonic()
    worker.reset()
    assert await drinking, "an end that looks well would pass for the end of what was sent"
    await data_path.wait_idle()
    assert time.monotonic() - began < PASS_ON_WITHIN


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_a_reset_that_comes_together_with_bytes_is_heard_after_them(data_path, who):
    """uvloop tells of a failed socket once and never again, and that once is spent on the bytes."""
    client, worker = await data_path.connected_pair()
    one, other = (client, worker) if who == "client" else (worker, client)
    with data_path.loop_blocked():
        one.send(b"a few last bytes")
        one.reset()  # of a Unix socket: the end
    began = time.monotonic()
    await asyncio.to_thread(read_to_end, other)
    assert time.monotonic() - began < PASS_ON_WITHIN
    other.close()
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_the_client_is_heard_though_the_worker_reads_nothing(data_path):
    """Under back-pressure the client's reader is off the loop; its slot comes back and the worker is told all the
    same, within a second."""
    client, worker = await data_path.connected_pair()
    await data_path.fill(client)
    client.reset()
    assert await asyncio.to_thread(sees_hangup, worker, PASS_ON_WITHIN)
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", TLS_PATHS, indirect=True)
async def test_a_reset_of_the_worker_is_heard_though_the_client_reads_nothing(data_path):
    client, worker = await data_path.connected_pair()
    await data_path.fill(worker)
    worker.reset()
    assert await asyncio.to_thread(sees_hangup, client, PASS_ON_WITHIN)
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_a_client_that_is_held_and_has_said_all_that_is_kept_ends_its_wait(data_path):
    """Its first 16 KiB are kept and nothing more is read, so its reader is off the loop here too."""
    client = await data_path.client(endpoint=None, wait_reason="it is being started")
    await data_path.fill(client)
    client.reset()
    began = time.monotonic()
    await data_path.world.wait_until(lambda: not data_path.world.holds_client())
    assert time.monotonic() - began < PASS_ON_WITHIN
    assert data_path.world.metric("refusals_total", reason="WorkerFailed") == 0


# --- ends -----------------------------------------------------------------------------------------------------------


def say_end(peer, how):
    """Ends one direction, as TLS says it, as TCP says it, or as both do."""
    if "close_notify" in how and peer.tls:
        peer.close_notify()
    if "fin" in how or not peer.tls:
        peer.fin()


@pytest.mark.parametrize("how", ["close_notify", "fin", "close_notify and fin"])
@pytest.mark.parametrize("first", ["client", "worker"])
async def test_who_has_ended_still_gets_every_byte_and_then_the_others_end(data_path, first, how):
    client, worker = await data_path.connected_pair()
    early, late = (client, worker) if first == "client" else (worker, client)
    one, two = os.urandom(300 * KILOBYTE), os.urandom(700 * KILOBYTE)
    _, heard = await in_threads((early.send, one), (late.receive, len(one)))
    assert heard == one
    say_end(early, how)
    assert await asyncio.to_thread(late.receive) == b"", "the end came, and nothing but it"
    _, heard = await in_threads((late.send, two), (early.receive, len(two)))
    assert heard == two
    say_end(late, how)
    assert await asyncio.to_thread(early.receive) == b""
    await data_path.wait_idle()


async def test_what_follows_a_close_notify_harms_neither_direction(data_path):
    """It is not passed on; and, unread, it does not make the gateway's close a reset that overtakes the answer."""
    client, worker = await data_path.connected_pair()
    client.send(b"the last of it")
    client.close_notify()
    assert await asyncio.to_thread(worker.receive) == b"the last of it"
    client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32) + os.urandom(KILOBYTE))
    down = hashlib.sha256()
    await asyncio.to_thread(pour, worker, down)
    await data_path.wait_idle()
    assert digest(await asyncio.to_thread(client.receive)) == down.hexdigest()


@pytest.mark.parametrize("data_path", UNIX_PATHS, indirect=True)  # over TCP this is a reset
async def test_the_last_words_of_a_worker_that_dies_with_bytes_unread_are_delivered_and_so_is_its_end(data_path):
    """Its socket has an error then (ECONNRESET) besides the bytes, of which uvloop tells only once."""
    client, worker = await data_path.connected_pair()
    client.send(b"never read")
    await data_path.world.wait_until(lambda: hears(worker))
    worker.send(LAST_WORDS)
    worker.close()
    began = time.monotonic()
    assert await asyncio.to_thread(client.receive) == LAST_WORDS
    assert time.monotonic() - began < PASS_ON_WITHIN
    await data_path.wait_idle()


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_what_was_read_is_delivered_before_the_end_to_who_starts_to_read_after_it(data_path, writer):
    """The writer has closed its socket while the gateway was full of its bytes: not one of them is lost."""
    client, worker = await data_path.connected_pair()
    early, late = (client, worker) if writer == "client" else (worker, client)
    sent = hashlib.sha256()
    sending = asyncio.create_task(asyncio.to_thread(pour, early, sent))
    await data_path.world.wait_until(lambda: hears(late))  # so it flows, and is not read
    await sending
    heard = await asyncio.to_thread(late.receive)
    assert digest(heard) == sent.hexdigest()
    say_end(late, "close_notify and fin")
    await data_path.wait_idle()


def pour(peer, digest):
    """Sends more than the gateway alone can hold, and closes at once behind it."""
    data = os.urandom(MEGABYTE)
    digest.update(data)
    peer.send(data)
    say_end(peer, "close_notify and fin")
    peer.close()


def hears(peer):
    """Whether there is something to read; it is left there."""
    return bool(select.select([peer.sock], [], [], 0)[0])


# --- slow and small -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_who_does_not_read_stops_the_writer_and_nobody_else(data_path, writer):
    """The fast writer is held after what sockets can hold; another lease's ping-pong goes on; no byte is lost."""
    client, worker = await data_path.connected_pair()
    fast, slow = (client, worker) if writer == "client" else (worker, client)
    unread = await data_path.fill(fast)
    other, others_worker = await data_path.connected_pair("b")
    for number in range(50):
        await ping_pong(other, others_worker, number.to_bytes(4, "big"))
    heard, _ = await in_threads((slow.receive, unread.length), (unread.write_rest,))
    assert unread.matches(heard)


async def ping_pong(client, worker, ball):
    client.send(ball)
    assert await asyncio.to_thread(worker.receive, len(ball)) == ball
    worker.send(ball)
    assert await asyncio.to_thread(client.receive, len(ball)) == ball


async def test_single_bytes_in_a_row_both_ways_at_once_arrive_in_their_order(data_path):
    client, worker = await data_path.connected_pair()
    up, down = os.urandom(1000), os.urandom(1000)
    *_, heard_down, heard_up = await in_threads(
        (drip, client, up), (drip, worker, down), (client.receive, len(down)), (worker.receive, len(up))
    )
    assert (heard_up, heard_down) == (up, down)


def drip(peer, data):
    for number in range(len(data)):
        peer.send(data[number : number + 1])
