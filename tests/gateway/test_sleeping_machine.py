"""A machine that sleeps while it has connections: the wall clock jumps, and the clock of the loops stands still.

Both clocks are injected. A time namespace (time_namespaces(7)) cannot make a wall clock jump.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from bkpool.core.wall_clock import LONGEST_SLEEP
from bkpool.core.worker import EndReason


async def sleep(world, hours):
    """The machine sleeps, wakes up, and looks at the clock again."""
    world.skew += timedelta(hours=hours)
    for loop in world.loops:
        loop.call_soon_threadsafe(loop.advance, LONGEST_SLEEP)
    await world.settle()


async def test_a_lease_that_expired_in_its_sleep_drains_as_soon_as_the_machine_is_awake(world):
    """A silent connection is cut a minute later, as at any other end."""
    streams = await world.connect(world.lease())
    await streams.echo(b"x")
    await sleep(world, 2)
    await world.advance(61)
    assert await streams.read_to_end() == b""


@pytest.mark.parametrize("ended_before", [True, False])
async def test_a_lease_whose_whole_life_passed_in_its_sleep_is_cut(world, ended_before):
    token = world.lease(drain_timeout=1e6)
    streams = await world.connect(token)
    await streams.echo(b"x")
    if ended_before:
        world.lease(end_reason=EndReason.RELEASED)
        await world.settle()
    await streams.echo(b"still building")
    await sleep(world, 25)
    assert await streams.read_to_end() == b""


async def test_a_registration_of_before_the_sleep_is_not_relied_on(world):
    """Another lease may hold the worker by now: the rest of the cluster was awake."""
    token = world.lease(expires_at=world.now().timestamp() + 1e6)
    await (await world.connect(token)).echo(b"x")
    world.skew += timedelta(hours=2)
    await (await world.connect(token)).echo(b"x")
    assert [what for what, _ in world.registry.calls].count("register") == 2
