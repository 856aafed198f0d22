"""Thousands of bad clients at once at a gateway in another process. A good client must be served beside them.

After each test, the fixture `attacked` checks the gateway's descriptors and counters, and serves one more client.
tests/gateway/test_hostile_handshakes.py makes the same attacks with a few clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.hellos import FIRST_BYTES, client_hello
from support.records import RecordClient

THOUSAND = 1000
MEGABYTE = 1024 * 1024


@contextlib.contextmanager
def flood(port, count, first_bytes=b""):
    """Opens so many connections and sends these bytes on each."""
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


# --- unfinished handshakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_bytes", FIRST_BYTES.values(), ids=FIRST_BYTES)
async def test_a_good_client_is_served_within_a_second_beside_a_thousand(attacked, first_bytes):
    with flood(attacked.process.port, THOUSAND, first_bytes):
        await attacked.serves_good_clients()
        assert attacked.process.memory - attacked.memory < THOUSAND * 300 * 1024, (
            "the memory of each connection is limited"
        )


async def test_a_good_client_is_served_within_a_second_beside_a_thousand_that_send_one_byte_per_second(attacked):
    whole = client_hello()
    with flood(attacked.process.port, THOUSAND) as many:
        for second in range(4):
            for sock in many:
                sock.send(whole[second : second + 1])
            await attacked.serves_good_clients()
            await asyncio.sleep(1)  # they send one byte per second


async def test_a_thousand_clients_that_never_leave_are_closed_at_the_deadline(attacked):
    """They have 10 s for the handshake and 2 s to read an alert. Then nothing is left of them in the gateway."""
    with contextlib.ExitStack() as stack:
        each = THOUSAND // len(FIRST_BYTES)
        floods = [stack.enter_context(flood(attacked.process.port, each, sent)) for sent in FIRST_BYTES.values()]
        many = [sock for socks in floods for sock in socks]
        await attacked.serves_good_clients()
        await attacked.wait_until(lambda: count_closed(many) == len(many))
        await attacked.wait_until(lambda: attacked.process.descriptors == attacked.descriptors)


@pytest.mark.parametrize("limits", [{"handshake_timeout": 600.0}], ids=["no deadline in time"])
async def test_the_oldest_connections_are_closed_when_there_are_too_many(attacked):
    """Otherwise a flood would keep a good client out for the time that a handshake may take."""
    with flood(attacked.process.port, 4 * THOUSAND) as many:
        await attacked.serves_good_clients()
        await attacked.wait_until(lambda: count_closed(many) >= THOUSAND)
        assert count_closed(many[-100:]) == 0


async def test_nothing_is_left_of_connections_that_are_reset_at_once(attacked):
    for _ in range(5):
        with flood(attacked.process.port, THOUSAND, client_hello()) as many:
            for sock in many:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await attacked.serves_good_clients()


# --- no file descriptors left ---------------------------------------------------------------------------------------


def accept_pauses(attacked):
    return attacked.process.log.read_text().count("gateway.accept_paused")


async def test_a_flood_that_takes_every_descriptor_stops_accepting_and_nothing_else(attacked):
    """Open connections work, the loop does not spin, and the next client is served after the flood."""
    attacked.process.allow_descriptors(50)
    started_at = asyncio.get_running_loop().time()
    with flood(attacked.process.port, 200):
        await attacked.wait_until(lambda: accept_pauses(attacked) >= 2)
        for _ in range(100):
            await attacked.earlier_client.echo()
        seconds = asyncio.get_running_loop().time() - started_at
        assert accept_pauses(attacked) <= seconds / 0.5 + 1, "it must try again only twice per second"
    async with asyncio.timeout(10):
        (await attacked.served_client()).disconnect()


@pytest.mark.parametrize("limits", [{"handshake_timeout": 1.0}], ids=["one second for a handshake"])
async def test_a_flood_that_holds_every_descriptor_delays_a_good_client_only_briefly(attacked):
    """The first are closed at their deadline. The others and the good client wait in the kernel until then."""
    attacked.process.allow_descriptors(50)
    with flood(attacked.process.port, 120):
        await attacked.wait_until(lambda: accept_pauses(attacked) >= 1)
        async with asyncio.timeout(20):
            (await attacked.served_client()).disconnect()


async def test_a_client_that_got_the_last_descriptor_waits_until_there_is_one_for_its_worker(attacked):
    attacked.process.allow_descriptors(1)
    client = await attacked.client()
    served = asyncio.create_task(client.echo())
    await attacked.wait_until(lambda: attacked.process.descriptors == attacked.descriptors + 1)
    await attacked.earlier_client.echo()
    assert not served.done()
    attacked.process.allow_descriptors(None)
    async with asyncio.timeout(10):
        await served
    client.disconnect()


# --- many KeyUpdates ------------------------------------------------------------------------------------------------

UPDATES = 30_000
"""KeyUpdates of each attacker. Each has 27 bytes, and costs the gateway 20 µs."""
ATTACKERS = 4


@pytest.mark.parametrize("reads", [False, True], ids=["reads nothing", "reads everything"])
@pytest.mark.parametrize("lease", ["bad", "held", None], ids=["relayed", "held", "without a lease"])
async def test_clients_that_only_send_key_updates_are_closed(attacked, tmp_path, lease, reads):
    """They are closed early: all of their KeyUpdates would take 2.4 s. Memory stays limited meanwhile."""
    used = attacked.process.cpu_seconds
    async with key_update_flood(attacked.process, lease, tmp_path, reads=reads) as many:
        (await attacked.served_client()).disconnect()
        await attacked.earlier_client.echo()
        await attacked.wait_until(lambda: count_closed(many) == ATTACKERS)
        assert attacked.process.memory - attacked.memory < 32 * MEGABYTE
    assert attacked.process.cpu_seconds - used < 1.2


@contextlib.asynccontextmanager
async def key_update_flood(process, lease, directory, *, reads):
    """Starts clients that send KeyUpdates and nothing else, as fast as they can. Yields their sockets."""
    context = process.context
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2 * ATTACKERS) as pool:
        attackers = [
            RecordClient(process.port, context(lease), directory / f"keys-{number}") for number in range(ATTACKERS)
        ]
        for attacker in attackers:
            stack.callback(attacker.close)
        key_updates = [attacker.key_updates(UPDATES) for attacker in attackers]
        try:
            for attacker, updates in zip(attackers, key_updates, strict=True):
                pool.submit(send, attacker.sock, updates)
                if reads:
                    pool.submit(read_and_drop, attacker.sock)
            yield [attacker.sock for attacker in attackers]
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
