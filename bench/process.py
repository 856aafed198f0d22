"""Programs that the benchmark starts. Each has a separate session and separate cores, and ends with its owner.

The kernel counts CPU time in nanoseconds, for all threads and for children that still run. The module does not know
what it runs.
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
_LOOK = 0.05  # seconds between two checks whether a program is idle
_AT_REST = 0.001  # seconds of CPU time between two checks of an idle program, which may have timers
_STARTS_WITHIN = 15.0  # seconds; Python with all imports of the gateway takes 0.5


class FaultError(Exception):
    """Something cannot be measured; the message has the reason. It becomes a note, and the run continues."""


def cores() -> tuple[set[int], set[int]]:
    """Returns the core of the program under test, and the other cores. With one core both are the same."""
    mine = sorted(os.sched_getaffinity(0))
    return {mine[-1]}, set(mine[:-1]) or set(mine)


def free_port() -> int:
    """Returns a port of loopback that was free just before."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Program:
    """A running program. The end of the context kills its whole session.

    Args:
        command: What to run.
        log: Receives its standard error, and its standard output unless `talks`.
        on: The cores it may use; None for all that this process may use.
        talks: Whether its standard input and output are pipes to this process. It should end when they are closed.
        environment: Additional environment variables.
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

    def write_line(self, line: str = "") -> None:
        """Writes a line to its standard input."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.fault("it has ended") from None

    def read_line(self) -> bytes:
        """Returns the next line of its standard output.

        Raises:
            FaultError: It has ended.
        """
        assert self._process.stdout is not None
        line: bytes = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self.fault("it has ended")
        return line

    def kill(self) -> None:
        """Ends it at once. May be called from any thread."""
        self._process.kill()

    def wait_for_port(self, port: int) -> None:
        """Waits until a program listens at this port.

        Raises:
            FaultError: It has ended, or does not listen in time.
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
        """Waits until it is idle, and returns its CPU time in seconds since its start."""
        before = -1.0
        while (now := sum(map(_cpu_of, self._session()))) - before > _AT_REST:
            before = now
            time.sleep(_LOOK)
        return now

    def resident(self) -> int:
        """Returns its resident memory in bytes."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._session()) * _PAGE

    def fault(self, what: str) -> FaultError:
        """Returns an error that ends with the last output of the program."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return FaultError(f"{what}: {lines[-1]}" if lines else what)

    def _session(self) -> list[int]:
        """Returns its process and those that it started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with suppress(ProcessLookupError):
                    if os.getsid(int(entry.name)) == self._process.pid:
                        found.append(int(entry.name))
        return found


def _cpu_of(pid: int) -> float:
    """Returns the CPU time of a process. Its clock id is that of clock_getcpuclockid(3): CPUCLOCK_SCHED (2)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0  # it has ended
