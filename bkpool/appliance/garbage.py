"""Keeps the pauses of Python's garbage collector short, however many objects there are.

A full collection goes through all objects, and meanwhile no thread moves a byte: with 3,000 workers 0.2 s, every few
seconds. So an object that has survived one is set apart (`gc.freeze`) and not gone through again. It is freed as
usual when nothing refers to it any more; only cycles of such objects stay, until memory has grown.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

THRESHOLDS = 700, 5, 0
"""After how many objects, and collections of younger ones, Python collects. A full collection then has at most about
8,000 objects to go through; with Python's own 10 and 10 it would be 90,000."""
CHECK_INTERVAL = 60.0
"""Seconds between two looks at the memory."""
_SOME = 64 * 1024 * 1024
"""Bytes by which a process may grow in any case."""


@contextmanager
def short_pauses() -> Iterator[None]:
    """Sets apart what there is, and later what has survived a full collection, until it is left."""
    before = gc.get_threshold()
    gc.freeze()  # what imports have made lives to the end
    gc.callbacks.append(_after_collection)
    gc.set_threshold(*THRESHOLDS)
    gc.collect()  # Python begins the next full one when a quarter as many are new as this one finds
    try:
        yield
    finally:
        gc.callbacks.remove(_after_collection)
        gc.set_threshold(*before)


def _after_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:  # noqa: PLR2004 - the oldest one
        gc.freeze()


def has_grown(resident: int, after_last: int) -> bool:
    """Whether everything should be gone through, because the memory may have filled with cycles.

    Args:
        resident: Bytes of resident memory now.
        after_last: The same after everything was gone through last.
    """
    return resident > after_last + after_last // 2 + _SOME


def collect_everything() -> None:
    """Goes through all objects once, also those that were set apart. No thread runs meanwhile."""
    gc.unfreeze()
    gc.collect()


def resident_memory() -> int:
    """Bytes of resident memory (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def collect_when_grown(
    *,
    resident: Callable[[], int] = resident_memory,
    collect: Callable[[], None] = collect_everything,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Goes through everything each time the memory has grown by half, until it is cancelled.

    Args:
        resident: Bytes of resident memory.
        collect: Goes through everything.
        pause: Waits that many seconds.
    """
    after_last = resident()
    while True:
        await pause(CHECK_INTERVAL)
        if has_grown(resident(), after_last):
            begin = time.perf_counter()
            collect()
            after_last = resident()
            log.info("memory.collected", seconds=round(time.perf_counter() - begin, 3), resident_bytes=after_last)
