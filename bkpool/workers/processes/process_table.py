"""Processes of this machine: held by pidfd, told apart by start time and boot, found by a mark in their environment.

A process id alone says nothing after its process has ended; nothing here signals by number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bkpool.core.errors import WorkerFailed

_PROC = Path("/proc")
_KILL_DEADLINE = 30.0  # seconds; only a process in uninterruptible I/O outlives SIGKILL for longer


class Process:
    """A process held by a pidfd: as long as this is open, it can't be mistaken for a later one of the same number.

    Args:
        pid: As this process's own PID namespace counts.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exited = asyncio.Event()
        self._fd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._on_exit)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; to one that has ended, none."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Lets go of it, whether it lives or not."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._fd)
        self.exited.set()


async def kill(processes: Iterable[Process]) -> None:
    """Kills all of them and waits until they are gone.

    Raises:
        WorkerFailed: One would not die.
    """
    waiting = list(processes)
    for process in waiting:
        process.signal(signal.SIGKILL)
    for process in waiting:
        try:
            async with asyncio.timeout(_KILL_DEADLINE):
                await process.exited.wait()
        except TimeoutError:
            raise WorkerFailed(
                f"process {process.pid} has not ended {_KILL_DEADLINE:.0f} s after SIGKILL",
                hint="It hangs in the kernel, most often on a disk; look at dmesg.",
            ) from None


async def kill_marked(name: str, chosen: Callable[[str], bool]) -> int:
    """Kills every process whose environment variable `name` has a chosen value, and returns how many they were."""
    with contextlib.ExitStack() as stack:
        found = []
        for pid in _pids():
            with contextlib.suppress(OSError):
                process = Process(pid)  # before the look: what is looked at is then what is killed
                stack.callback(process.close)
                value = environment_value(pid, name)
                if value is not None and chosen(value):
                    found.append(process)
        await kill(found)
        return len(found)


def environment_value(pid: int, name: str) -> str | None:
    """An environment variable of a process as it was at exec; None if it has none, or is not ours to look at."""
    try:
        environment = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return None
    key = name.encode() + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(key):
            return entry.removeprefix(key).decode("utf-8", "replace")
    return None


def boot_id() -> str:
    """The kernel's name for the time since this boot: process ids mean nothing across two of them."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """When a process began, in clock ticks since boot (field 22 of proc(5) stat).

    Raises:
        ProcessLookupError: There is no such process.
    """
    return int(_stat(pid)[19])


def parent(pid: int) -> int:
    """The parent of a process (field 4 of proc(5) stat).

    Raises:
        ProcessLookupError: There is no such process.
    """
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """The fields from the third on: the second, the name, may itself contain blanks and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
