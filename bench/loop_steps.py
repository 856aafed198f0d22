"""Counts the steps of event loops that take long, by what ran in them. It is no test and judges nothing.

A step is one callback of the loop, or a task from one `await` to the next. Its time is the processor time of its own
thread, so it does not grow when the machine is busy with something else. It needs asyncio's own loop: uvloop does not
tell when a step begins.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LIMIT = 0.01
"""Seconds. Nothing that runs in a loop may take more (rule 16, docs/rules.md#r16)."""


@dataclass(slots=True)
class LoopSteps:
    """The steps of all loops of this process while they are recorded."""

    count: int = 0
    longest: float = 0.0
    longest_what: str = ""
    beyond: Counter[str] = field(default_factory=Counter)
    """How many took more than `LIMIT`, by what ran."""
    collecting: float = 0.0
    """The longest run of the garbage collector, in seconds. It is a part of the step in which it ran."""

    def step_ended(self, seconds: float, what: str) -> None:
        """Takes note of one step."""
        self.count += 1
        if seconds > self.longest:
            self.longest, self.longest_what = seconds, what
        if seconds > LIMIT:
            self.beyond[what] += 1


@contextmanager
def recorded(*, but: str) -> Iterator[LoopSteps]:
    """Records all steps until it is left, but not those of the coroutine with this name: it drives the others."""
    steps = LoopSteps()
    run = asyncio.Handle._run  # noqa: SLF001 - the loop calls this for each step, and offers no other place
    began = 0.0

    def timed(handle: asyncio.Handle) -> None:
        what = _name(getattr(handle, "_callback", None))
        begin = time.thread_time()
        run(handle)
        took = time.thread_time() - begin
        if what != but:
            steps.step_ended(took, what)

    def collected(phase: str, _info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        else:
            steps.collecting = max(steps.collecting, time.thread_time() - began)

    asyncio.Handle._run = timed  # type: ignore[assignment, method-assign] # noqa: SLF001
    gc.callbacks.append(collected)
    try:
        yield steps
    finally:
        gc.callbacks.remove(collected)
        asyncio.Handle._run = run  # type: ignore[method-assign] # noqa: SLF001


def _name(callback: object) -> str:
    """What a callback runs: a task's coroutine, or the function."""
    owner = getattr(callback, "__self__", None)
    found = owner.get_coro() if isinstance(owner, asyncio.Task) else callback
    return getattr(found, "__qualname__", None) or repr(found)
