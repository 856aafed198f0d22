"""Clients that begin a handshake and do not mean it, and clients that, once shaken hands with, break TLS's rules.

Whatever they do, a good client comes in meanwhile, and at the end they are gone with everything that was theirs: that
is what `support.attack` holds after each. The thousands of them are in e2e/gateway/test_floods.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.control.server import new_loop
from support import records
from support.attack import attacked_gateway
from support.hellos import FIRST_BYTES, client_hello
from support.loops import LOOPS, SkewedLoop
from support.records import Records

on_each_loop = pytest.mark.parametrize("make_loop", LOOPS.values(), ids=LOOPS)
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
def visitors(port, count):
    """So many connections that say nothing yet."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(count)]


async def heard(sock):
    """All that comes to the end of the connection, however it ends."""
    sock.setblocking(False)
    data = bytearray()
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionResetError):
            while more := await asyncio.get_running_loop().sock_recv(sock, 65536):
                data += more
    return bytes(data)


# --- handshakes that are never finished -----------------------------------------------------------------------------


@on_each_loop
async def test_a_good_client_comes_in_beside_those_that_never_finish(attacked):
    with visitors(attacked.world.port, 5 * len(FIRST_BYTES)) as many:
        for sock, said in zip(many, 5 * list(FIRST_BYTES.values()), strict=True):
            sock.sendall(said)
        await attacked.serve_good_client()


@pytest.mark.parametrize("make_loop", [SkewedLoop], ids=["asyncio"])
async def test_those_that_never_finish_are_gone_at_the_deadline(attacked):
    """Also those that send a byte a second: the deadline is for the whole handshake."""
    world, whole = attacked.world, client_hello()
    with visitors(world.port, len(FIRST_BYTES)) as silent, visitors(world.port, 3) as slow:
        for sock, said in zip(silent, FIRST_BYTES.values(), strict=True):
            sock.sendall(said)
        await world.settle()
        for second in range(9):
            for sock in slow:
                sock.sendall(whole[second : second + 1])
            await world.advance(1)
        slow[0].setblocking(False)
        with pytest.raises(BlockingIOError):  # it is still in its time
            slow[0].recv(1)
        await world.advance(1)
        for sock in (*silent, *slow):
            await heard(sock)
    no_tls = [name for name in FIRST_BYTES if name.startswith("no TLS")]
    assert world.metric("refusals_total", pool="", reason="TlsFailed") == len(no_tls)


@on_each_loop
@pytest.mark.parametrize(
    ("said", "alert"),
    [
        ("no TLS: TLS 1.2", "protocol version"),
        ("no TLS: an oversized record", "record overflow"),
        ("no TLS: data before the handshake", "unexpected message"),
    ],
)
async def test_what_can_be_no_handshake_is_told_so_at_once(attacked, said, alert):
    with visitors(attacked.world.port, 1) as [sock]:
        sock.sendall(FIRST_BYTES[said])
        assert await heard(sock) == b"\x15\3\3\0\2\2" + bytes([ALERT[alert]])
    assert attacked.world.metric("refusals_total", pool="", reason="TlsFailed") == 1


@on_each_loop
@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_clients_that_leave_in_mid_handshake_leave_nothing(attacked, how):
    whole = client_hello()
    with visitors(attacked.world.port, 30) as many:
        for number, sock in enumerate(many):
            sock.sendall(whole[: (0, 1, 5, 100, None)[number % 5]])
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            else:
                sock.shutdown(socket.SHUT_WR)
        for sock in many if how == "fin" else ():
            await heard(sock)


# --- after the handshake: what TLS does not allow -------------------------------------------------------------------


def shaken_hands(world, name, tmp_path):
    """A client with the certificate of this lease, whether that is one or not."""
    context = world.ca.client_context(world.certificate(world.token(name)))
    return asyncio.to_thread(Records, world.port, context, tmp_path / f"keylog-{name}")


@pytest.fixture
async def attacker(attacked, tmp_path):
    """It has a lease of its own, and the second of the two places."""
    attacked.world.lease("a")
    attacked.allowed_connections += 1
    attacker = await shaken_hands(attacked.world, "a", tmp_path)
    await asyncio.to_thread(attacker.echo, b"like any other")
    yield attacker
    attacker.close()


def sealed(kind, data, padding=0):
    return lambda out: out.seal(kind, data, padding)


def tampered(out):
    record = out.seal(records.APPLICATION_DATA, b"as it was sent")
    return record[:-1] + bytes([record[-1] ^ 1])


FORBIDDEN = {
    "renegotiation": (lambda out: out.seal(records.HANDSHAKE, client_hello()[5:]), "unexpected message"),
    "a certificate unasked": (sealed(records.HANDSHAKE, b"\x0b\0\0\4\0\0\0\0"), "unexpected message"),
    "Finished twice": (sealed(records.HANDSHAKE, b"\x14\0\0\x30" + bytes(48)), "unexpected message"),
    "a ticket from a client": (sealed(records.HANDSHAKE, b"\4\0\0\5" + bytes(5)), "unexpected message"),
    "a KeyUpdate of no kind": (sealed(records.HANDSHAKE, b"\x18\0\0\1\2"), "illegal parameter"),
    "a KeyUpdate too long": (sealed(records.HANDSHAKE, b"\x18\0\0\2\1\1"), "illegal parameter"),
    "two KeyUpdates in a record": (sealed(records.HANDSHAKE, records.KEY_UPDATE * 2), "unexpected message"),
    "a record of nothing but padding": (sealed(0, b"", 20), "unexpected message"),
    "a record tampered with": (tampered, "bad record mac"),
    "a record sent twice": (lambda out: (one := out.seal(records.HANDSHAKE, b"")) + one, None),
    "an oversized record": (lambda out: b"\x17\3\3\x42\0" + bytes(0x4200), "record overflow"),
    "too much in a record": (sealed(records.APPLICATION_DATA, bytes(16385)), "record overflow"),
    "data in the clear": (lambda out: b"\x17\3\3\0\x20" + bytes(32), "bad record mac"),
    "ChangeCipherSpec": (lambda out: b"\x14\3\3\0\1\1", "unexpected message"),
    "an alert of no kind": (sealed(records.ALERT, b"\7\7\7"), None),
    "many warnings": (lambda out: b"".join(out.seal(records.ALERT, b"\1\x5a") for _ in range(10)), None),
    "many empty records": (lambda out: b"".join(out.seal(23, b"") for _ in range(100)), None),
}
"""What is sent, and with which alert it ends; None: with any."""


@pytest.mark.parametrize(("make", "alert"), FORBIDDEN.values(), ids=FORBIDDEN)
async def test_what_tls_forbids_ends_that_connection_in_an_alert(attacker, make, alert):
    attacker.sock.sendall(make(attacker.out))
    kind, said = await asyncio.to_thread(attacker.hear)
    assert (kind, said[:1]) == (records.ALERT, b"\2")
    assert alert is None or said[1] == ALERT[alert]
    assert await asyncio.to_thread(attacker.hear) == (0, b"")


async def test_a_fatal_alert_ends_the_connection_and_the_workers(attacker):
    attacker.sock.sendall(attacker.out.seal(records.ALERT, b"\2\x2a"))
    while (await asyncio.to_thread(attacker.hear))[0]:
        pass


@on_each_loop
async def test_new_keys_are_taken_and_given(attacker):
    """What RFC 8446 section 4.6.3 allows, a client may do: one after gigabytes, and a few at once."""
    for count in (1, 1, 5):
        attacker.sock.sendall(attacker.storm(count))
        await asyncio.to_thread(attacker.echo, b"with new keys")
    assert attacker.updates == 7


async def test_keys_that_are_renewed_without_asking_for_any_are_taken(attacker):
    for _ in range(3):
        attacker.sock.sendall(attacker.out.seal(records.HANDSHAKE, records.KEY_UPDATE))
        attacker.out.update()
        await asyncio.to_thread(attacker.echo, b"with new keys")
    assert attacker.updates == 0


# --- a KeyUpdate storm ----------------------------------------------------------------------------------------------


@on_each_loop
@pytest.mark.parametrize("whose", ["relayed", "held", "refused"])
async def test_a_storm_of_key_updates_harms_nobody_else(new_world, capfd, make_loop, tmp_path, whose):
    """Of a client that reads none of the answers. To be cut for it is fine, and so is to be served."""
    async with attacked_gateway(new_world, capfd, make_loop=make_loop, connections=3) as attacked:
        if whose != "refused":
            attacked.world.lease(
                "a", **({} if whose == "relayed" else {"endpoint": None, "wait_reason": "it is starting"})
            )
        attacker = await shaken_hands(attacked.world, "a", tmp_path)
        if whose == "relayed":
            await asyncio.to_thread(attacker.echo, b"like any other")
            attacked.allowed_connections += 1
        with contextlib.closing(attacker), contextlib.suppress(ConnectionError):
            for _ in range(3):
                await asyncio.to_thread(attacker.sock.sendall, attacker.storm(1000))
                await attacked.serve_good_client()


# --- caps: a slot is somebody's, or free ----------------------------------------------------------------------------


async def test_those_refused_for_the_cap_of_a_lease_take_nobodys_place(new_world):
    world = await new_world(connections_per_lease=1, connections=3)
    first = await world.connect(world.lease("a"))
    await first.echo(b"x")
    for _ in range(5):
        assert (await (await world.connect(world.token("a"))).call())[0] == 8
    for name in "bc":
        await (await world.connect(world.lease(name))).echo(b"there is room in all")
    first.writer.transport.abort()
    await world.wait_until(lambda: world.metric("active_connections") == 2)
    await (await world.connect(world.token("a"))).echo(b"one place, and one only")
    assert (await (await world.connect(world.token("a"))).call())[0] == 8


async def test_connections_of_one_pool_are_bounded_and_other_pools_have_their_own(new_world):
    """However many leases of the pool they are of; and the place comes back."""
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
    await (await world.connect(world.lease("c"))).echo(b"in the place of the first")
    assert (await (await world.connect(world.lease("a"))).call())[0] == 8


@pytest.mark.parametrize("bound", ["connections_per_lease", "connections_per_pool", "connections"])
@pytest.mark.parametrize("how", ["left while it was held", "its lease ended while it was held", "its worker died"])
async def test_the_place_of_a_client_comes_back_however_it_ends(new_world, bound, how):
    world = await new_world(**{bound: 1})
    held = "held" in how
    last = await world.connect(
        world.lease("a", **({"endpoint": None, "wait_reason": "it is starting"} if held else {}))
    )
    await world.wait_until(lambda: world.registry.calls != [])
    if not held:
        await last.echo(b"x")
    assert (await (await world.connect(world.token("a"))).call())[0] == 8, "there is one place"
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
