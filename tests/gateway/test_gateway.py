"""Clients, a gateway in its thread and a worker: what is relayed, and what is refused with which sentence."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import socket
import ssl
from datetime import timedelta
from functools import partial

import pytest

from bkpool.core import tokens
from bkpool.core.errors import EXIT, Forbidden, Gone, HostFault, Unavailable
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, Worker, new_worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.control.server import Gateway, new_loop
from bkpool.gateway.session.connection import Connection
from bkpool.store.sqlite import SqliteStore

MINUTE = timedelta(minutes=1)


async def test_a_client_with_a_lease_reaches_its_worker_and_h2_is_selected(world):
    streams = await world.connect(world.lease())
    assert streams.writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
    assert streams.writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    await streams.echo(b"hello")
    assert world.registry.calls == [("register", "allocation-a")]
    assert world.metric("connections_total", status="success") == 1
    assert world.metric("active_connections") == 1


@pytest.mark.parametrize("lease", ["a lease", "no lease"])
async def test_a_closed_connection_is_freed_without_the_garbage_collector(world, lease):
    """Its TLS is 30 KiB, and a full collection is rare."""
    worker = world.lease()
    streams = await world.connect(worker if lease == "a lease" else world.token("unknown"))
    gc.disable()
    try:
        if lease == "a lease":
            await streams.echo(b"hello")
        else:
            await streams.reader.read(1)
        assert [one for one in gc.get_objects() if isinstance(one, Connection)]
        streams.writer.transport.abort()
        await world.wait_until(lambda: not [one for one in gc.get_objects() if isinstance(one, Connection)])
    finally:
        gc.enable()


async def test_a_client_without_alpn_is_served_too(world):
    streams = await world.connect(world.lease(), alpn=False)
    assert streams.writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
    await streams.echo(b"hello")


async def test_no_session_is_offered_for_resumption(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    assert not streams.writer.get_extra_info("ssl_object").session.has_ticket


async def test_a_foreign_client_certificate_fails_in_tls(world, foreign_ca):
    world.lease()
    streams = await world.connect(certificate=foreign_ca.client(world.token("a")))
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca|signature"):
        await streams.reader.read()
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason="TlsFailed") == 1)


async def test_a_certificate_for_servers_fails_in_tls(world):
    streams = await world.connect(certificate=world.ca.server())
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.certificate"):
        await streams.reader.read()


async def test_tls_1_2_is_refused(world):
    context = world.ca.client_context(world.certificate(world.lease()))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        await asyncio.open_connection("127.0.0.1", world.port, ssl=context, server_hostname="localhost")


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda w: None, 16, "this gateway needs a client certificate. Run `bkpool allocate` and use"),
        (lambda w: w.ca.client(w.token("unknown")), 16, "no lease has the token of this client certificate. Run"),
        (
            lambda w: w.ca.client(w.token("a"), usage=None),
            16,
            "does not belong to a lease: it is not for TLS clients",
        ),
        (lambda w: w.ca.issue("alloc:short"), 16, "does not belong to a lease: its subject contains no lease token"),
        (lambda w: w.ca.client(w.token("a"), ends=w.now() - MINUTE), 16, "expired at 2026-01-01 11:59:00 UTC. Run"),
        (
            lambda w: w.ca.client(w.token("a"), begins=w.now() + MINUTE),
            16,
            "not valid before 2026-01-01 12:01:00 UTC",
        ),
    ],
)
async def test_an_unusable_certificate_is_refused_with_a_sentence(world, make, code, sentence):
    world.lease()
    streams = await world.connect(certificate=make(world))
    answer = await streams.call()
    assert answer[0] == code
    assert sentence in answer[1]
    assert streams.goaway
    assert world.worker_connections == 0
    assert world.registry.calls == []


@pytest.mark.parametrize(
    ("reason", "code", "sentence"),
    [
        (EndReason.RELEASED, 16, "the lease was released. Run `bkpool allocate` again."),
        (EndReason.EXPIRED, 16, "the lease has expired. Run `bkpool allocate` again."),
        (EndReason.ABANDONED, 16, "the lease was abandoned. Run `bkpool allocate` again."),
        (EndReason.REVOKED, 16, "the lease was revoked by the admin. Run `bkpool allocate` again."),
        (
            EndReason.LOST,
            9,
            "the lease ended because its worker failed: out of memory – 5 times. Run `bkpool allocate` again.",
        ),
    ],
)
async def test_a_client_of_an_ended_lease_gets_the_reason(world, reason, code, sentence):
    world.lease()
    messages = {EndReason.LOST: "out of memory – 5 times", EndReason.REVOKED: "by the admin"}
    world.end_lease("a", reason, messages.get(reason, ""))
    streams = await world.connect(world.token("a"))
    assert await streams.call() == (code, sentence)
    assert world.worker_connections == 0


async def test_a_lease_expires_by_the_gateways_own_clock(world):
    token = world.lease()
    await world.advance(3600)
    code, sentence = await (await world.connect(token)).call()
    assert code == 16
    assert sentence == "the lease has expired: it was valid until 13:00:00 UTC. Run `bkpool allocate` again."


async def test_the_worker_is_dialled_only_after_the_registration(world):
    world.registry.may_answer.clear()
    streams = await world.connect(world.lease())
    streams.writer.write(b"early")
    await world.settle()
    assert world.worker_connections == 0
    world.registry.may_answer.set()
    assert await streams.reader.readexactly(5) == b"early"
    assert world.registry.calls == [("register", "allocation-a")]


async def test_the_clients_of_a_lease_share_its_registration(world):
    world.registry.may_answer.clear()
    token = world.lease()
    pair = [await world.connect(token), await world.connect(token)]
    world.registry.may_answer.set()
    for streams in [*pair, await world.connect(token)]:
        await streams.echo(b"x")
    assert world.registry.calls == [("register", "allocation-a")]


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (
            Gone("the lease has ended: another lease holds the worker", hint="Do."),
            16,
            "the lease has ended: another lease holds the worker. Do.",
        ),
        (Unavailable("the store does not answer", hint="Wait."), 9, "the store does not answer. Wait."),
        (RuntimeError("an internal error"), 9, "its store does not answer. Try again in a moment"),
    ],
)
async def test_a_failed_registration_refuses_the_client_and_the_worker_is_not_dialled(world, error, code, sentence):
    world.registry.error = error
    answer = await (await world.connect(world.lease())).call()
    assert answer[0] == code
    assert sentence in answer[1]
    assert world.worker_connections == 0


async def test_a_store_that_does_not_answer_delays_a_client_only_for_the_timeout(new_world):
    world = await new_world(register_timeout=0.05)
    world.registry.may_answer.clear()
    code, sentence = await (await world.connect(world.lease())).call()
    assert code == 9
    assert "its store does not answer" in sentence
    world.registry.may_answer.set()


async def test_a_registered_lease_works_without_the_store_until_its_registration_is_too_old(world):
    token = world.lease()
    await (await world.connect(token)).echo(b"x")
    world.registry.error = Unavailable("the store is away", hint="Wait.")
    await world.advance(45)
    again = await world.connect(token)
    await again.echo(b"from memory")
    await world.advance(10)
    code, _ = await (await world.connect(token)).call()
    assert code == 9
    await again.echo(b"still open")


async def test_a_registration_is_renewed_while_in_use_and_withdrawn_after_the_last_connection(world):
    token = world.lease()
    streams = await world.connect(token)
    await streams.echo(b"x")
    await world.advance(20)
    await world.registry.wait_for_beats(1)
    await streams.echo(b"x")
    await world.advance(20)
    await world.registry.wait_for_beats(2)
    world.lease(end_reason=EndReason.RELEASED)
    await streams.echo(b"draining")
    await world.advance(20)
    await world.registry.wait_for_beats(3)
    streams.writer.close()
    await world.registry.wait_for("withdraw")
    assert world.registry.beats == [{"allocation-a": 1}] * 3
    assert [what for what, _ in world.registry.calls] == ["register", "withdraw"]


async def test_a_registration_without_connections_is_withdrawn_when_the_lease_ends(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    streams.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    await world.advance(30)
    assert world.registry.calls == [("register", "allocation-a")]
    world.end_lease("a", EndReason.RELEASED)
    await world.registry.wait_for("withdraw")


async def test_of_a_lease_that_ends_when_it_is_unused_the_gateway_tells_that_it_is(world):
    token = world.lease(ends_when_unused=True)
    first = await world.connect(token)
    await first.echo(b"x")
    first.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    second = await world.connect(token)  # before the pause is over: nothing is told
    await second.echo(b"x")
    await world.advance(6)
    assert world.registry.connections == [1]
    second.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    await world.advance(6)
    await world.registry.wait_for("renew")
    assert world.registry.connections == [1, 0]
    await world.advance(30)
    assert world.registry.beats == [], "a heartbeat would put off the lease's end"
    third = await world.connect(token)
    await third.echo(b"x")
    await world.registry.wait_for("renew", 2)
    assert world.registry.connections == [1, 0, 1], "told once that it is unused, and at once that it is used again"
    await world.advance(20)
    await world.registry.wait_for_beats(1)
    assert world.registry.beats == [{"allocation-a": 1}]
    world.lease(end_reason=EndReason.RELEASED)
    third.writer.close()
    await world.registry.wait_for("withdraw")
    told = len(world.registry.calls)
    await world.advance(60)
    assert len(world.registry.calls) == told, "a withdrawn registration does not come back"


async def test_that_it_is_unused_is_told_again_when_the_store_is_back(world):
    streams = await world.connect(world.lease(ends_when_unused=True))
    await streams.echo(b"x")
    world.registry.error = Unavailable("the store is away", hint="Wait.")
    streams.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    await world.advance(6)
    await world.registry.wait_for("renew")
    world.registry.error = None
    await world.advance(6)
    await world.registry.wait_for("renew", 2)
    assert world.registry.connections[-1] == 0


async def test_connections_are_cut_at_once_when_another_lease_holds_the_worker(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    world.registry.beat_error = Unavailable("this gateway's heartbeat is refused")
    world.registry.error = Gone("another lease holds the worker", hint="")
    await world.advance(30)
    assert await streams.read_to_end() == b""


async def test_an_ended_lease_drains_and_refuses_new_connections(world):
    token = world.lease()
    streams = await world.connect(token)
    await streams.echo(b"x")
    world.lease(end_reason=EndReason.RELEASED)
    assert (await (await world.connect(token)).call())[0] == 16
    for _ in range(3):
        await world.advance(59)
        await streams.echo(b"still building")
    await world.advance(61)
    assert await streams.read_to_end() == b""


async def test_a_drain_ends_at_the_drain_timeout(world):
    streams = await world.connect(world.lease(drain_timeout=100.0))
    await streams.echo(b"x")
    world.lease(end_reason=EndReason.RELEASED)
    await world.advance(59)
    await streams.echo(b"x")
    await world.advance(42)
    assert await streams.read_to_end() == b""


async def test_a_drain_ends_at_the_maximum_life_of_the_lease(world):
    streams = await world.connect(world.lease(not_after=world.now().timestamp() + 3600 + 30))
    await streams.echo(b"x")
    await world.advance(3600)
    await streams.echo(b"draining")
    await world.advance(31)
    assert await streams.read_to_end() == b""


async def test_a_renewed_lease_does_not_drain(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    await world.advance(3599)
    world.lease(expires_at=world.now().timestamp() + 3600)
    for _ in range(2):
        await world.advance(1000)
    await streams.echo(b"still there")


async def test_a_drain_stops_when_a_renewal_arrives_late(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    await world.advance(3601)
    world.lease(expires_at=world.now().timestamp() + 3600)
    await world.advance(120)
    await streams.echo(b"still there")


async def test_a_held_client_gets_no_byte_and_is_relayed_when_the_worker_is_ready(world):
    streams = await world.connect(world.lease(endpoint=None, wait_reason="it is being started"))
    streams.writer.write(b"preface")
    await world.wait_until(lambda: world.registry.calls != [])
    await world.advance(14)
    assert world.worker_connections == 0
    world.lease(endpoint=world.endpoint)
    assert await streams.reader.readexactly(7) == b"preface"


async def test_a_held_client_may_send_more_than_is_kept_and_loses_no_byte(world):
    streams = await world.connect(world.lease(endpoint=None, wait_reason="it is being started"))
    data = os.urandom(1_000_000)
    streams.writer.write(data)
    await world.wait_until(lambda: world.registry.calls != [])
    world.lease(endpoint=world.endpoint)
    assert await streams.reader.readexactly(len(data)) == data


async def test_the_first_wait_ends_with_unavailable_and_the_second_earlier_with_the_cause(world):
    token = world.lease(endpoint=None, wait_reason="buildkitd: disk full")
    first = await world.connect(token)
    first.start_call()
    await world.wait_until(lambda: world.registry.calls != [])
    await world.settle()
    await world.advance(15)
    code, sentence = await first.call_result()
    assert code == 14
    assert first.goaway
    assert "p-worker-0 is not ready yet: buildkitd: disk full" in sentence

    second = await world.connect(token)
    second.start_call()
    await world.settle()
    await world.advance(12)
    code, sentence = await second.call_result()
    assert code == 9
    assert "did not become ready in time: buildkitd: disk full" in sentence

    third = await world.connect(token)
    third.start_call()
    await world.settle()
    await world.advance(2)
    assert (await third.call_result())[0] == 9


@pytest.mark.parametrize("reason", ["the worker was reached", "a minute"])
async def test_a_wait_is_a_first_one_again_after(world, reason):
    token = world.lease(endpoint=None, wait_reason="buildkitd: disk full")
    for _ in range(2):
        streams = await world.connect(token)
        streams.start_call()
        await world.settle()
        await world.advance(15)
        assert (await streams.call_result())[0] == 14
        if reason == "a minute":
            await world.advance(60)
        else:
            world.lease(endpoint=world.endpoint)
            await (await world.connect(token)).echo(b"up at last")
            world.lease(endpoint=None)


async def test_a_client_held_when_the_lease_ends_is_refused_at_once(world):
    streams = await world.connect(world.lease(endpoint=None, wait_reason="it is being started"))
    streams.start_call()
    await world.wait_until(lambda: world.registry.calls != [])
    world.end_lease("a", EndReason.LOST, "5 failures")
    code, sentence = await streams.call_result()
    assert code == 9
    assert "5 failures" in sentence


async def test_a_worker_that_does_not_accept_is_dialled_again(world, tmp_path):
    late = tmp_path / "late"
    streams = await world.connect(world.lease(endpoint=f"unix://{late}"))
    streams.writer.write(b"hello")
    await world.wait_until(lambda: world.registry.calls != [])
    await world.settle()
    (tmp_path / "w").rename(late)
    await world.advance(0.5)
    assert await streams.reader.readexactly(5) == b"hello"


async def test_the_refusal_after_a_wait_names_the_failed_dial(world, tmp_path):
    streams = await world.connect(world.lease(endpoint=f"unix://{tmp_path}/none"))
    streams.start_call()
    await world.wait_until(lambda: world.registry.calls != [])
    for _ in range(40):
        await world.advance(0.5)
    code, sentence = await streams.call_result()
    assert code == 14
    assert "could not be reached (No such file or directory)" in sentence


async def test_the_end_of_a_worker_reaches_the_client_at_once(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    world.worker_writers[0].transport.abort()
    assert await streams.read_to_end() == b""


async def test_connections_of_one_lease_are_limited_and_slots_are_returned(new_world):
    world = await new_world(connections_per_lease=2)
    token = world.lease()
    pair = [await world.connect(token) for _ in range(2)]
    for streams in pair:
        await streams.echo(b"x")
    code, sentence = await (await world.connect(token)).call()
    assert code == 8
    assert "already has 2 open connections. Run fewer builds" in sentence
    pair[0].writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 1)
    await (await world.connect(token)).echo(b"x")


async def test_all_connections_together_are_limited(new_world):
    world = await new_world(connections=1)
    first = await world.connect(world.lease("a"))
    await first.echo(b"x")
    assert (await (await world.connect(world.lease("b"))).call())[0] == 8
    first.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    await (await world.connect(world.lease("b"))).echo(b"x")


async def test_clients_that_never_complete_a_handshake_do_not_keep_others_out(new_world):
    world = await new_world(pending_connections=8)
    token = world.lease()
    silent = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(40)]
    try:
        await (await world.connect(token)).echo(b"x")
        silent[0].setblocking(False)
        async with asyncio.timeout(60):  # no deadline comes by itself: the clock of the gateway stands still
            assert await asyncio.get_running_loop().sock_recv(silent[0], 1) == b""
    finally:
        for sock in silent:
            sock.close()


async def test_one_address_does_not_close_the_connections_of_another(new_world):
    """Neither those that are in their handshake nor the client with a lease that comes beside the flood."""
    world = await new_world(pending_connections=64, pending_connections_per_address=8)
    token = world.lease()
    with contextlib.ExitStack() as stack:

        def silent(host: str) -> socket.socket:
            opened = socket.create_connection(("127.0.0.1", world.port), source_address=(host, 0))
            opened.setblocking(False)
            return stack.enter_context(opened)

        others = [silent("127.0.0.2") for _ in range(8)]
        many = [silent("127.0.0.1") for _ in range(100)]
        await (await world.connect(token)).echo(b"x")
        async with asyncio.timeout(60):
            for sock in many[:90]:
                assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        for sock in others:
            with pytest.raises(BlockingIOError):
                sock.recv(1)


async def test_a_handshake_has_a_deadline(world):
    with socket.create_connection(("127.0.0.1", world.port)) as sock:
        sock.setblocking(False)
        sock.send(b"\x16\x03")
        await world.settle()
        await world.advance(10)
        assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 5000, b"\x16\x03\x01\xff\xff" + b"x" * 70_000])
async def test_a_client_without_tls_is_closed(world, sent):
    with socket.create_connection(("127.0.0.1", world.port)) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        sock.setblocking(False)
        received = [b"?"]
        with contextlib.suppress(ConnectionResetError):
            while received[-1]:
                received.append(await asyncio.get_running_loop().sock_recv(sock, 4096))


async def test_a_refused_client_without_http2_is_closed(world):
    streams = await world.connect(world.token("unknown"))
    streams.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
    await streams.read_to_end()


async def test_a_refused_client_that_makes_no_call_gets_goaway(world):
    streams = await world.connect(world.token("unknown"))
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason="UnknownLease") == 1)
    await world.advance(10)
    received = await streams.read_to_end()
    assert received.startswith(b"\x00")  # SETTINGS, then GOAWAY


async def test_the_times_of_a_refused_client_are_limits(new_world):
    world = await new_world(refusal_timeout=30.0, linger_timeout=7.0)
    streams = await world.connect(world.token("unknown"))
    await world.wait_until(lambda: world.metric("refusals_total", pool="", reason="UnknownLease") == 1)
    streams.writer.transport.pause_reading()  # so that it does not see the end, and does not close
    pending = partial(world.metrics.registry.get_sample_value, "buildkit_gateway_pending_connections")
    for seconds in (29, 1, 6):
        await world.advance(seconds)
        assert pending() == 1
    await world.advance(1)
    await world.wait_until(lambda: pending() == 0)


async def test_only_new_connections_get_a_new_certificate(world, foreign_ca):
    token = world.lease()
    old = await world.connect(token)
    await old.echo(b"x")
    other = world.ca.server()
    world.gateway.set_server_certificate(other.cert, other.key, world.ca.pem)
    new = await world.connect(token)
    assert new.writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == other.der
    await new.echo(b"x")
    await old.echo(b"x")


async def test_a_key_of_another_certificate_is_an_error_and_the_old_one_stays(world):
    one, other = world.ca.server(), world.ca.server()
    with pytest.raises(HostFault) as caught:
        world.gateway.set_server_certificate(one.cert, other.key, world.ca.pem)
    assert caught.value.exit_code == EXIT["Unreadable"]
    await (await world.connect(world.lease())).echo(b"x")


async def test_a_port_in_use_is_an_error_that_says_what_to_do(world):
    second = Gateway(world.registry, now=world.now, metrics=world.metrics)
    server = world.ca.server()
    second.set_server_certificate(server.cert, server.key, world.ca.pem)
    with pytest.raises(HostFault) as caught:
        await second.start([("127.0.0.1", 0), ("127.0.0.1", world.port)])
    assert caught.value.code == "PortTaken"
    assert caught.value.exit_code == EXIT["PortTaken"]
    assert f"port {world.port} on 127.0.0.1 is in use" in caught.value.message


async def test_a_drain_lets_builds_finish_and_accepts_no_client(world):
    token = world.lease()
    held = await world.connect(world.lease("b", endpoint=None, wait_reason="it is being started"))
    streams = await world.connect(token)
    await streams.echo(b"x")
    drained = asyncio.create_task(world.gateway.drain(600))
    assert await held.read_to_end() == b""
    with pytest.raises(ConnectionRefusedError):
        await world.connect(token)
    await streams.echo(b"building")
    assert not drained.done()
    streams.writer.close()
    await drained
    await world.registry.wait_for("withdraw")


async def test_a_drain_has_a_deadline(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    drained = asyncio.create_task(world.gateway.drain(600))
    await world.settle()
    await world.advance(600)
    await drained
    assert await streams.read_to_end() == b""


async def test_a_second_drain_can_cut_at_once(world):
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    first = asyncio.create_task(world.gateway.drain(600))
    await world.settle()
    await world.gateway.drain(0)
    await first
    assert await streams.read_to_end() == b""


@pytest.mark.parametrize("make_loop", [new_loop, asyncio.SelectorEventLoop])
async def test_many_simultaneous_builds_keep_their_bytes(new_world, make_loop):
    world = await new_world(make_loop=make_loop)
    token = world.lease()

    async def build(seed: int) -> None:
        data = hashlib.shake_256(bytes([seed])).digest(300_000)
        streams = await world.connect(token, alpn=bool(seed % 2))
        streams.writer.write(data)
        assert await streams.reader.readexactly(len(data)) == data

    await asyncio.gather(*(build(seed) for seed in range(12)))
    world.worker_writers[0].transport.abort()
    assert (await (await world.connect(world.token("unknown"))).call())[0] == 16


async def test_a_lease_that_is_newer_than_the_table_is_found_and_served(world):
    token = world.token("a")

    def find():
        world.lease()  # the gateway gets a newer table before the answer

    world.registry.on_find = find
    streams = await world.connect(token)
    await streams.echo(b"x")
    assert world.registry.lookups == [hashlib.sha256(token.encode()).hexdigest()]
    await (await world.connect(token)).echo(b"x")
    assert len(world.registry.lookups) == 1, "a known lease is not searched for"


async def test_a_lease_that_is_known_to_have_ended_is_not_searched_for(world):
    world.lease()
    world.end_lease("a", EndReason.RELEASED)
    assert (await (await world.connect(world.token("a"))).call())[0] == 16
    assert world.registry.lookups == []


async def test_a_client_that_disconnects_during_the_search_for_its_lease_frees_everything(world):
    world.registry.may_answer.clear()
    world.registry.on_find = world.lease
    streams = await world.connect(world.token("a"))
    await world.wait_until(lambda: world.registry.lookups != [])
    streams.writer.close()
    await world.gateway.drain(0)
    world.registry.may_answer.set()
    await world.settle()
    assert world.registry.calls == []
    assert world.worker_connections == 0


async def test_a_store_that_refuses_the_search_is_reported_to_the_client(world):
    world.registry.error = Forbidden("pods is forbidden: User cannot list", hint="")
    code, sentence = await (await world.connect(world.token("a"))).call()
    assert code == 9
    assert sentence.startswith("the gateway cannot confirm this lease, because its store does not answer")


async def test_a_gateway_of_one_pool_refuses_the_leases_of_others_with_a_sentence(new_world):
    world = await new_world(pool=Key("default", "p"))
    await (await world.connect(world.lease())).echo(b"x")
    code, sentence = await (await world.connect(world.lease("b", pool=Key("team", "q")))).call()
    assert code == 7
    assert sentence.startswith(
        "this is the gateway of pool default/p, but the client certificate is for a lease of pool team/q."
    )
    assert world.metric("refusals_total", pool="q", reason="WrongPool") == 1
    assert world.worker_connections == 1


async def test_a_registration_contains_the_number_of_connections(world):
    token = world.lease()
    for _ in range(3):
        await (await world.connect(token)).echo(b"x")
    await world.advance(20)
    await world.registry.wait_for_beats(1)
    assert (world.registry.connections, world.registry.beats) == ([1], [{"allocation-a": 3}])
    world.registry.beat_error = Unavailable("this gateway's heartbeat is refused")
    await world.advance(30)
    await world.registry.wait_for("renew")
    assert world.registry.connections == [1, 3]


async def test_an_outdated_table_never_leads_to_a_worker_of_the_next_lease(new_world, worker_lease, now, tmp_path):
    """Rule 10 (docs/rules.md#r10) with the real registry. The gateway gets no newer table."""
    store = await SqliteStore.open(tmp_path / "state.db")
    try:
        registry = StoreLeaseRegistry(store, "gateway-1", lambda: now, lambda _: None)
        world = await new_world(registry=registry)
        token = world.token("a")
        pool = await store.create(Pool(metadata=Metadata(name="p")))
        ours = worker_lease.but(id="allocation-a", token_sha256=tokens.digest(token))
        worker = await store.create(new_worker(Slot("default", "p", 0), pool, ours, {}))
        world.lease(worker_uid=worker.uid)
        streams = await world.connect(token)
        await streams.echo(b"ours")
        streams.writer.close()
        await world.wait_until(lambda: world.metric("active_connections") == 0)
        await world.advance(61)  # the registration has expired, here and for all others
        worker = await store.get(Worker, "default", "p-worker-0")
        await store.replace(worker.with_lease(worker_lease.but(id="allocation-b", token_sha256="another")))
        code, sentence = await (await world.connect(token)).call()
        assert code == 16
        assert sentence.startswith("the lease has ended: it does not hold worker default/p-worker-0 any more")
        assert world.worker_connections == 1
    finally:
        await world.gateway.close()
        await store.close()
