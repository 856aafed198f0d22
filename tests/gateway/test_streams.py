"""Bytes and the end of each direction through the whole gateway, to a Unix socket and to mTLS, on both loops.

test_relay.py tests the relay alone. Here each connection has a lease and a slot and is counted, and `new_world`
checks after each test that nothing of that is left.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select

import pytest

from support.data_path import DATA_PATHS, FEWEST_DATA_PATHS, NO_DEADLINES, WorkerCertificates, running_data_path
from support.peers import in_threads, read_to_end, sees_hangup, send_until_closed

KILOBYTE, MEGABYTE = 1024, 1024 * 1024
UNIX_PATHS = [kind for kind in DATA_PATHS if kind.startswith("unix")]
TLS_PATHS = [kind for kind in DATA_PATHS if kind.startswith("tls")]  # a Unix socket has no reset
LAST_BYTES = bytes(range(256)) * 400  # more than one chunk of the relay (buffers.PLAINTEXT_CHUNK)


@pytest.fixture(scope="module")
def worker_certificates():
    return WorkerCertificates()


@pytest.fixture(params=FEWEST_DATA_PATHS)
async def data_path(request, new_world, worker_certificates, tmp_path):
    async with running_data_path(
        request.param, new_world, worker_certificates, tmp_path, **NO_DEADLINES
    ) as data_path:
        yield data_path


def digest(data):
    return hashlib.sha256(data).hexdigest()


# --- resets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_the_client_during_a_transfer_reaches_the_worker_and_frees_the_slot(data_path):
    client, worker = await data_path.connected_pair()
    sending = asyncio.create_task(asyncio.to_thread(send_until_closed, worker))
    await asyncio.to_thread(client.receive, MEGABYTE)
    client.reset()
    await sending
    await data_path.wait_idle()
    assert sees_hangup(worker)


@pytest.mark.parametrize("data_path", TLS_PATHS, indirect=True)
async def test_a_reset_of_the_worker_during_a_transfer_reaches_the_client_as_a_reset(data_path):
    client, worker = await data_path.connected_pair()
    reading = asyncio.create_task(asyncio.to_thread(read_to_end, client))
    worker.send(os.urandom(MEGABYTE))
    worker.reset()
    assert await reading, "a normal end would look like the end of the data"
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_a_reset_that_comes_together_with_bytes_is_passed_on_after_them(data_path, who):
    """uvloop reports a failed socket only once, and here that report is used for the bytes."""
    client, worker = await data_path.connected_pair()
    one, other = (client, worker) if who == "client" else (worker, client)
    with data_path.loop_blocked():
        one.send(b"a few last bytes")
        one.reset()  # on a Unix socket this is a normal end
    await asyncio.to_thread(read_to_end, other)
    other.close()
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
@pytest.mark.parametrize("who", ["client", "worker"])
async def test_a_reset_that_the_gateway_learns_of_by_sending_is_passed_on(data_path, who):
    """The send takes the error from the socket. Afterwards the system only reports a hang-up."""
    client, worker = await data_path.connected_pair()
    one, other = (client, worker) if who == "client" else (worker, client)
    await data_path.fill(other)
    with data_path.loop_blocked():
        one.reset()
    await asyncio.to_thread(read_to_end, other)
    other.close()
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_the_client_is_noticed_while_the_worker_reads_nothing(data_path):
    """Back-pressure removes the client's reader from the loop. The slot is freed at once all the same."""
    client, worker = await data_path.connected_pair()
    await data_path.fill(client)
    client.reset()
    assert await asyncio.to_thread(sees_hangup, worker)
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", TLS_PATHS, indirect=True)
async def test_a_reset_of_the_worker_is_noticed_while_the_client_reads_nothing(data_path):
    client, worker = await data_path.connected_pair()
    await data_path.fill(worker)
    worker.reset()
    assert await asyncio.to_thread(sees_hangup, client)
    await data_path.wait_idle()


@pytest.mark.parametrize("data_path", DATA_PATHS, indirect=True)
async def test_a_reset_of_a_held_client_that_has_filled_its_buffer_ends_its_wait(data_path):
    """The gateway keeps its first 16 KiB and reads nothing more, so its reader is not in the loop here either."""
    client = await data_path.client(endpoint=None, wait_reason="it is being started")
    await data_path.fill(client)
    client.reset()
    await data_path.world.wait_until(lambda: not data_path.world.holds_client())
    assert data_path.world.metric("refusals_total", reason="WorkerFailed") == 0


# --- ends -----------------------------------------------------------------------------------------------------------


def end_direction(peer, how):
    """Ends one direction with close_notify, with FIN, or with both."""
    if "close_notify" in how and peer.tls:
        peer.close_notify()
    if "fin" in how or not peer.tls:
        peer.fin()


@pytest.mark.parametrize("how", ["close_notify", "fin", "close_notify and fin"])
@pytest.mark.parametrize("first", ["client", "worker"])
async def test_a_peer_that_has_ended_its_direction_gets_every_byte_and_then_the_end_of_the_other(
    data_path, first, how
):
    client, worker = await data_path.connected_pair()
    early, late = (client, worker) if first == "client" else (worker, client)
    one, two = os.urandom(300 * KILOBYTE), os.urandom(700 * KILOBYTE)
    _, received = await in_threads((early.send, one), (late.receive, len(one)))
    assert received == one
    end_direction(early, how)
    assert await asyncio.to_thread(late.receive) == b"", "something came before the end"
    _, received = await in_threads((late.send, two), (early.receive, len(two)))
    assert received == two
    end_direction(late, how)
    assert await asyncio.to_thread(early.receive) == b""
    await data_path.wait_idle()


async def test_bytes_after_close_notify_disturb_neither_direction(data_path):
    """They are not passed on. They are read, so that the gateway's close is not a reset that overtakes the answer."""
    client, worker = await data_path.connected_pair()
    client.send(b"the last of it")
    client.close_notify()
    assert await asyncio.to_thread(worker.receive) == b"the last of it"
    client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32) + os.urandom(KILOBYTE))
    down = hashlib.sha256()
    await asyncio.to_thread(send_and_close, worker, down)
    await data_path.wait_idle()
    assert digest(await asyncio.to_thread(client.receive)) == down.hexdigest()


@pytest.mark.parametrize("data_path", UNIX_PATHS, indirect=True)  # over TCP this is a reset
async def test_the_last_bytes_and_the_end_of_a_worker_that_dies_with_unread_bytes_are_delivered(data_path):
    """Then its socket has bytes and an error (ECONNRESET), and uvloop reports that only once."""
    client, worker = await data_path.connected_pair()
    client.send(b"never read")
    await data_path.world.wait_until(lambda: has_bytes(worker))
    worker.send(LAST_BYTES)
    worker.close()
    assert await asyncio.to_thread(client.receive) == LAST_BYTES
    await data_path.wait_idle()


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_a_peer_that_starts_to_read_after_the_other_has_closed_gets_every_byte_and_then_the_end(
    data_path, writer
):
    """The writer closes its socket while the gateway's buffers are full of its bytes."""
    client, worker = await data_path.connected_pair()
    early, late = (client, worker) if writer == "client" else (worker, client)
    sent = hashlib.sha256()
    sending = asyncio.create_task(asyncio.to_thread(send_and_close, early, sent))
    await data_path.world.wait_until(lambda: has_bytes(late))  # the bytes arrive, and nobody reads them
    await sending
    received = await asyncio.to_thread(late.receive)
    assert digest(received) == sent.hexdigest()
    end_direction(late, "close_notify and fin")
    await data_path.wait_idle()


def send_and_close(peer, digest):
    """Sends more than the gateway's buffers hold, and closes at once."""
    data = os.urandom(MEGABYTE)
    digest.update(data)
    peer.send(data)
    end_direction(peer, "close_notify and fin")
    peer.close()


def has_bytes(peer):
    """Returns whether there are bytes to read, without reading them."""
    return bool(select.select([peer.sock], [], [], 0)[0])


# --- slow and small -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_a_peer_that_does_not_read_stops_its_writer_and_no_other_connection(data_path, writer):
    """The fast writer is stopped when the buffers are full, another lease is served, and no byte is lost."""
    client, worker = await data_path.connected_pair()
    fast, slow = (client, worker) if writer == "client" else (worker, client)
    unread = await data_path.fill(fast)
    other, others_worker = await data_path.connected_pair("b")
    for number in range(50):
        await ping_pong(other, others_worker, number.to_bytes(4, "big"))
    received, _ = await in_threads((slow.receive, unread.length), (unread.write_rest,))
    assert unread.matches(received)


async def ping_pong(client, worker, data):
    client.send(data)
    assert await asyncio.to_thread(worker.receive, len(data)) == data
    worker.send(data)
    assert await asyncio.to_thread(client.receive, len(data)) == data


async def test_single_bytes_in_both_directions_at_the_same_time_arrive_in_order(data_path):
    client, worker = await data_path.connected_pair()
    up, down = os.urandom(1000), os.urandom(1000)
    *_, received_down, received_up = await in_threads(
        (send_one_by_one, client, up),
        (send_one_by_one, worker, down),
        (client.receive, len(down)),
        (worker.receive, len(up)),
    )
    assert (received_up, received_down) == (up, down)


def send_one_by_one(peer, data):
    for number in range(len(data)):
        peer.send(data[number : number + 1])
