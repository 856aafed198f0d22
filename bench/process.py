"""Programs that the benchmark starts: each in a session of its own, on cores of its own, and gone with their owner.

CPU time is the kernel's own count in nanoseconds, of all threads and of children that live. Nothing here knows what
it runs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LOOK = 0.05  # seconds between two looks at a program that should come to rest
_AT_REST = 0.001  # seconds of CPU time between them: timers may go on
_STARTS_WITHIN = 15.0  # seconds; Python with everything that the gateway imports takes half of one


class FaultError(Exception):
    """Something cannot be measured, and this says why: a cell of the table, never the end of the run."""


def cores() -> tuple[set[int], set[int]]:
    """The core of the program under test, and those of everything else. With one core they share it."""
    mine = sorted(os.sched_getaffinity(0))
    return {mine[-1]}, set(mine[:-1]) or set(mine)


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Program:
    """A program under way; leaving the context kills its whole session.

    Args:
        command: What to run.
        log: Takes what it says on standard error, and on standard output unless `talks`.
        on: The cores it may use; none: all that we may.
        talks: Whether its standard input and output are pipes to us. It should end when they do.
        environment: Added to ours.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        on: set[int] | None = None,
        talks: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        pinned = ["taskset", "--cpu-list", ",".join(map(str, sorted(on)))] if on else []
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*pinned, *command],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def say(self, line: str = "") -> None:
        """Writes a line to its standard input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.fault("it has ended") from None

    def hear(self) -> bytes:
        """Its next line on standard output.

        Raises:
            FaultError: It has ended instead.
        """
        assert self._process.stdout is not None
        line: bytes = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self.fault("it has ended")
        return line

    def kill(self) -> None:
        """Ends it at once; may be called in any thread."""
        self._process.kill()

    def wait_for_port(self, port: int) -> None:
        """Returns when somebody listens there.

        Raises:
            FaultError: It ends, or nobody does in time.
        """
        deadline = time.monotonic() + _STARTS_WITHIN
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
                return
            if self._process.poll() is not None:
                raise self.fault("it has ended")
            if time.monotonic() > deadline:
                raise self.fault("it does not listen")
            time.sleep(0.01)

    def cpu(self) -> float:
        """CPU time in seconds since it began, when it has come to rest."""
        before = -1.0
        while (now := sum(map(_cpu_of, self._session()))) - before > _AT_REST:
            before = now
            time.sleep(_LOOK)
        return now

    def resident(self) -> int:
        """Resident memory in bytes."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._session()) * _PAGE

    def fault(self, what: str) -> FaultError:
        """An error that ends with what the program printed last."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return FaultError(f"{what}: {lines[-1]}" if lines else what)

    def _session(self) -> list[int]:
        """Its process and those that it started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(ProcessLookupError):
                    if os.getsid(int(entry.name)) == self._process.pid:
                        found.append(int(entry.name))
        return found


def _cpu_of(pid: int) -> float:
    """What clock_getcpuclockid(3) stands for: CPUCLOCK_SCHED (2) of a process, in the kernel's own encoding."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0  # it has ended
