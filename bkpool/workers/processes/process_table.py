"""Processes of this machine: opened as pidfd, identified by boot and start time, found by an environment variable.

A process id may belong to another process later. So a signal goes to a pidfd or, if there is no descriptor left for
one, to a process whose start time was looked at just before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bkpool.core.errors import WorkerFailed
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files

_PROC = Path("/proc")
_KILL_TIMEOUT = 30.0  # seconds; only a process in uninterruptible I/O lives longer after SIGKILL
_KILL_PAUSE = 0.02  # seconds between two looks at all processes
_EXEC_SECONDS = 2.0  # for which a process that begins a program is waited for; it usually takes a millisecond
_HANGS = "It hangs in the kernel, usually on a disk. Look at dmesg."


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
                hint=_HANGS,
            ) from None


def kill_marked(name: str, chosen: Callable[[str], bool]) -> int:
    """Kills every process whose environment variable `name` has a chosen value, and what it starts meanwhile.

    It looks at all processes of the machine until none of these is left, so it is for a thread.

    Returns:
        How many processes it has killed.

    Raises:
        WorkerFailed: One has not ended.
        HostFault: `TooManyOpenFiles`: the processes cannot be looked at.
    """
    killed: set[tuple[int, int]] = set()
    begun = time.monotonic()
    deadline = begun + _KILL_TIMEOUT
    while True:
        try:
            left, in_exec = _marked(name, chosen)
            for pid, started in left:
                _kill(pid, started)
        except OSError as error:
            if not is_lack_of_descriptors(error):
                raise
            if time.monotonic() > deadline:
                raise too_many_open_files("what runs on this machine cannot be looked at") from None
        else:
            if not left and not (in_exec and time.monotonic() < begun + _EXEC_SECONDS):
                return len(killed)
            killed.update(left)
            if left and time.monotonic() > deadline:
                raise WorkerFailed(
                    f"process {left[0][0]} has not ended {_KILL_TIMEOUT:.0f} s after SIGKILL", hint=_HANGS
                )
        time.sleep(_KILL_PAUSE)


def _marked(name: str, chosen: Callable[[str], bool]) -> tuple[list[tuple[int, int]], bool]:
    """The ids and start times of the processes that are chosen; and whether another one may be: it is in exec."""
    found, in_exec = [], False
    for pid in _pids():
        with contextlib.suppress(ProcessLookupError):
            started = start_time(pid)
            environment = _read(pid, "environ")
            value = _value(environment, name)
            if value is not None and chosen(value):
                found.append((pid, started))
            elif environment == b"" and _is_in_exec(pid):
                in_exec = True
    return found, in_exec


def _is_in_exec(pid: int) -> bool:
    """Whether a process that has shown no environment begins a program: the kernel shows its arguments later, too."""
    if _read(pid, "cmdline"):
        return bool(_read(pid, "environ"))  # it is complete by now; or it was given no environment
    with contextlib.suppress(OSError):  # a thread of the kernel has none, nor has a process that has ended
        (_PROC / str(pid) / "exe").readlink()
        return True
    return False


def _kill(pid: int, started: int) -> None:
    """Kills a process, unless its number belongs to another one by now."""
    with contextlib.suppress(ProcessLookupError):
        try:
            _kill_by_handle(pid, started)
        except OSError as error:
            if not is_lack_of_descriptors(error):
                raise
            if start_time(pid) == started:
                os.kill(pid, signal.SIGKILL)


def _kill_by_handle(pid: int, started: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        if start_time(pid) == started:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    finally:
        os.close(handle)


def _read(pid: int, file: str) -> bytes | None:
    """A file of a process; None if it has ended, or if we may not read it.

    Raises:
        OSError: No file descriptor is left.
    """
    try:
        return (_PROC / str(pid) / file).read_bytes()
    except OSError as error:
        if is_lack_of_descriptors(error):
            raise
        return None


def _value(environment: bytes | None, name: str) -> str | None:
    """A variable of an environment, as it was at exec; None if it is not set."""
    key = name.encode() + b"="
    for entry in (environment or b"").split(b"\0"):
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
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between open and read
        raise ProcessLookupError(f"no process {pid}") from None


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
