"""The processes of bench/cluster.py: how they are started and ended, and what each has cost.

A process that answers commands is asked over its standard input and output, one line each. It measures nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")
_END_TIMEOUT = 20.0
_LINE = 16 << 20


def free_port() -> int:
    """A port of this machine that nothing uses."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class BenchProcess:
    """A program that this benchmark has started.

    Args:
        name: What it is, for messages.
        process: The program.
        log: Where its standard error goes.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, log: Path, *arguments: str, env: dict[str, str] | None = None) -> BenchProcess:
        """Starts a module of this project."""
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *arguments,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                limit=_LINE,
            )
        return cls(name, process, log)

    async def read(self) -> Any:
        """The next line of its output.

        Raises:
            RuntimeError: It has ended.
        """
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        return json.loads(line)

    async def ask(self, command: str) -> Any:
        """Gives it a command, and returns its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        return await self.read()

    def check(self) -> None:
        """Raises RuntimeError if it has ended."""
        if self._process.returncode is not None:
            raise RuntimeError(f"{self.name} has ended:\n{self._log.read_text(errors='replace')[-3000:]}")

    @property
    def cpu(self) -> float:
        """Seconds of processor time that all its threads have had, in user mode and in the kernel."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def memory(self) -> float:
        """Its resident memory in MiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024

    async def end(self) -> None:
        """Ends it: by the end of its input, or by a signal."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            with suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(_END_TIMEOUT):
                    await self._process.wait()
            except TimeoutError:
                with suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
