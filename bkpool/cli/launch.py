"""Starting the appliance in the background, and the pipe on which it says how that went.

The child writes JSON lines: any number of {"progress": text}, then what it is (ready) or {"failed": …}. Nothing is
polled; if the child dies, the pipe ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from bkpool.cli import console, home
from bkpool.core.errors import BkpoolError, HostFault

_DESCRIPTOR = "BKPOOL_READY_FD"
_LAST_WORDS = 4096


def detached(arguments: list[str]) -> dict[str, Any]:
    """Runs `up` with these arguments in a session of its own and returns what it says when it is ready.

    Raises:
        BkpoolError: The appliance did not come up; with the message, hint and exit code of its own error.
    """
    log = _log_file()
    mine, its = os.pipe()
    with log.open("ab") as output, os.fdopen(mine, "rb") as pipe:
        before = output.tell()
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "bkpool", "up", *arguments],
                env=_environment() | {_DESCRIPTOR: str(its)},
                cwd=home.home(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(its,),
                start_new_session=True,
            )
        finally:
            os.close(its)
        try:
            return _heard(pipe, log, before)
        except KeyboardInterrupt:
            child.terminate()
            raise


@dataclass(frozen=True, slots=True)
class Parent:
    """The `up -d` that started this process and waits."""

    pipe: BinaryIO

    @classmethod
    def of_environment(cls) -> Self | None:
        """The parent, if there is one. The descriptor is not passed on to any program that is started later."""
        number = os.environ.pop(_DESCRIPTOR, "")
        if not number.isdigit():
            return None
        os.set_inheritable(int(number), False)
        return cls(os.fdopen(int(number), "wb", buffering=0))

    def tell(self, told: dict[str, Any]) -> None:
        """Passes on progress, or at last what the appliance is. A parent that went away is no matter."""
        with suppress(OSError, ValueError):
            self.pipe.write(json.dumps(told).encode() + b"\n")
            if "progress" not in told:
                self.pipe.close()

    def failed(self, error: BkpoolError) -> None:
        """Passes on why the appliance does not come up."""
        said = {"message": error.message, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
        self.tell({"failed": said})


def _heard(pipe: BinaryIO, log: Path, before: int) -> dict[str, Any]:
    with console.Progress("starting") as progress:
        for line in pipe:
            told: dict[str, Any] = json.loads(line)
            if "progress" in told:
                _say(progress, str(told["progress"]))
            elif "failed" in told:
                raise BkpoolError(**told["failed"])
            else:
                return told
    with log.open("rb") as file:
        file.seek(max(before, log.stat().st_size - _LAST_WORDS))
        said = file.read().decode(errors="replace").strip().splitlines()
    raise HostFault(
        f"the appliance ended before it was ready: {said[-1] if said else 'without a word'}", hint=f"Read {log}."
    )


def _say(progress: console.Progress, text: str) -> None:
    """What is being done comes and goes; which backend it was and why stays on the screen."""
    if text.startswith("backend: "):
        console.note(text)
    else:
        progress.update(text)


def _log_file() -> Path:
    path = home.home() / "logs" / "appliance.log"
    try:
        home.home().mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise HostFault(
            f"{path} cannot be written: {error.strerror}",
            hint="Set BKPOOL_HOME to a directory that you may write.",
            code="Permission",
        ) from None
    return path


def _environment() -> dict[str, str]:
    """Ours, with its paths made absolute: the appliance runs in its home, and holds no directory of the user."""
    environment = dict(os.environ, BKPOOL_HOME=str(home.home()))
    if cache := environment.get("BKPOOL_CACHE"):
        environment["BKPOOL_CACHE"] = str(Path(cache).absolute())
    return environment
