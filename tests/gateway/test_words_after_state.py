"""A log that fails ends nothing: each line follows the change that it tells of. And whose fault a failed dial is."""

from __future__ import annotations

import asyncio
import contextlib
import resource

import pytest
import structlog

from bkpool.core.worker import EndReason
from bkpool.gateway.net.dial import PlainDial


class NoSpaceLeft(Exception):
    """What this log raises."""


@pytest.fixture
async def full_disk(world):
    """Lets every line of the log fail, and takes what then reaches the loops."""
    configured = structlog.get_config()
    written = []

    def fail(_logger, _level, entry):
        written.append(entry["event"])
        raise NoSpaceLeft

    structlog.configure(processors=[fail], cache_logger_on_first_use=False)
    try:
        yield written
        await world.settle()
    finally:
        structlog.configure(**configured)
    assert {type(error["exception"]) for error in world.loop_errors} <= {NoSpaceLeft}
    world.loop_errors.clear()


async def test_a_closed_connection_gives_everything_back_though_its_line_is_not_written(world, full_disk):
    client = await world.connect(world.lease())
    await client.echo(b"as usual")
    client.writer.transport.abort()
    await world.wait_until(lambda: world.metric("active_connections") == 0)
    await world.settle()
    assert "connection.closed" in full_disk
    [thread] = world.gateway._threads
    assert not thread.shard._admitted
    assert not thread.shard._pending


async def test_a_refusal_is_answered_though_its_line_is_not_written(world, full_disk):
    assert (await (await world.connect()).call())[0] == 16
    await world.settle()
    assert "connection.refused" in full_disk


async def test_the_end_of_a_lease_reaches_all_its_connections_though_no_line_is_written(world, full_disk):
    token = world.lease(drain_timeout=5.0)
    clients = [await world.connect(token) for _ in range(3)]
    for client in clients:
        await client.echo(b"as usual")
    world.end_lease("a", EndReason.RELEASED)
    await world.settle()
    assert full_disk.count("connection.draining") == 3
    await world.advance(5)
    for client in clients:
        await client.read_to_end()
    await world.registry.wait_for("withdraw")


@contextlib.contextmanager
def no_descriptors_left():
    """Sets the limit of this process so low that nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_dial_without_a_descriptor_is_the_fault_of_the_gateway(new_world):
    """The limit is real: it is lowered for each dial, so that the test itself can still connect."""

    def dial(*arguments):
        with no_descriptors_left():
            return PlainDial(*arguments)

    world = await new_world(dial=dial)
    client = await world.connect(world.lease())
    client.start_call()
    await world.wait_until(world.holds_client)
    for _ in range(31):
        await world.advance(0.5)
    async with asyncio.timeout(60):
        code, message = await client.call_result()
    assert code == 14
    assert message.startswith(
        "the gateway has no resources left to connect to worker default/p-worker-0: Too many open"
    )
    assert world.metric("refusals_total", reason="NoCapacity") == 1
    assert world.metric("dial_seconds_count", outcome="exhausted") > 1
    assert world.metric("dial_seconds_count", outcome="failed") == 0
