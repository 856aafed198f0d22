"""Measures what one lease costs in installations of several sizes (bench/installation.py). It is no test.

Each size is measured in a process of its own, which is set up like the appliance's. So the objects of one size are
not in memory while another is measured. It judges nothing.

usage: python -m bench.scale POOLSxEACH SECONDS     It measures one size and prints its figures as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from bench.installation import Filling, Tables, after_one_more_lease, installation
from bench.table import percentile
from bkpool.appliance.garbage import short_pauses
from bkpool.appliance.shutdown import SWITCH_INTERVAL
from bkpool.gateway.control.server import new_loop
from bkpool.store import Store
from bkpool.store.mirror import Mirror

SIZES = "1x10,1x100,1x1000,10x100,100x1,100x10,10x1000,100x100"
"""What is measured if nothing else is asked for: without 100x1000, which takes minutes to make."""
SECONDS = 10.0
_UNMEASURED = 5
"""Leases before the measurement: the first ones import modules."""
_CHANGES, _CHANGES_WITHIN = 21, 300.0


def by_size(sizes: Sequence[Filling], seconds: float) -> list[dict[str, Any]]:
    """Leases workers for this many seconds in an installation of each size."""
    rows = []
    for size in sizes:
        print(f"measuring: leases with {size.pools:,} × {size.each:,} workers", file=sys.stderr)
        command = [sys.executable, "-m", "bench.scale", str(size), str(seconds)]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(done.stdout))
    return rows


async def measured(size: Filling, seconds: float) -> dict[str, Any]:
    """Leases one worker after another for this many seconds. Times are in milliseconds."""
    async with installation(size) as made:
        for _ in range(_UNMEASURED):
            await made.lease()
        looks, tables = len(made.looks.took), made.tables.count
        took: list[float] = []
        cpu, begin = time.process_time(), time.perf_counter()
        while not took or time.perf_counter() - begin < seconds:
            took.append(await made.lease())
        cpu, lasted = time.process_time() - cpu, time.perf_counter() - begin
        looked, tables = made.looks.took[looks:], made.tables.count - tables
    count = len(took)
    return {
        "pools": size.pools,
        "each": size.each,
        "leases": count,
        "p50": percentile(took, 0.5) * 1000,
        "p99": percentile(took, 0.99) * 1000,
        "cpu": cpu / count * 1000,
        "look": statistics.fmean(looked) * 1000,
        "looks": len(looked) / count,
        "table": await one_table(made.store, made.mirror) * 1000,
        "tables": tables / count,
        "rate": count / lasted,
    }


async def one_table(store: Store, full: Mirror) -> float:
    """The seconds from a change of one worker until the gateway has the table, if nothing else happens: the median.

    Args:
        store: Not used, but a mirror has one.
        full: What is in the table.
    """
    mirror, tables, took = Mirror(store), Tables(), []
    for pool in full.pools.values():
        mirror.apply(pool)
    for worker in full.workers.values():
        mirror.apply(worker)
    end = tables.follow(mirror)
    async with asyncio.timeout(_CHANGES_WITHIN):
        while tables.workers < len(full.workers):  # it gets those that there are in parts
            tables.came.clear()
            await tables.came.wait()
        for number, key in zip(range(_CHANGES), itertools.cycle(full.workers), strict=False):
            worker = after_one_more_lease(mirror.workers[key], f"change-{number}")
            tables.came.clear()
            begin = time.perf_counter()
            mirror.apply(worker)
            await tables.came.wait()
            took.append(time.perf_counter() - begin)
    end()
    return statistics.median(took)


def main() -> None:
    """Measures one size."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    sys.setswitchinterval(SWITCH_INTERVAL)
    with short_pauses(), asyncio.Runner(loop_factory=new_loop) as runner:
        print(json.dumps(runner.run(measured(Filling.parse(sys.argv[1]), float(sys.argv[2])))))


if __name__ == "__main__":
    main()
