"""Thousands of bad clients at once at a gateway that is a process of its own: a good one is served beside them.

What each attack takes is given back: that is what the fixture `attacked` holds after each, by the gateway's own
descriptors, by its counters and by a client that comes last. The same attacks one by one are in
tests/gateway/test_hostile_handshakes.py.
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
    """So many connections that have said this."""
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(count)]
        for sock in many:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):  # it is refused already
                sock.send(first_bytes)
        yield many


def closed_by_now(many):
    """How many the gateway has ended."""
    poll = select.poll()
    for sock in many:
        poll.register(sock, select.POLLRDHUP)
    return len(poll.poll(0))


# --- handshakes that are never finished -----------------------------------------------------------------------------


@pytest.mark.parametrize("first_bytes", FIRST_BYTES.values(), ids=FIRST_BYTES)
async def test_a_good_client_is_served_within_a_second_beside_a_thousand(attacked, first_bytes):
    with flood(attacked.served.port, THOUSAND, first_bytes):
        await attacked.served_soon()
        assert attacked.served.memory - attacked.memory < THOUSAND * 300 * 1024, "what one takes is bounded"


async def test_a_good_client_is_served_within_a_second_beside_a_thousand_that_send_a_byte_a_second(attacked):
    whole = client_hello()
    with flood(attacked.served.port, THOUSAND) as many:
        for second in range(4):
            for sock in many:
                sock.send(whole[second : second + 1])
            await attacked.served_soon()
            await asyncio.sleep(1)  # is what they do


async def test_a_thousand_that_stay_are_all_gone_when_their_time_is_over(attacked):
    """10 s for a handshake, and 2 s to read an alert; then nothing is left of them, though they never went."""
    with contextlib.ExitStack() as stack:
        each = THOUSAND // len(FIRST_BYTES)
        floods = [
            stack.enter_context(flood(attacked.served.port, each, first_bytes))
            for first_bytes in FIRST_BYTES.values()
        ]
        many = [sock for those in floods for sock in those]
        await attacked.served_soon()
        await attacked.until(lambda: closed_by_now(many) == len(many))
        await attacked.until(lambda: attacked.served.descriptors == attacked.descriptors)


@pytest.mark.parametrize("limits", [{"handshake_timeout": 600.0}], ids=["no deadline helps"])
async def test_of_more_than_there_is_room_for_the_oldest_go(attacked):
    """So a flood cannot keep a good client out for as long as a handshake may take."""
    with flood(attacked.served.port, 4 * THOUSAND) as many:
        await attacked.served_soon()
        await attacked.until(lambda: closed_by_now(many) >= THOUSAND)
        assert closed_by_now(many[-100:]) == 0


async def test_connections_that_are_reset_at_once_leave_nothing(attacked):
    for _ in range(5):
        with flood(attacked.served.port, THOUSAND, client_hello()) as many:
            for sock in many:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await attacked.served_soon()


# --- no descriptor left ---------------------------------------------------------------------------------------------


def pauses(attacked):
    return attacked.served.log.read_text().count("gateway.accept_paused")


async def test_a_flood_to_the_last_descriptor_stops_accepting_and_nothing_else(attacked):
    """What is open goes on, the loop does not spin, and when the flood is over the next client is served."""
    attacked.served.allow(50)
    begun = asyncio.get_running_loop().time()
    with flood(attacked.served.port, 200):
        await attacked.until(lambda: pauses(attacked) >= 2)
        for _ in range(100):
            await attacked.bystander.echo()
        passed = asyncio.get_running_loop().time() - begun
        assert pauses(attacked) <= passed / 0.5 + 1, "it asks again twice a second"
    async with asyncio.timeout(10):
        (await attacked.served_client()).leave()


@pytest.mark.parametrize("limits", [{"handshake_timeout": 1.0}], ids=["a second for a handshake"])
async def test_a_flood_that_stays_at_the_last_descriptor_keeps_nobody_out_for_long(attacked):
    """The first are gone at their deadline; the others had been waiting in the kernel, and so had the good one."""
    attacked.served.allow(50)
    with flood(attacked.served.port, 120):
        await attacked.until(lambda: pauses(attacked) >= 1)
        async with asyncio.timeout(20):
            (await attacked.served_client()).leave()


async def test_who_took_the_last_descriptor_is_held_until_there_is_one_for_its_worker(attacked):
    attacked.served.allow(1)
    client = await attacked.client()
    served = asyncio.create_task(client.echo())
    await attacked.until(lambda: attacked.served.descriptors == attacked.descriptors + 1)
    await attacked.bystander.echo()
    assert not served.done()
    attacked.served.allow(None)
    async with asyncio.timeout(10):
        await served
    client.leave()


# --- a KeyUpdate storm ----------------------------------------------------------------------------------------------

UPDATES = 30_000
"""Of each attacker: 27 bytes to be sent, and 20 µs of the gateway's time for each."""
ATTACKERS = 4


@pytest.mark.parametrize("reads", [False, True], ids=["and read nothing", "and read all"])
@pytest.mark.parametrize("lease", ["bad", "held", None], ids=["relayed", "held", "without a lease"])
async def test_who_does_nothing_but_ask_for_new_keys_is_sent_away(attacked, tmp_path, lease, reads):
    """Before it has cost the others much: all of it would be 2.4 s of the gateway. Memory is bounded meanwhile."""
    used = attacked.served.processor_seconds
    async with storm(attacked.served, lease, tmp_path, reads=reads) as many:
        (await attacked.served_client()).leave()
        await attacked.bystander.echo()
        await attacked.until(lambda: closed_by_now(many) == ATTACKERS)
        assert attacked.served.memory - attacked.memory < 32 * MEGABYTE
    assert attacked.served.processor_seconds - used < 1.2


@contextlib.asynccontextmanager
async def storm(served, lease, directory, *, reads):
    """Clients that say nothing else, as fast as they can: their sockets."""
    context = served.context
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2 * ATTACKERS) as pool:
        attackers = [
            RecordClient(served.port, context(lease), directory / f"keys-{number}") for number in range(ATTACKERS)
        ]
        for attacker in attackers:
            stack.callback(attacker.close)
        storms = [attacker.key_updates(UPDATES) for attacker in attackers]
        try:
            for attacker, updates in zip(attackers, storms, strict=True):
                pool.submit(blow, attacker.sock, updates)
                if reads:
                    pool.submit(swallow, attacker.sock)
            yield [attacker.sock for attacker in attackers]
        finally:
            for attacker in attackers:
                with contextlib.suppress(OSError):
                    attacker.sock.shutdown(socket.SHUT_RDWR)


def blow(sock, storm):
    with contextlib.suppress(OSError):
        sock.sendall(storm)


def swallow(sock):
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass
