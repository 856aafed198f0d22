"""A command on a terminal of its own, as a person runs it: what it shows is read while it runs."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

from harness import WAIT_TIMEOUT


class Terminal:
    """Runs a program on a new terminal, which is closed at the end of the block."""

    def __init__(self, *argv: str | Path, env: dict[str, str], columns: int = 200) -> None:
        self._ours, its = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [str(part) for part in argv],
            env=env | {"TERM": "xterm", "COLUMNS": str(columns)},
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)

    def until(self, text: str) -> str:
        """Reads until this text was shown, and returns all that was shown so far."""
        deadline = time.monotonic() + WAIT_TIMEOUT
        while text not in self.shown:
            if not self._read(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"{text!r} was not shown:\n{self.shown}")
        return self.shown

    def ended(self) -> int:
        """Reads until the program has ended, and returns its exit code."""
        while self._read(WAIT_TIMEOUT):
            pass
        return self.process.wait(WAIT_TIMEOUT)

    def interrupt(self) -> None:
        """Sends SIGINT to the program, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            chunk = os.read(self._ours, 65536)
        except OSError:  # EIO: the program has ended
            return False
        self.shown += chunk.decode(errors="replace")
        return bool(chunk)
