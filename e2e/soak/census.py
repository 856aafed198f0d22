"""Counts from inside what a process of bkpool has open and keeps in memory, as plain JSON.

It imports nothing of bkpool. It finds bkpool's objects by the module of their class, so it does not depend on the
tables that hold them. It returns free memory to the system and empties caches that have a bound, because their size
is no leak. For the same reason it does not count the threads of groups that grow up to a bound. It changes nothing
else.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

_Cache = type(lru_cache(lambda: None))
_RECENTLY_WRITTEN = ("bkpool.store.recent", "RecentlyWritten")
"""The module and name of the class that keeps the last documents that were written, up to a bound."""
_IN_A_GROUP = re.compile(r"asyncio_\d+|.+ \d+")
"""The names of threads of asyncio's default executor, and of `bkpool.home.threads`."""


def census() -> dict[str, Any]:
    """Returns descriptors, threads, tasks, resident KiB, and the objects of bkpool's classes by name.

    The permits of all semaphores are counted down from 0, because only those that are free are known.
    """
    empty_caches()
    gc.unfreeze()  # the appliance sets apart what has survived a collection, and does so again after this one
    forget_recent_documents(gc.get_objects())
    gc.collect()
    gc.unfreeze()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    objects = gc.get_objects()
    ours = Counter(
        f"{kind.__module__.removeprefix('bkpool.')}.{kind.__qualname__}"
        for kind in map(type, objects)
        if str(kind.__module__).startswith("bkpool.")
    )
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # without the one that lists the directory
        "threads": count_threads([thread.name for thread in threading.enumerate()]),
        "tasks": sum(isinstance(one, asyncio.Task) and not one.done() for one in objects),
        "permits that are not free": -sum(one._value for one in objects if type(one) is asyncio.Semaphore),
        "rss": resident(os.getpid()),
        "objects": dict(ours),
    }


def count_threads(names: Iterable[str]) -> int:
    """Counts threads by their names, without those of groups: a group makes a thread when it finds none free.

    The threads of one group are numbered up to a bound. So the second thread of a name belongs to a group that was
    made again and not ended, and is counted.
    """
    named = Counter(names)
    return sum(count - (_IN_A_GROUP.fullmatch(name) is not None) for name, count in named.items())


def empty_caches() -> None:
    """Empties every `lru_cache` with a bound in bkpool's modules.

    A cache without a bound is not emptied, so its content is counted.
    """
    modules = [module for name, module in sys.modules.copy().items() if name.startswith("bkpool.")]
    for cache in [one for module in modules for one in vars(module).values() if type(one) is _Cache]:
        if cache.cache_parameters()["maxsize"] is not None:
            cache.cache_clear()


def forget_recent_documents(objects: Iterable[object]) -> None:
    """Empties the tables of the last documents. How many of them are of which kind says nothing about leaks."""
    for one in objects:
        kind = type(one)
        if (kind.__module__, kind.__qualname__) == _RECENTLY_WRITTEN:
            vars(one)["_by_text"].clear()


def resident(pid: int) -> int:
    """Returns the resident memory in KiB (proc(5), VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
