"""Thousands of bad clients at once at a gateway in another process. A good client must be served beside them.

After each test, the fixture `attacked` checks the gateway's descriptors and counters, and serves one more client.
tests/gateway/test_hostile_handshakes.py makes the same attacks with a few clients.

No test measures how fast this machine is. Most put the gateway's deadlines out of reach, so what happens does not
happen because of a deadline. Costs are CPU time, compared with that of other work at the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.hellos import FIRST_BYTES, client_hello
from support.records import RecordClient

THOUSAND = 1000
MEGABYTE = 1024 * 1024
OUT_OF_REACH = 600.0
"""Seconds: longer than each test."""
NO_DEADLINES = dict.fromkeys(("handshake_timeout", "linger_timeout", "refusal_timeout", "first_wait"), OUT_OF_REACH)
without_deadlines = pytest.mark.parametrize("limits", [NO_DEADLINES], ids=["no deadline"])
with_room_for_all = pytest.mark.parametrize(
    "limits",
    [NO_DEADLINES | {"pending_connections": 4 * THOUSAND, "pending_connections_per_address": 4 * THOUSAND}],
    ids=["no deadline, room for all"],
)


@contextlib.contextmanager
def flood(port, count, first_bytes=b""):
    """Opens this many connections and sends these bytes on each."""
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
        for sock in many:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):  # the gateway has closed it already
                sock.send(first_bytes)
        yield many


def count_closed(many):
    """Returns how many connections the gateway has closed."""
    poll = select.poll()
    for sock in many:
        poll.register(sock, select.POLLRDHUP)
    return len(poll.poll(0))


def accept_pauses(attacked):
    return attacked.process.log.read_text().count("gateway.accept_paused")


# --- unfinished handshakes ------------------------------------------------------------------------------------------


@with_room_for_all
@pytest.mark.parametrize("first_bytes", FIRST_BYTES.values(), ids=FIRST_BYTES)
async def test_good_clients_are_served_beside_a_thousand_bad_ones_that_cost_less(attacked, first_bytes):
    """Good clients do not wait until the bad ones are gone, and a bad one uses less CPU time than a good one."""
    good = await attacked.cpu_seconds_of_a_good_client()
    before = attacked.process.cpu_seconds
    with flood(attacked.process.port, THOUSAND, first_bytes):
        await attacked.serves_good_clients()
        assert attacked.process.descriptors >= attacked.descriptors + THOUSAND, "the bad clients are still there"
        await attacked.wait_until(lambda: not attacked.process.unread)
        assert attacked.process.cpu_seconds - before < THOUSAND * good
        assert attacked.process.memory - attacked.memory < THOUSAND * 300 * 1024, (
            "the memory of each connection is limited"
        )
    assert accept_pauses(attacked) == 0


@with_room_for_all
async def test_good_clients_are_served_beside_a_thousand_that_send_single_bytes(attacked):
    whole = client_hello()
    with flood(attacked.process.port, THOUSAND) as many:
        for number in range(4):
            for sock in many:
                sock.send(whole[number : number + 1])
            await attacked.serves_good_clients()
            await attacked.wait_until(lambda: not attacked.process.unread)
        assert count_closed(many) == 0


async def test_a_thousand_clients_that_never_leave_are_closed_at_the_deadline(attacked):
    """They have 10 s for the handshake and 2 s to read an alert. Then nothing is left of them in the gateway."""
    with contextlib.ExitStack() as stack:
        each = THOUSAND // len(FIRST_BYTES)
        floods = [stack.enter_context(flood(attacked.process.port, each, sent)) for sent in FIRST_BYTES.values()]
        many = [sock for socks in floods for sock in socks]
        await attacked.wait_until(lambda: count_closed(many) == len(many))
        await attacked.wait_until(lambda: attacked.process.descriptors == attacked.descriptors)


@without_deadlines
async def test_the_oldest_connections_are_closed_when_there_are_too_many(attacked):
    """Otherwise a flood would keep a good client out for the time that a handshake may take."""
    with flood(attacked.process.port, 4 * THOUSAND) as many:
        await attacked.serves_good_clients()
        await attacked.wait_until(lambda: count_closed(many) >= THOUSAND)
        assert count_closed(many[-100:]) == 0


@without_deadlines
async def test_nothing_is_left_of_connections_that_are_reset_at_once(attacked):
    for _ in range(5):
        with flood(attacked.process.port, THOUSAND, client_hello()) as many:
            for sock in many:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await attacked.serves_good_clients()


# --- no file descriptors left ---------------------------------------------------------------------------------------


@without_deadlines
async def test_a_flood_that_takes_every_descriptor_stops_accepting_and_nothing_else(attacked):
    """Open connections work, the loop does not spin, and the next client is served after the flood."""
    attacked.process.allow_descriptors(50)
    started_at = asyncio.get_running_loop().time()
    with flood(attacked.process.port, 200):
        await attacked.wait_until(lambda: accept_pauses(attacked) >= 2)
        for _ in range(100):
            await attacked.earlier_client.echo()
        pauses = accept_pauses(attacked)
        seconds = asyncio.get_running_loop().time() - started_at
        assert pauses <= seconds / 0.5 + 1, "it must try again only twice per second"
    (await attacked.served_client()).disconnect()


@pytest.mark.parametrize("limits", [{"handshake_timeout": 8.0}], ids=["eight seconds for a handshake"])
async def test_a_good_client_is_served_when_the_first_of_a_flood_are_closed(attacked):
    """The flood has every descriptor. Its first clients are closed at their deadline, and it does not get more.

    The others and the good client wait in the kernel until then.
    """
    attacked.process.allow_descriptors(10)
    with flood(attacked.process.port, 15) as many:
        await attacked.wait_until(lambda: accept_pauses(attacked) >= 1)
        assert count_closed(many) == 0
        (await attacked.served_client()).disconnect()


@without_deadlines
async def test_a_client_that_got_the_last_descriptor_waits_until_there_is_one_for_its_worker(attacked):
    attacked.process.allow_descriptors(1)
    client = await attacked.client()
    served = asyncio.create_task(client.echo())
    await attacked.wait_until(lambda: attacked.process.descriptors == attacked.descriptors + 1)
    await attacked.earlier_client.echo()
    assert not served.done()
    attacked.process.allow_descriptors(None)
    await served
    client.disconnect()


# --- many KeyUpdates ------------------------------------------------------------------------------------------------

UPDATES = 30_000
"""KeyUpdates of each attacker. Each has 27 bytes, and costs the gateway more CPU time than making it did."""
ATTACKERS = 4


@without_deadlines
@pytest.mark.parametrize("reads", [False, True], ids=["reads nothing", "reads everything"])
@pytest.mark.parametrize("lease", ["bad", "held", None], ids=["relayed", "held", "without a lease"])
async def test_clients_that_only_send_key_updates_are_closed(attacked, tmp_path, lease, reads):
    """They are closed early, so most of their KeyUpdates cost the gateway nothing. Memory stays limited meanwhile."""
    async with key_update_flood(attacked.process, lease, tmp_path, reads=reads) as (many, used, made_in):
        (await attacked.served_client()).disconnect()
        await attacked.earlier_client.echo()
        await attacked.wait_until(lambda: count_closed(many) == ATTACKERS)
        assert attacked.process.memory - attacked.memory < 32 * MEGABYTE
    assert attacked.process.cpu_seconds - used < made_in / 4


@contextlib.asynccontextmanager
async def key_update_flood(process, lease, directory, *, reads):
    """Starts clients that send KeyUpdates and nothing else, as fast as they can.

    Yields their sockets, the CPU seconds that the gateway has used before, and those for making the KeyUpdates.
    """
    context = process.context
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2 * ATTACKERS) as pool:
        attackers = [
            RecordClient(process.port, context(lease), directory / f"keys-{number}") for number in range(ATTACKERS)
        ]
        for attacker in attackers:
            stack.callback(attacker.close)
        began = time.process_time()
        key_updates = [attacker.key_updates(UPDATES) for attacker in attackers]
        made_in = time.process_time() - began
        used = process.cpu_seconds
        try:
            for attacker, updates in zip(attackers, key_updates, strict=True):
                pool.submit(send, attacker.sock, updates)
                if reads:
                    pool.submit(read_and_drop, attacker.sock)
            yield [attacker.sock for attacker in attackers], used, made_in
        finally:
            for attacker in attackers:
                with contextlib.suppress(OSError):
                    attacker.sock.shutdown(socket.SHUT_RDWR)


def send(sock, data):
    with contextlib.suppress(OSError):
        sock.sendall(data)


def read_and_drop(sock):
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass
