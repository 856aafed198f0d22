"""Takes the file descriptors of the process in which the tests run. They are real ones, under a real limit."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """Leaves this many file descriptors that can still be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + number, hard))
        with suppress(OSError):
            while True:
                held.append(os.open("/", os.O_PATH))
        for _ in range(number):
            os.close(held.pop())
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
