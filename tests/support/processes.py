"""Processes of the tests: those that are stopped for a while, and long build steps."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path


def freeze(pid: int) -> None:
    """Stops a process with SIGSTOP, and returns when it has stopped.

    The signal itself takes effect later: on a busy machine a thread can still answer a call meanwhile.
    """
    os.kill(pid, signal.SIGSTOP)
    while set(states := [_state(task) for task in Path(f"/proc/{pid}/task").iterdir()]) != {"T"}:
        assert not set(states) <= {"Z", "X"}, f"process {pid} has ended"  # one that has ended never stops
        os.sched_yield()


LONG_STEPS = [str(100_000 * n + os.getpid()) for n in range(1, 5)]
"""Seconds for steps that sleep until they are ended. No other run of the tests has the same at the same time."""


def steps_that_sleep(seconds: str) -> list[str]:
    """Returns the processes of the program `/step` that sleep for this long."""
    command = f"/step\0{seconds}\0".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes() == command:
                found.append(entry.name)
        except OSError:
            continue
    return found


async def until_step_sleeps(seconds: str) -> None:
    """Waits for the step and its child. What a build prints is no sign: buildctl may show a line later, or never."""
    async with asyncio.timeout(60):
        while len(steps_that_sleep(seconds)) < 2:  # noqa: ASYNC110 - no event announces a process
            await asyncio.sleep(0.01)


def _state(task: Path) -> str:
    """Returns the state of a thread, as in proc_pid_stat(5)."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended; the second: between open and read
        return "T"
