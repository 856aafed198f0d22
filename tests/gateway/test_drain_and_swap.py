"""The end of leases and of the gateway, and changes of its certificate, while connections are open and busy.

test_gateway.py tests each of them with one idle connection. Here many are open, and bytes are being relayed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os

import pytest

from bkpool.core.worker import EndReason
from bkpool.gateway.control.server import new_loop

MINUTE, SOON = 60, 5
KILOBYTE = 1024
BUSY, AT_ONCE, EACH = 8, 4, 6


def end_lease(world, how):
    """Releases the only lease, or lets it expire by the clock."""
    if how == "release":
        world.lease(end_reason=EndReason.RELEASED)
    return world.advance(SOON if how == "expiry" else 0)


# --- ends of leases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["release", "expiry"])
@pytest.mark.parametrize("sender", ["client", "worker"])
async def test_silent_connections_of_an_ended_lease_are_cut_and_busy_ones_continue_to_their_end(world, how, sender):
    """A byte a minute in one direction is enough. New connections are refused, and a connection that ended by itself
    delays nothing. The registration is withdrawn after the last one."""
    token = world.lease(expires_at=world.now().timestamp() + SOON)
    busy, silent, leaving = [await world.connect(token) for _ in range(3)]
    for streams in (busy, silent, leaving):
        await streams.echo(b"x")
    await end_lease(world, how)
    leaving.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 2)
    for _ in range(4):
        await world.advance(MINUTE - 10)
        if sender == "client":
            await busy.echo(b"still building")
        else:
            world.worker_writers[0].write(b"still building")
            assert await busy.reader.readexactly(14) == b"still building"
    assert await silent.read_to_end() == b""
    assert (await (await world.connect(token)).call())[0] == 16
    assert "withdraw" not in dict(world.registry.calls)
    busy.writer.close()
    await world.registry.wait_for("withdraw")


@pytest.mark.parametrize("how", ["release", "expiry"])
async def test_at_the_end_of_a_lease_a_held_client_is_refused_and_a_relayed_one_drains(world, how):
    token = world.lease(expires_at=world.now().timestamp() + SOON)
    relayed = await world.connect(token)
    await relayed.echo(b"x")
    world.lease(endpoint=None, wait_reason="it is being started")
    waiting = await world.connect(token)
    waiting.start_call()
    await world.wait_until(world.holds_client)
    await end_lease(world, how)
    code, sentence = await waiting.call_result()
    assert code == 16
    assert "Run `bkpool allocate` again." in sentence
    await relayed.echo(b"still building")


# --- drains ---------------------------------------------------------------------------------------------------------


class Build:
    """A connection that sends data and gets it back, again and again, until it is stopped."""

    def __init__(self, streams, seed):
        self._streams = streams
        self._data = hashlib.shake_256(bytes([seed])).digest(40 * KILOBYTE)
        self.rounds = 0
        self.stop = False

    async def run(self):
        async with asyncio.timeout(60):
            while not self.stop:
                await self._streams.echo(self._data)
                self.rounds += 1
        self._streams.writer.close()


async def start_builds(world, count=BUSY):
    """Starts this many busy connections. Each has relayed bytes."""
    token = world.lease()
    builds = [Build(await world.connect(token), seed) for seed in range(count)]
    tasks = [asyncio.create_task(build.run()) for build in builds]
    await wait_for_progress(world, builds)
    return builds, tasks


async def wait_for_progress(world, builds):
    """Waits until each of them has relayed more bytes."""
    rounds = [build.rounds for build in builds]
    await world.wait_until(lambda: all(build.rounds > before for build, before in zip(builds, rounds, strict=True)))


@pytest.fixture(params=[new_loop, asyncio.SelectorEventLoop], ids=["uvloop", "asyncio"])
async def busy_world(request, new_world):
    return await new_world(make_loop=request.param)


async def test_a_drain_under_load_loses_no_byte_and_ends_with_the_last_connection(busy_world):
    builds, tasks = await start_builds(busy_world)
    drained = asyncio.create_task(busy_world.gateway.drain(600))
    await wait_for_progress(busy_world, builds)
    with pytest.raises(ConnectionRefusedError):
        await busy_world.connect(busy_world.token("a"))
    for build in builds[1:]:
        build.stop = True
    await asyncio.gather(*tasks[1:])
    await wait_for_progress(busy_world, builds[:1])
    assert not drained.done()
    builds[0].stop = True
    await asyncio.gather(*tasks)
    await drained
    await busy_world.registry.wait_for("withdraw")


async def test_the_deadline_of_a_drain_cuts_busy_connections_too(busy_world):
    _, tasks = await start_builds(busy_world)
    drained = asyncio.create_task(busy_world.gateway.drain(0.05))
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, (asyncio.IncompleteReadError, ConnectionError)) for end in ends), ends
    await drained
    assert busy_world.metric("active_connections") == 0


# --- certificates ---------------------------------------------------------------------------------------------------


async def test_no_connection_fails_while_the_certificate_changes_again_and_again(busy_world):
    """New connections get one of the two certificates and verify it. Open connections are not affected."""
    world = busy_world
    builds, tasks = await start_builds(world, 2)
    certificates = [world.ca.server(), world.ca.server()]
    seen, swaps = set(), 0

    async def come_and_go():
        for _ in range(EACH):
            streams = await world.connect(world.token("a"))
            seen.add(streams.writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
            await streams.echo(os.urandom(KILOBYTE))
            streams.writer.close()

    coming = [asyncio.create_task(come_and_go()) for _ in range(AT_ONCE)]
    while not all(task.done() for task in coming):
        one = certificates[swaps % 2]
        world.gateway.set_server_certificate(one.cert, one.key, world.ca.pem)
        swaps += 1
        await world.settle()
    await asyncio.gather(*coming)
    assert seen >= {one.der for one in certificates}
    await wait_for_progress(world, builds)
    for build in builds:
        build.stop = True
    await asyncio.gather(*tasks)
    assert world.metric("refusals_total", reason="TlsFailed") == world.metric("refusals_total") == 0
    assert world.metric("connections_total", status="success") == 2 + AT_ONCE * EACH


async def test_a_certificate_may_change_during_a_drain(busy_world):
    builds, tasks = await start_builds(busy_world, 2)
    drained = asyncio.create_task(busy_world.gateway.drain(600))
    for _ in range(3):
        one = busy_world.ca.server()
        busy_world.gateway.set_server_certificate(one.cert, one.key, busy_world.ca.pem)
        await wait_for_progress(busy_world, builds)
    with pytest.raises(ConnectionRefusedError):
        await busy_world.connect(busy_world.token("a"))
    for build in builds:
        build.stop = True
    await asyncio.gather(*tasks)
    await drained
