"""What a process of ours has open and holds in memory, counted from inside, as plain JSON.

It imports nothing of bkpool: objects are told by the module that their class is from, so it need not know, and cannot
miss, in which table somebody keeps a connection. It gives back free memory and empties caches that have a bound:
how full one is says nothing. Else it changes nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

_Cache = type(lru_cache(lambda: None))


def census() -> dict[str, Any]:
    """Descriptors, threads, tasks, resident KiB, and objects of bkpool's own classes by name."""
    empty_caches()
    gc.collect()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    objects = gc.get_objects()
    ours = Counter(
        f"{kind.__module__.removeprefix('bkpool.')}.{kind.__qualname__}"
        for kind in map(type, objects)
        if str(kind.__module__).startswith("bkpool.")
    )
    return {
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) - 1,  # but for the one that lists
        "threads": threading.active_count(),
        "tasks": sum(isinstance(one, asyncio.Task) and not one.done() for one in objects),
        "rss": resident(os.getpid()),
        "objects": dict(ours),
    }


def empty_caches() -> None:
    """Empties every `lru_cache` in bkpool's modules that has a bound; what one without keeps is counted."""
    modules = [module for name, module in sys.modules.copy().items() if name.startswith("bkpool.")]
    for cache in [one for module in modules for one in vars(module).values() if type(one) is _Cache]:
        if cache.cache_parameters()["maxsize"] is not None:
            cache.cache_clear()


def resident(pid: int) -> int:
    """KiB in memory (proc(5), VmRSS)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
