"""Two real peers and a relay between them: every byte arrives, and every kind of end is passed on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl

import pytest

from bkpool.gateway.net.buffers import PLAINTEXT_CHUNK

MEGABYTE = 1024 * 1024


async def in_threads(*calls):
    return await asyncio.gather(*(asyncio.to_thread(*call) for call in calls))


def digest(data):
    return hashlib.sha256(data).hexdigest()


async def test_bytes_pass_both_ways_at_once_unchanged(new_joined):
    joined = await new_joined()
    up, down = os.urandom(12 * MEGABYTE), os.urandom(12 * MEGABYTE)
    *_, heard_down, heard_up = await in_threads(
        (joined.client.send, up),
        (joined.worker.send, down),
        (joined.client.receive, len(down)),
        (joined.worker.receive, len(up)),
    )
    assert digest(heard_up) == digest(up)
    assert digest(heard_down) == digest(down)
    client = joined.legs[0].stream
    assert (client.bytes_in, client.bytes_out) == (len(up), len(down))


async def test_what_the_client_said_before_is_said_first(new_joined):
    joined = await new_joined(first=b"early, ")
    joined.client.send(b"and late")
    assert await asyncio.to_thread(joined.worker.receive, 15) == b"early, and late"


async def test_single_bytes_pass_without_delay(new_joined):
    joined = await new_joined()
    for byte in b"one by one":
        joined.client.send(bytes([byte]))
        assert await asyncio.to_thread(joined.worker.receive, 1) == bytes([byte])
        joined.worker.send(bytes([byte]))
        assert await asyncio.to_thread(joined.client.receive, 1) == bytes([byte])


@pytest.mark.parametrize("writer", ["client", "worker"])
async def test_a_slow_reader_stops_the_writer_and_memory_stays_bounded(new_joined, writer):
    joined = await new_joined()
    fast, slow = (joined.client, joined.worker) if writer == "client" else (joined.worker, joined.client)
    data = os.urandom(PLAINTEXT_CHUNK)
    said, turns_without_progress = hashlib.sha256(), 0
    total, rest = 0, b""
    fast.sock.setblocking(False)
    while turns_without_progress < 50:
        if not rest:
            said.update(data)
            total += len(data)
            if fast.tls:
                fast.tls.encrypt(memoryview(data))
            rest = fast.tls.take() if fast.tls else data
        try:
            rest = rest[fast.sock.send(rest) :]
            turns_without_progress = 0
        except BlockingIOError:
            turns_without_progress += 1
        await asyncio.sleep(0)
    assert sum(len(leg.stream.unsent) for leg in joined.legs) <= 2 * PLAINTEXT_CHUNK
    fast.sock.settimeout(20)
    heard, _ = await in_threads((slow.receive, total), (fast.sock.sendall, rest))
    assert digest(heard) == said.hexdigest()


async def test_a_client_that_has_ended_still_gets_everything(new_joined):
    joined = await new_joined()
    up, down = os.urandom(MEGABYTE), os.urandom(3 * MEGABYTE)
    *_, heard = await in_threads((joined.client.send, up), (joined.worker.receive, len(up)))
    assert heard == up
    joined.client.say_end()
    assert await asyncio.to_thread(joined.worker.receive) == b""
    *_, heard = await in_threads((joined.worker.send, down), (joined.client.receive, len(down)))
    assert heard == down
    joined.worker.say_end()
    joined.worker.fin()
    assert await asyncio.to_thread(joined.client.receive) == b""
    assert await joined.over == "ended"


async def test_a_worker_that_has_ended_still_gets_everything(new_joined):
    joined = await new_joined()
    joined.worker.send(b"that was all")
    joined.worker.say_end()
    if joined.worker.tls is None:
        joined.worker.fin()  # of TLS, close_notify alone is an end
    assert await asyncio.to_thread(joined.client.receive) == b"that was all"
    up = os.urandom(3 * MEGABYTE)
    *_, heard = await in_threads((joined.client.send, up), (joined.worker.receive, len(up)))
    assert heard == up
    joined.client.say_end()
    assert await asyncio.to_thread(joined.worker.receive) == b""
    assert await joined.over == "ended"


async def test_a_fin_without_close_notify_is_an_end_too(new_joined):
    joined = await new_joined()
    joined.client.send(b"and gone")
    joined.client.fin()
    assert await asyncio.to_thread(joined.worker.receive) == b"and gone"
    joined.worker.send(b"goodbye")
    joined.worker.close()
    assert await asyncio.to_thread(joined.client.receive) == b"goodbye"
    assert await joined.over == "ended"


async def test_what_follows_a_close_notify_is_ignored(new_joined):
    joined = await new_joined()
    joined.client.say_end()
    joined.client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert await asyncio.to_thread(joined.worker.receive) == b""
    joined.worker.fin()
    assert await joined.over == "ended"


async def test_a_half_open_connection_does_not_live_for_ever(new_joined):
    joined = await new_joined(half_open=0.05)
    joined.client.say_end()
    assert await joined.over == "half-open for too long"
    assert await asyncio.to_thread(joined.client.receive) == b""


async def test_a_reset_of_the_client_reaches_the_worker(new_joined, worker_family):
    joined = await new_joined()
    joined.client.send(b"x")
    await asyncio.to_thread(joined.worker.receive, 1)
    joined.client.reset()
    assert await joined.over == "client: Connection reset by peer"
    with pytest.raises(ConnectionResetError) if worker_family != "unix" else contextlib.nullcontext():
        assert await asyncio.to_thread(joined.worker.receive) == b""


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)  # a Unix socket has no reset
async def test_a_reset_of_the_worker_reaches_the_client(new_joined):
    joined = await new_joined()
    joined.worker.reset()
    assert await joined.over == "worker: Connection reset by peer"
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(joined.client.receive)


@pytest.mark.parametrize("worker_family", ["unix"], indirect=True)  # a reset takes unread words with it
async def test_the_last_words_of_a_worker_that_listens_no_more_are_delivered(new_joined):
    joined = await new_joined()
    joined.worker.sock.shutdown(socket.SHUT_RD)
    joined.client.send(b"are you there?")
    while not joined.legs[1].stream.write_closed:  # noqa: ASYNC110 - a relay tells nobody of this
        await asyncio.sleep(0)
    joined.worker.send(b"I am dying")
    joined.worker.close()
    assert await asyncio.to_thread(joined.client.receive) == b"I am dying"
    assert await joined.over == "ended"


async def test_a_broken_record_is_answered_with_an_alert_and_ends_both(new_joined):
    joined = await new_joined()
    joined.client.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert (await joined.over).startswith("client: TLS failed")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
        await asyncio.to_thread(joined.client.receive)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.to_thread(joined.worker.receive) == b""


async def test_a_stopped_relay_says_goodbye(new_joined):
    joined = await new_joined()
    joined.relay.stop("drained")
    for peer in (joined.client, joined.worker):
        assert await asyncio.to_thread(peer.receive) == b""
        assert peer.ended_well or not peer.tls
    assert await joined.over == "drained"


async def test_a_fault_of_our_own_closes_both_sockets_and_is_told_to_the_loop(new_joined, monkeypatch):
    joined = await new_joined()
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))

    def broken(*_given):
        raise ZeroDivisionError

    monkeypatch.setattr("bkpool.gateway.net.duplex.DuplexRelay.received", broken)
    joined.client.send(b"x")
    assert await joined.over == "an internal fault"
    assert isinstance(told[0], ZeroDivisionError)


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)
async def test_the_ends_of_tls_are_said_to_both_sides(new_joined):
    joined = await new_joined()
    joined.client.say_end()
    assert await asyncio.to_thread(joined.worker.receive) == b""
    assert joined.worker.ended_well, "the end was a close_notify"
    joined.worker.say_end()
    assert await asyncio.to_thread(joined.client.receive) == b""
    assert joined.client.ended_well
    assert await joined.over == "ended"


@pytest.mark.parametrize("worker_family", ["tls"], indirect=True)
async def test_a_broken_record_of_the_worker_is_answered_with_an_alert_and_resets_the_client(new_joined):
    joined = await new_joined()
    joined.worker.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert (await joined.over).startswith("worker: TLS failed")
    with pytest.raises(ssl.SSLError, match=r"(?i)alert.bad.record.mac"):
        await asyncio.to_thread(joined.worker.receive)
    with pytest.raises(ConnectionResetError):
        await asyncio.to_thread(joined.client.receive)
