"""A relay between two real peers: every byte arrives, and every kind of end is passed on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl

import pytest

from bkpool.gateway.net.buffers import PLAINTEXT_CHUNK
from bkpool.gateway.net.socket_errors import SocketErrorWatcher
from support.peers import Peer, in_threads, sees_hangup, tcp_pair

MEGABYTE = 1024 * 1024


def digest(data):
    return hashlib.sha256(data).hexdigest()


async def test_bytes_pass_unchanged_in_both_directions_at_the_same_time(new_relay):
    relayed = await new_relay()
    up, down = os.urandom(12 * MEGABYTE), os.urandom(12 * MEGABYTE)
    *_, received_down, received_up = await in_threads(
        (relayed.client.send, up),
        (relayed.worker.send, down),
        (relayed.client.receive, len(down)),
        (relayed.worker.receive, len(up)),
    )
    assert digest(received_up) == digest(up)
    assert digest(received_down) == digest(down)
    client = relayed.endpoints[0].stream
    assert (client.bytes_in, client.bytes_out) == (len(up), len(down))


async def test_bytes_that_the_client_sent_before_the_relay_started_are_sent_first(new_relay):
    relayed = await new_relay(first_bytes=b"early, ")
    relayed.client.send(b"and late")
    assert await asyncio.to_thread(relayed.worker.receive, 15) == b"early, and late"


async def test_single_bytes_pass_without_delay(new_relay):
    relayed = await new_relay()
    for byte in b"one by one":
        relayed.client.send(bytes([byte]))
        assert await asyncio.to_thread(relayed.worker.receive, 1) == bytes([byte])
        relayed.worker.send(bytes([byte]))
        assert await asyncio.to_thread(relayed.client.receive, 1) == bytes([byte])


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_a_slow_reader_stops_the_writer_and_the_relay_keeps_few_bytes(new_relay, writer):
    relayed = await new_relay()
    fast, slow = (relayed.client, relayed.worker) if writer == "client" else (relayed.worker, relayed.client)
    data = os.urandom(PLAINTEXT_CHUNK)
    sent, attempts_without_progress = hashlib.sha256(), 0
    total, rest = 0, b""
    fast.sock.setblocking(False)
    while attempts_without_progress < 50:
        if not rest:
            sent.update(data)
            total += len(data)
            if fast.tls:
                fast.tls.encrypt(memoryview(data))
            rest = fast.tls.take() if fast.tls else data
        try:
            rest = rest[fast.sock.send(rest) :]
            attempts_without_progress = 0
        except BlockingIOError:
            attempts_without_progress += 1
        await asyncio.sleep(0)
    assert sum(len(endpoint.stream.unsent) for endpoint in relayed.endpoints) <= 2 * PLAINTEXT_CHUNK
    fast.sock.settimeout(60)
    received, _ = await in_threads((slow.receive, total), (fast.sock.sendall, rest))
    assert digest(received) == sent.hexdigest()


async def test_a_client_that_has_closed_its_direction_still_gets_everything(new_relay):
    relayed = await new_relay()
    up, down = os.urandom(MEGABYTE), os.urandom(3 * MEGABYTE)
    *_, received = await in_threads((relayed.client.send, up), (relayed.worker.receive, len(up)))
    assert received == up
    relayed.client.close_notify()
    assert await asyncio.to_thread(relayed.worker.receive) == b""
    *_, received = await in_threads((relayed.worker.send, down), (relayed.client.receive, len(down)))
    assert received == down
    relayed.worker.close_notify()
    relayed.worker.fin()
    assert await asyncio.to_thread(relayed.client.receive) == b""
    assert await relayed.closed == "ended"


async def test_a_worker_that_has_closed_its_direction_still_gets_everything(new_relay):
    relayed = await new_relay()
    relayed.worker.send(b"that was all")
    relayed.worker.close_notify()
    if relayed.worker.tls is None:
        relayed.worker.fin()  # with TLS, close_notify alone ends the direction
    assert await asyncio.to_thread(relayed.client.receive) == b"that was all"
    up = os.urandom(3 * MEGABYTE)
    *_, received = await in_threads((relayed.client.send, up), (relayed.worker.receive, len(up)))
    assert received == up
    relayed.client.close_notify()
    assert await asyncio.to_thread(relayed.worker.receive) == b""
    assert await relayed.closed == "ended"


async def test_a_fin_without_close_notify_also_ends_the_direction(new_relay):
    relayed = await new_relay()
    relayed.client.send(b"and gone")
    relayed.client.fin()
    assert await asyncio.to_thread(relayed.worker.receive) == b"and gone"
    relayed.worker.send(b"goodbye")
    relayed.worker.close()
    assert await asyncio.to_thread(relayed.client.receive) == b"goodbye"
    assert await relayed.closed == "ended"


async def test_bytes_after_close_notify_are_ignored(new_relay):
    relayed = await new_relay()
    relayed.client.close_notify()
    relayed.client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert await asyncio.to_thread(relayed.worker.receive) == b""
    relayed.worker.fin()
    assert await relayed.closed == "ended"


async def test_a_half_open_connection_is_closed_after_the_timeout(new_relay):
    relayed = await new_relay(half_open_timeout=0.05)
    relayed.client.close_notify()
    assert await relayed.closed == "half-open for too long"
    assert await asyncio.to_thread(relayed.client.receive) == b""


async def test_a_reset_of_the_client_reaches_the_worker(new_relay, worker_family):
    relayed = await new_relay()
    relayed.client.send(b"x")
    await asyncio.to_thread(relayed.worker.receive, 1)
    relayed.client.reset()
    assert await relayed.closed == "client: Connection reset by peer"
    with pytest.raises(ConnectionResetError) if worker_family != "unix" else contextlib.nullcontext():
        assert await asyncio.to_thread(relayed.worker.receive) == b""


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)  # a Unix socket has no reset
async def test_a_reset_of_the_worker_reaches_the_client(new_relay):
    relayed = await new_relay()
    relayed.worker.reset()
    assert await relayed.closed == "worker: Connection reset by peer"
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(relayed.client.receive)


@pytest.mark.parametrize("worker_family", ["unix"], indirect=True)  # a reset discards unread bytes
async def test_the_last_bytes_of_a_worker_that_no_longer_reads_are_delivered(new_relay):
    relayed = await new_relay()
    relayed.worker.sock.shutdown(socket.SHUT_RD)
    relayed.client.send(b"are you there?")
    while not relayed.endpoints[1].stream.write_closed:  # noqa: ASYNC110 - a relay does not report this
        await asyncio.sleep(0)
    relayed.worker.send(b"I am dying")
    relayed.worker.close()
    assert await asyncio.to_thread(relayed.client.receive) == b"I am dying"
    assert await relayed.closed == "ended"


async def test_a_broken_record_is_answered_with_an_alert_and_both_connections_end(new_relay):
    relayed = await new_relay()
    relayed.client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert (await relayed.closed).startswith("client: TLS failed")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
        await asyncio.to_thread(relayed.client.receive)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.to_thread(relayed.worker.receive) == b""


async def test_a_stopped_relay_sends_close_notify(new_relay):
    relayed = await new_relay()
    relayed.relay.stop("drained")
    for peer in (relayed.client, relayed.worker):
        assert await asyncio.to_thread(peer.receive) == b""
        assert peer.close_notify_received or not peer.tls
    assert await relayed.closed == "drained"


async def test_an_internal_error_closes_both_sockets_and_reaches_the_loops_exception_handler(new_relay, monkeypatch):
    relayed = await new_relay()
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context["exception"]))

    def fail(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr("bkpool.gateway.net.duplex.DuplexRelay.received", fail)
    relayed.client.send(b"x")
    assert await relayed.closed == "an internal fault"
    assert isinstance(errors[0], ZeroDivisionError)


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)
async def test_close_notify_is_passed_on_in_both_directions(new_relay):
    relayed = await new_relay()
    relayed.client.close_notify()
    assert await asyncio.to_thread(relayed.worker.receive) == b""
    assert relayed.worker.close_notify_received, "the direction ended with close_notify"
    relayed.worker.close_notify()
    assert await asyncio.to_thread(relayed.client.receive) == b""
    assert relayed.client.close_notify_received
    assert await relayed.closed == "ended"


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)
async def test_a_broken_record_of_the_worker_is_answered_with_an_alert_and_resets_the_client(new_relay):
    relayed = await new_relay()
    relayed.worker.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert (await relayed.closed).startswith("worker: TLS failed")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
        await asyncio.to_thread(relayed.worker.receive)
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(relayed.client.receive)


async def test_a_reset_whose_error_a_send_has_taken_is_reported_as_a_hang_up():
    near, far = tcp_pair()
    reported = asyncio.get_running_loop().create_future()
    watcher = SocketErrorWatcher(asyncio.get_running_loop())
    watcher.watch(near, reported.set_result)
    Peer(far).reset()
    assert sees_hangup(Peer(near))  # the reset has come, with its error
    near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert await reported is False
    watcher.forget(near)
    watcher.close()
    near.close()
