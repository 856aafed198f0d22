"""Clients that never finish a handshake, and clients that violate TLS after it.

In each test a good client is served meanwhile. Afterwards nothing of the attackers is left: `support.attack` checks
that. e2e/gateway/test_floods.py does the same with thousands of clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.control.server import new_loop
from bkpool.gateway.net.buffers import MAX_READ, SMALL_READ
from bkpool.gateway.net.endpoint import SocketEndpoint
from support import records
from support.attack import attacked_gateway
from support.hellos import FIRST_BYTES, client_hello
from support.loops import SkewedLoop
from support.records import RecordClient

on_each_loop = pytest.mark.parametrize(
    "make_loop",
    [pytest.param(SkewedLoop, marks=pytest.mark.slow, id="asyncio"), pytest.param(new_loop, id="uvloop")],
)
"""The fast suite tries the loop of an appliance."""
ALERT = {"unexpected message": 10, "bad record mac": 20, "record overflow": 22, "illegal parameter": 47}
ALERT |= {"protocol version": 70}  # RFC 8446 section 6


@pytest.fixture
def make_loop():
    return new_loop


@pytest.fixture
async def attacked(new_world, capfd, make_loop):
    async with attacked_gateway(new_world, capfd, make_loop=make_loop) as attacked:
        yield attacked


@contextlib.contextmanager
def connections(port, count):
    """Opens this many connections, which send nothing yet."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(count)]


async def read_to_end(sock):
    """Returns all bytes of the connection, whether it ends well or with a reset."""
    sock.setblocking(False)
    data = bytearray()
    async with asyncio.timeout(60):
        with contextlib.suppress(ConnectionResetError):
            while more := await asyncio.get_running_loop().sock_recv(sock, 65536):
                data += more
    return bytes(data)


# --- unfinished handshakes ------------------------------------------------------------------------------------------


@on_each_loop
async def test_a_good_client_is_served_beside_clients_that_never_finish_their_handshake(attacked):
    with connections(attacked.world.port, 5 * len(FIRST_BYTES)) as many:
        for sock, data in zip(many, 5 * list(FIRST_BYTES.values()), strict=True):
            sock.sendall(data)
        await attacked.serve_good_client()


@pytest.mark.parametrize("make_loop", [SkewedLoop], ids=["asyncio"])
async def test_clients_that_never_finish_their_handshake_are_closed_at_the_deadline(attacked):
    """Also those that send one byte per second: the deadline is for the whole handshake."""
    world, whole = attacked.world, client_hello()
    with connections(world.port, len(FIRST_BYTES)) as silent, connections(world.port, 3) as slow:
        for sock, data in zip(silent, FIRST_BYTES.values(), strict=True):
            sock.sendall(data)
        await world.settle()
        for second in range(9):
            for sock in slow:
                sock.sendall(whole[second : second + 1])
            await world.advance(1)
        slow[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # the deadline has not passed
            slow[0].recv(1)
        await world.advance(1)
        for sock in (*silent, *slow):
            await read_to_end(sock)
    no_tls = [name for name in FIRST_BYTES if name.startswith("no TLS")]
    assert world.metric("refusals_total", pool="", reason="TlsFailed") == len(no_tls)


@on_each_loop
@pytest.mark.parametrize(
    ("first_bytes", "alert"),
    [
        ("no TLS: TLS 1.2", "protocol version"),
        ("no TLS: an oversized record", "record overflow"),
        ("no TLS: data before the handshake", "unexpected message"),
    ],
)
async def test_bytes_that_cannot_be_a_handshake_are_answered_with_an_alert_at_once(attacked, first_bytes, alert):
    with connections(attacked.world.port, 1) as [sock]:
        sock.sendall(FIRST_BYTES[first_bytes])
        assert await read_to_end(sock) == b"\x15\3\3\0\2\2" + bytes([ALERT[alert]])
    assert attacked.world.metric("refusals_total", pool="", reason="TlsFailed") == 1


@on_each_loop
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_nothing_is_left_of_clients_that_leave_during_the_handshake(attacked, how):
    whole = client_hello()
    with connections(attacked.world.port, 30) as many:
        for number, sock in enumerate(many):
            sock.sendall(whole[: (0, 1, 5, 100, None)[number % 5]])
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            else:
                sock.shutdown(socket.SHUT_WR)
        for sock in many if how == "fin" else ():
            await read_to_end(sock)


# --- violations of TLS after the handshake --------------------------------------------------------------------------


def connect_raw(world, name, tmp_path):
    """Connects a client with the certificate of this lease, whether the lease exists or not."""
    context = world.ca.client_context(world.certificate(world.token(name)))
    return asyncio.to_thread(RecordClient, world.port, context, tmp_path / f"keylog-{name}")


@pytest.fixture
async def attacker(attacked, tmp_path):
    """A client with a lease, in the second of the two slots."""
    attacked.world.lease("a")
    attacked.allowed_connections += 1
    attacker = await connect_raw(attacked.world, "a", tmp_path)
    await asyncio.to_thread(attacker.echo, b"a normal client")
    yield attacker
    attacker.close()


def encrypted(kind, data, padding=0):
    return lambda out: out.encrypt(kind, data, padding)


def tampered(out):
    record = out.encrypt(records.APPLICATION_DATA, b"as it was sent")
    return record[:-1] + bytes([record[-1] ^ 1])


FORBIDDEN = {
    "renegotiation": (lambda out: out.encrypt(records.HANDSHAKE, client_hello()[5:]), "unexpected message"),
    "a certificate that was not requested": (
        encrypted(records.HANDSHAKE, b"\x0b\0\0\4\0\0\0\0"),
        "unexpected message",
    ),
    "Finished twice": (encrypted(records.HANDSHAKE, b"\x14\0\0\x30" + bytes(48)), "unexpected message"),
    "a ticket from a client": (encrypted(records.HANDSHAKE, b"\4\0\0\5" + bytes(5)), "unexpected message"),
    "a KeyUpdate of an unknown kind": (encrypted(records.HANDSHAKE, b"\x18\0\0\1\2"), "illegal parameter"),
    "a KeyUpdate too long": (encrypted(records.HANDSHAKE, b"\x18\0\0\2\1\1"), "illegal parameter"),
    "two KeyUpdates in a record": (encrypted(records.HANDSHAKE, records.KEY_UPDATE * 2), "unexpected message"),
    "a record that has only padding": (encrypted(0, b"", 20), "unexpected message"),
    "a record tampered with": (tampered, "bad record mac"),
    "a record sent twice": (lambda out: (one := out.encrypt(records.HANDSHAKE, b"")) + one, None),
    "an oversized record": (lambda out: b"\x17\3\3\x42\0" + bytes(0x4200), "record overflow"),
    "too much data in a record": (encrypted(records.APPLICATION_DATA, bytes(16385)), "record overflow"),
    "data without encryption": (lambda out: b"\x17\3\3\0\x20" + bytes(32), "bad record mac"),
    "ChangeCipherSpec": (lambda out: b"\x14\3\3\0\1\1", "unexpected message"),
    "an alert of an unknown kind": (encrypted(records.ALERT, b"\7\7\7"), None),
    "many warnings": (lambda out: b"".join(out.encrypt(records.ALERT, b"\1\x5a") for _ in range(10)), None),
    "many empty records": (lambda out: b"".join(out.encrypt(23, b"") for _ in range(100)), None),
}
"""What is sent, and the alert that answers it; None if any alert may."""


@pytest.mark.parametrize(("make", "alert"), FORBIDDEN.values(), ids=FORBIDDEN)
async def test_a_violation_of_tls_ends_the_connection_with_an_alert(attacker, make, alert):
    attacker.sock.sendall(make(attacker.out))
    kind, alert_bytes = await asyncio.to_thread(attacker.receive)
    assert (kind, alert_bytes[:1]) == (records.ALERT, b"\2")
    assert alert is None or alert_bytes[1] == ALERT[alert]
    assert await asyncio.to_thread(attacker.receive) == (0, b"")


async def test_a_fatal_alert_of_the_client_ends_both_connections(attacker):
    attacker.sock.sendall(attacker.out.encrypt(records.ALERT, b"\2\x2a"))
    while (await asyncio.to_thread(attacker.receive))[0]:
        pass


@on_each_loop
async def test_key_updates_are_accepted_and_answered(attacker):
    """A client may send what RFC 8446 section 4.6.3 allows: single KeyUpdates, and a few at once."""
    for count in (1, 1, 5):
        attacker.sock.sendall(attacker.key_updates(count))
        await asyncio.to_thread(attacker.echo, b"with new keys")
    assert attacker.updates == 7


async def test_key_updates_that_request_none_are_accepted(attacker):
    for _ in range(3):
        attacker.sock.sendall(attacker.out.encrypt(records.HANDSHAKE, records.KEY_UPDATE))
        attacker.out.update()
        await asyncio.to_thread(attacker.echo, b"with new keys")
    assert attacker.updates == 0


# --- many records ---------------------------------------------------------------------------------------------------


async def test_records_with_padding_are_no_attack(attacker):
    """A client may hide the length of its data (RFC 8446 section 5.4). OpenSSL's peers do where they are told to."""
    for padding in (1, 100, 5000, 16000):
        for _ in range(20):
            attacker.sock.sendall(attacker.out.encrypt(records.APPLICATION_DATA, b"x", padding))
    received = b""
    while len(received) < 80:
        received += (await asyncio.to_thread(attacker.receive))[1]
    assert received == b"x" * 80


async def test_key_updates_between_single_bytes_are_an_attack(attacker):
    """Each pair is 50 bytes, and costs the gateway as much as 100 KB of data."""
    attacker.sock.sendall(
        b"".join(attacker.out.encrypt(records.APPLICATION_DATA, b"x") + attacker.key_updates(1) for _ in range(200))
    )
    received = b""
    while len(received) < 200 and (got := await asyncio.to_thread(attacker.receive))[0] == records.APPLICATION_DATA:
        received += got[1]
    assert len(received) < 200, "it is cut"


async def test_records_that_come_with_the_end_of_the_handshake_are_counted_rightly(attacked, tmp_path):
    """The last bytes of the handshake, a record and a part of the next one are in one segment."""
    world = attacked.world
    world.lease("a")
    attacked.allowed_connections += 1
    context = world.ca.client_context(world.certificate(world.token("a")))
    client = await asyncio.to_thread(RecordClient, world.port, context, tmp_path / "keylog", delay_last=True)
    first, second = (client.out.encrypt(records.APPLICATION_DATA, b"x" * 300) for _ in range(2))
    client.sock.sendall(client.unsent + first + second[:100])
    await world.settle()
    client.sock.sendall(
        second[100:] + b"".join(client.out.encrypt(records.APPLICATION_DATA, b"y") for _ in range(500))
    )
    received = b""
    while len(received) < 1100:
        received += (await asyncio.to_thread(client.receive))[1]
    client.close()


async def test_a_client_with_many_small_records_is_read_in_small_steps(attacker, attacked, monkeypatch):
    """So that it does not take a loop's time from others; with larger records it is read in large steps again."""
    steps = []
    receive = SocketEndpoint.receive

    def recorded(endpoint, into):
        if endpoint.stream.tls is not None:
            steps.append(len(into))
        return receive(endpoint, into)

    monkeypatch.setattr(SocketEndpoint, "receive", recorded)
    reading = asyncio.create_task(asyncio.to_thread(read_data, attacker, 20_000))
    await asyncio.to_thread(
        attacker.sock.sendall, b"".join(attacker.out.encrypt(records.APPLICATION_DATA, b"x") for _ in range(20_000))
    )
    await reading
    large = [step for step in steps if step > SMALL_READ]
    assert len(large) <= 1, "the first step, because of what came before"
    assert len(steps) > (23 * 20_000 - MAX_READ) // SMALL_READ
    steps.clear()
    await asyncio.to_thread(attacker.echo, b"as a client sends it" * 500)
    await asyncio.to_thread(attacker.echo, b"as a client sends it" * 500)
    assert max(steps) == MAX_READ


def read_data(client, length):
    while length > 0:
        kind, data = client.receive()
        assert kind == records.APPLICATION_DATA
        length -= len(data)


# --- many KeyUpdates ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@on_each_loop
@pytest.mark.parametrize("state", ["relayed", "held", "refused"])
async def test_thousands_of_key_updates_disturb_no_other_client(new_world, capfd, make_loop, tmp_path, state):
    """The attacker reads none of the answers. The gateway may cut it or serve it."""
    async with attacked_gateway(new_world, capfd, make_loop=make_loop, connections=3) as attacked:
        if state != "refused":
            attacked.world.lease(
                "a", **({} if state == "relayed" else {"endpoint": None, "wait_reason": "it is starting"})
            )
        attacker = await connect_raw(attacked.world, "a", tmp_path)
        if state == "relayed":
            await asyncio.to_thread(attacker.echo, b"a normal client")
            attacked.allowed_connections += 1
        with contextlib.closing(attacker), contextlib.suppress(ConnectionError):
            for _ in range(3):
                await asyncio.to_thread(attacker.sock.sendall, attacker.key_updates(1000))
                await attacked.serve_good_client()


# --- limits: a slot is in use or free -------------------------------------------------------------------------------


async def test_clients_refused_for_the_limit_of_a_lease_take_no_slot(new_world):
    world = await new_world(connections_per_lease=1, connections=3)
    first = await world.connect(world.lease("a"))
    await first.echo(b"x")
    for _ in range(5):
        assert (await (await world.connect(world.token("a"))).call())[0] == 8
    for name in "bc":
        await (await world.connect(world.lease(name))).echo(b"the gateway has slots left")
    first.writer.transport.abort()
    await world.wait_until(lambda: world.metric("active_connections") == 2)
    await (await world.connect(world.token("a"))).echo(b"one slot, and only one")
    assert (await (await world.connect(world.token("a"))).call())[0] == 8


async def test_the_connections_of_each_pool_are_limited_separately(new_world):
    """The limit counts all leases of the pool. A slot is free again after its connection has ended."""
    world = await new_world(connections_per_pool=2)
    other = Key("team", "q")
    first = await world.connect(world.lease("a"))
    for streams in (first, await world.connect(world.lease("b"))):
        await streams.echo(b"x")
    for name in "abc":
        code, sentence = await (await world.connect(world.lease(name))).call()
        assert code == 8
        assert "default/p" in sentence
        assert "2 open connections" in sentence
    assert world.metric("refusals_total", reason="NoCapacity") == 3
    for name in "de":
        await (await world.connect(world.lease(name, pool=other))).echo(b"of another pool")
    assert (await (await world.connect(world.lease("f", pool=other))).call())[0] == 8
    first.writer.transport.abort()
    await world.wait_until(lambda: world.metric("active_connections") == 1)
    await (await world.connect(world.lease("c"))).echo(b"in the slot of the first")
    assert (await (await world.connect(world.lease("a"))).call())[0] == 8


@pytest.mark.parametrize("bound", ["connections_per_lease", "connections_per_pool", "connections"])
@pytest.mark.parametrize("how", ["left while it was held", "its lease ended while it was held", "its worker died"])
async def test_the_slot_of_a_client_is_free_however_its_connection_ends(new_world, bound, how):
    world = await new_world(**{bound: 1})
    held = "held" in how
    last = await world.connect(
        world.lease("a", **({"endpoint": None, "wait_reason": "it is starting"} if held else {}))
    )
    await world.wait_until(lambda: world.registry.calls != [])
    if not held:
        await last.echo(b"x")
    assert (await (await world.connect(world.token("a"))).call())[0] == 8, "there is only one slot"
    match how:
        case "left while it was held":
            last.writer.transport.abort()
        case "its lease ended while it was held":
            last.start_call()
            world.end_lease("a", EndReason.RELEASED)
            assert (await last.call_result())[0] == 16
        case "its worker died":
            world.worker_writers[0].transport.abort()
            await last.read_to_end()
    await world.settle()
    await (await world.connect(world.lease("a", endpoint=world.endpoint))).echo(b"it is free")
