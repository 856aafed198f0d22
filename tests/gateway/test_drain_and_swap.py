"""The ends of leases and of the gateway, and changes of its certificate, while streams are open and busy.

That each of them works for one quiet stream is in test_gateway.py; here many are open, and bytes are under way.
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


def lease_ends(world, how):
    """Releases the only lease, or lets it expire by the clock."""
    if how == "release":
        world.lease(end_reason=EndReason.RELEASED)
    return world.advance(SOON if how == "expiry" else 0)


# --- ends of leases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["release", "expiry"])
@pytest.mark.parametrize("speaker", ["client", "worker"])
async def test_of_the_streams_of_an_ended_lease_the_silent_are_cut_and_the_busy_go_on_to_the_last(
    world, how, speaker
):
    """A byte a minute in one direction is enough; a stream that ended by itself holds nobody up; nobody is let in;
    and the worker is given back with the last of them."""
    token = world.lease(expires_at=world.now().timestamp() + SOON)
    busy, silent, leaving = [await world.connect(token) for _ in range(3)]
    for streams in (busy, silent, leaving):
        await streams.echo(b"x")
    await lease_ends(world, how)
    leaving.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 2)
    for _ in range(4):
        await world.advance(MINUTE - 10)
        if speaker == "client":
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
async def test_who_waits_for_a_worker_when_its_lease_ends_is_told_and_who_is_relayed_drains(world, how):
    token = world.lease(expires_at=world.now().timestamp() + SOON)
    relayed = await world.connect(token)
    await relayed.echo(b"x")
    world.lease(endpoint=None, wait_reason="it is being started")
    waiting = await world.connect(token)
    waiting.start_call()
    await world.wait_until(world.holds_client)
    await lease_ends(world, how)
    code, sentence = await waiting.call_result()
    assert code == 16
    assert "Run `bkpool allocate` again." in sentence
    await relayed.echo(b"still building")


# --- drains ---------------------------------------------------------------------------------------------------------


class Build:
    """A stream that sends and gets back, in pieces, until it is told that this is enough."""

    def __init__(self, streams, seed):
        self._streams = streams
        self._data = hashlib.shake_256(bytes([seed])).digest(40 * KILOBYTE)
        self.rounds = 0
        self.enough = False

    async def run(self):
        async with asyncio.timeout(20):
            while not self.enough:
                await self._streams.echo(self._data)
                self.rounds += 1
        self._streams.writer.close()


async def builds(world, count=BUSY):
    """So many busy streams, each of which has moved bytes."""
    token = world.lease()
    made = [Build(await world.connect(token), seed) for seed in range(count)]
    tasks = [asyncio.create_task(build.run()) for build in made]
    await moved(world, made)
    return made, tasks


async def moved(world, made):
    """Every one of them has got further."""
    rounds = [build.rounds for build in made]
    await world.wait_until(lambda: all(build.rounds > before for build, before in zip(made, rounds, strict=True)))


@pytest.fixture(params=[new_loop, asyncio.SelectorEventLoop], ids=["uvloop", "asyncio"])
async def busy_world(request, new_world):
    return await new_world(make_loop=request.param)


async def test_a_drain_under_load_takes_no_byte_from_any_stream_and_ends_with_the_last(busy_world):
    made, tasks = await builds(busy_world)
    drained = asyncio.create_task(busy_world.gateway.drain(600))
    await moved(busy_world, made)
    with pytest.raises(ConnectionRefusedError):
        await busy_world.connect(busy_world.token("a"))
    for build in made[1:]:
        build.enough = True
    await asyncio.gather(*tasks[1:])
    await moved(busy_world, made[:1])
    assert not drained.done()
    made[0].enough = True
    await asyncio.gather(*tasks)
    await drained
    await busy_world.registry.wait_for("withdraw")


async def test_the_deadline_of_a_drain_ends_busy_streams_too(busy_world):
    _, tasks = await builds(busy_world)
    drained = asyncio.create_task(busy_world.gateway.drain(0.05))
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, (asyncio.IncompleteReadError, ConnectionError)) for end in ends), ends
    await drained
    assert busy_world.metric("active_connections") == 0


# --- certificates ---------------------------------------------------------------------------------------------------


async def test_no_connection_fails_while_the_certificate_is_changed_again_and_again(busy_world):
    """New ones see the one or the other, verified; open streams never notice."""
    world = busy_world
    made, tasks = await builds(world, 2)
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
    await moved(world, made)
    for build in made:
        build.enough = True
    await asyncio.gather(*tasks)
    assert world.metric("refusals_total", reason="TlsFailed") == world.metric("refusals_total") == 0
    assert world.metric("connections_total", status="success") == 2 + AT_ONCE * EACH


async def test_a_certificate_may_change_during_a_drain_which_ends_as_it_would_have(busy_world):
    made, tasks = await builds(busy_world, 2)
    drained = asyncio.create_task(busy_world.gateway.drain(600))
    for _ in range(3):
        one = busy_world.ca.server()
        busy_world.gateway.set_server_certificate(one.cert, one.key, busy_world.ca.pem)
        await moved(busy_world, made)
    with pytest.raises(ConnectionRefusedError):
        await busy_world.connect(busy_world.token("a"))
    for build in made:
        build.enough = True
    await asyncio.gather(*tasks)
    await drained
