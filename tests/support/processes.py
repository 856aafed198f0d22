"""Processes of the tests that are stopped for a while."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def freeze(pid: int) -> None:
    """Stops a process with SIGSTOP, and returns when it has stopped.

    The signal itself takes effect later: on a busy machine a thread can still answer a call meanwhile.
    """
    os.kill(pid, signal.SIGSTOP)
    while any(_state(task) != "T" for task in Path(f"/proc/{pid}/task").iterdir()):
        os.sched_yield()


def _state(task: Path) -> str:
    """Returns the state of a thread, as in proc_pid_stat(5)."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # it has just ended
        return "T"
