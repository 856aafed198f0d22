"""Processes of this machine: opened as pidfd, identified by boot and start time, found by an environment variable.

A process id may belong to another process later, so nothing here sends a signal to a number.
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
_KILL_TIMEOUT = 30.0  # seconds; only a process in uninterruptible I/O lives longer after SIGKILL


class Process:
    """A process with an open pidfd. While it is open, it cannot be confused with a later one of the same number.

    Args:
        pid: Its number in this process's own PID namespace.

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
        """Sends a signal. Does nothing if the process has ended or `close` was called."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """Closes the pidfd. The process is not changed. A second call does nothing."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._fd)
        self.exited.set()


async def kill(processes: Iterable[Process]) -> None:
    """Kills processes and waits until they have ended.

    Raises:
        WorkerFailed: One has not ended.
    """
    waiting = list(processes)
    for process in waiting:
        process.signal(signal.SIGKILL)
    for process in waiting:
        try:
            async with asyncio.timeout(_KILL_TIMEOUT):
                await process.exited.wait()
        except TimeoutError:
            raise WorkerFailed(
                f"process {process.pid} has not ended {_KILL_TIMEOUT:.0f} s after SIGKILL",
                hint="It hangs in the kernel, usually on a disk. Look at dmesg.",
            ) from None


async def kill_marked(name: str, chosen: Callable[[str], bool]) -> int:
    """Kills every process whose environment variable `name` has a chosen value. Returns their number."""
    with contextlib.ExitStack() as stack:
        found = []
        for pid in _pids():
            with contextlib.suppress(OSError):
                process = Process(pid)  # opened first, so that the process that is read is the one that is killed
                stack.callback(process.close)
                value = environment_value(pid, name)
                if value is not None and chosen(value):
                    found.append(process)
        await kill(found)
        return len(found)


def environment_value(pid: int, name: str) -> str | None:
    """An environment variable of a process at its exec; None if it is not set, or if we may not read it."""
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
    """The kernel's id of this boot. After another boot, process ids mean other processes."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int:
    """When a process was started, in clock ticks since boot (field 22 of proc(5) stat).

    Raises:
        ProcessLookupError: There is no such process.
    """
    return int(_stat(pid)[19])


def parent(pid: int) -> int:
    """The process id of the parent (field 4 of proc(5) stat).

    Raises:
        ProcessLookupError: There is no such process.
    """
    return int(_stat(pid)[1])


def is_below(pid: int, ancestor: int) -> bool:
    """Whether a process was started by `ancestor`, or by a descendant of it.

    Raises:
        ProcessLookupError: There is no such process.
    """
    while pid > 1:
        pid = parent(pid)
        if pid == ancestor:
            return True
    return False


def _stat(pid: int) -> list[str]:
    """The fields of stat from the third on. The second one, the name, may contain blanks and brackets."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
