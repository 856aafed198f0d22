"""Drives a large installation (bench/installation.py) and notes which steps of its loops take long. It is no test.

It has 3,000 workers in 100 pools, one of them with 1,000 leases, and 300 requests that wait for one pool. Controller,
allocator, mirror and the gateway's table run in one loop here, so no step of theirs is missed.

usage: python -m bench.busy SECONDS     It prints its figures as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from bench.installation import Filling, Installation, caller, installation, token_of
from bench.loop_steps import recorded
from bkpool.appliance.garbage import short_pauses
from bkpool.core.pool import Pool, PoolSpec

LARGE = Filling(97, 20), Filling(1, 1000, leased=True), Filling(1, 30, leased=True), Filling(1, 30)
"""Pools that are alike, one with 1,000 leases, one that requests wait for, and one more."""
WAITERS = 300
_AT_ONCE = 20
_WITHIN = 300.0

Event = Callable[[Installation], Awaitable[None]]


def by_event(seconds: float) -> list[dict[str, Any]]:
    """Lets all events happen, one after another, in a process of their own."""
    print("measuring: steps of the loops with 3,000 workers in 100 pools", file=sys.stderr)
    command = [sys.executable, "-m", "bench.busy", str(seconds)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def events(seconds: float, waiters: int) -> dict[str, Event]:
    """What happens, in this order: later ones need what earlier ones leave."""
    return {
        f"{_AT_ONCE} callers lease workers of any pool": partial(leases, seconds=seconds),
        f"{waiters} requests wait for one pool": partial(wait_in_a_queue, waiters=waiters),
        "drainTimeout of all leases of a pool changes": change_drain_timeout,
        "all leases of a pool end at once": end_all_leases,
        "max of that pool is lowered to 1": lower_max,
        "the machine has slept": sleep,
        "another replica starts": start_another,
    }


async def measured(fillings: Sequence[Filling], seconds: float, waiters: int) -> list[dict[str, Any]]:
    """The steps while each event happens. Times are in milliseconds."""
    rows = []
    async with installation(*fillings) as made, asyncio.timeout(_WITHIN):
        for what, happen in events(seconds, waiters).items():
            with recorded(but=measured.__qualname__) as steps:
                await happen(made)
                await made.at_rest()
            row = {"what": what, "steps": steps.count, "beyond": steps.beyond.total(), "where": dict(steps.beyond)}
            row |= {"longest": steps.longest * 1000, "longest_what": steps.longest_what}
            rows.append(row | {"collecting": steps.collecting * 1000})
    return rows


async def leases(made: Installation, *, seconds: float) -> None:
    """So many callers lease workers of any pool, one after another, for this many seconds."""
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            await made.lease(caller(number))

    await asyncio.gather(*map(one, range(_AT_ONCE)))


async def wait_in_a_queue(made: Installation, *, waiters: int) -> None:
    """All workers of the pool are leased. Then these leases end, and each request gets a worker in turn."""
    pool = made.leased_pools[1]
    waiting = [asyncio.create_task(made.lease(caller(number), pool)) for number in range(waiters)]
    await until(lambda: made.allocator.waiting(pool.key) == waiters)
    await _release(made, pool)
    await asyncio.gather(*waiting)


async def change_drain_timeout(made: Installation) -> None:
    """The table of the gateway has it for each lease."""
    known, leased = made.tables.workers, len(made.mirror.workers_of(made.leased_pools[0].key))
    await _change(made, made.leased_pools[0], gateway={"drainTimeout": "30m"})
    await until(lambda: made.tables.workers >= known + leased)


async def end_all_leases(made: Installation) -> None:
    """All leases of a pool are released at the same moment."""
    await _release(made, made.leased_pools[0])


async def lower_max(made: Installation) -> None:
    """All its workers but one go."""
    await _change(made, made.leased_pools[0], scaling={"min": 0, "max": 1})
    await until(lambda: len(made.mirror.workers_of(made.leased_pools[0].key)) == 1)


async def sleep(made: Installation) -> None:
    """The clocks have gone apart, so no time that was noted is right."""
    looks = len(made.looks.took)
    made.looks.slept += 3600
    while len(made.looks.took) == looks:
        await made.lease()


async def start_another(made: Installation) -> None:
    """Another replica lists everything, and looks at it."""
    async with made.another_replica():
        pass


async def until(is_so: Callable[[], bool]) -> None:
    """Waits for what nothing reports here."""
    while not is_so():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.05)


async def _release(made: Installation, pool: Pool) -> None:
    held = [worker for worker in made.mirror.workers_of(pool.key) if worker.lease is not None]
    await asyncio.gather(*(made.leases.release(token_of(worker.slot)) for worker in held))
    ids = {worker.held_lease.id for worker in held}
    now = made.mirror.workers
    await until(lambda: not any((lease := now[worker.key].lease) and lease.id in ids for worker in held))


async def _change(made: Installation, pool: Pool, **spec: Any) -> None:
    now = made.mirror.pools[pool.key]
    given = now.spec.model_dump(by_alias=True, exclude_unset=True, mode="json")
    made.mirror.apply(await made.store.replace(now.but(spec=PoolSpec.model_validate({**given, **spec}))))


def main() -> None:
    """Measures."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with short_pauses():
        print(json.dumps(asyncio.run(measured(LARGE, float(sys.argv[1]), WAITERS))))


if __name__ == "__main__":
    main()
