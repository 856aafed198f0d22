"""Caches of slots beyond the pool's maximum: the real controller and store, and workers in memory."""

from __future__ import annotations

from contextlib import suppress

from bkpool.core.errors import Conflict
from bkpool.core.pool import Pool
from support.world import ANN, BOB, POOL, World, running_world


async def set_max(world: World, most: int) -> None:
    """Changes the maximum, and waits until the controller has seen it."""
    while True:
        pool = await world.store.get(Pool, *POOL)
        with suppress(Conflict):  # the controller writes its status
            scaling = pool.spec.scaling.but(max=most)
            changed = await world.store.replace(pool.but(spec=pool.spec.but(scaling=scaling)))
            break
    generation = changed.metadata.generation
    await world.until(lambda: world.replicas[0].mirror.pools[POOL].status.observed_generation == generation)


def beyond(world: World) -> list[int]:
    status = world.replicas[0].mirror.pools[POOL].status
    return [number for group in status.caches_beyond_max for number in group.slots]


async def test_a_lower_maximum_costs_a_cache_only_after_the_delay_and_never_while_it_is_leased(tmp_path):
    async with running_world(tmp_path) as world:
        await world.pool(scaling={"max": 3, "scaleDownDelay": "15m"})
        replica, caches = world.replicas[0], world.runtime.cache_owners
        first, second = await replica.allocate(ANN), await replica.allocate(BOB)
        await replica.leases.release(first.token)
        assert (first.worker.slot.number, second.worker.slot.number) == (0, 1)

        await set_max(world, 1)
        world.clock.advance(minutes=30)
        assert beyond(world) == []
        assert len(caches) == 2, "it is leased"

        await replica.leases.release(second.token)
        await world.until(lambda: beyond(world) == [1])
        world.clock.advance(minutes=14)
        await set_max(world, 2)
        await world.until(lambda: beyond(world) == [])
        world.clock.advance(minutes=30)
        assert len(caches) == 2, "the maximum was raised in time"

        await set_max(world, 1)
        await world.until(lambda: beyond(world) == [1])
        world.clock.advance(minutes=14)
        await set_max(world, 1)
        assert len(caches) == 2
        world.clock.advance(minutes=1)
        await world.until(lambda: [slot.number for slot in caches] == [0])
        await world.until(lambda: beyond(world) == [])
