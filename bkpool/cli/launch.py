"""Starting the appliance in the background, and the pipe on which it reports how that went.

The child writes JSON lines: any number of {"progress": text}, then what `appliance.json` says, or {"failed": ...}.
The parent does not poll its child; if the child dies, the pipe ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from bkpool.cli import console, home
from bkpool.cli.errors import INTERNAL
from bkpool.core.errors import BkpoolError, HostFault
from bkpool.home.lock import holder

_DESCRIPTOR = "BKPOOL_READY_FD"
_LOG_TAIL = 4096  # bytes of the log in which the last line of a dead child is looked for
_POLL = 0.1  # seconds between two looks at an appliance that another `up` starts; there is no pipe to it
_LAST_WORDS = 5.0  # seconds for an appliance that has failed to end: only then its traceback is in the file
_END_TIMEOUT = 10.0  # seconds for an interrupted appliance to end, before the user gets the prompt back


def detached(arguments: list[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """Runs `up` in a new session and returns what `appliance.json` says when it is ready.

    Args:
        arguments: Of `up`.
        variables: Environment variables that differ from those of this process.

    Raises:
        BkpoolError: The appliance did not start; with the message, hint and exit code of the error.
    """
    log = _log_file()
    ours, theirs = os.pipe()
    with log.open("ab") as output, os.fdopen(ours, "rb") as pipe:
        size_before = output.tell()
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "bkpool", "up", *arguments],
                env={**_environment(), **variables, _DESCRIPTOR: str(theirs)},
                cwd=home.home(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            return _result(pipe, log, size_before)
        except BkpoolError:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LAST_WORDS)
            raise
        except KeyboardInterrupt:
            _end(child)
            raise


def other_when_ready() -> home.Appliance | None:
    """Waits until the appliance that another `up` starts is ready; None if it ends before."""
    with console.Progress("waiting for another `bkpool up` of this home"):
        while holder(home.home()) is not None:
            if running := home.running():
                return running
            time.sleep(_POLL)
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends an appliance whose `up` was interrupted, and says whether it has ended."""
    child.terminate()
    try:
        child.wait(_END_TIMEOUT)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        console.note(f"interrupted: the appliance (pid {child.pid}) is still ending; `bkpool down` waits for it")
    else:
        console.note("interrupted: nothing is running")


@dataclass(frozen=True, slots=True)
class WaitingParent:
    """The `up -d` that started this process and waits for it to be ready."""

    pipe: BinaryIO

    @classmethod
    def of_environment(cls) -> Self | None:
        """The parent, if there is one. Programs that are started later do not inherit the descriptor."""
        number = os.environ.pop(_DESCRIPTOR, "")
        if not number.isdigit():
            return None
        os.set_inheritable(int(number), False)
        return cls(os.fdopen(int(number), "wb", buffering=0))

    def send(self, message: dict[str, Any]) -> None:
        """Sends progress, or at last what `appliance.json` says. A parent that has ended is not an error."""
        with suppress(OSError, ValueError):
            self.pipe.write(json.dumps(message).encode() + b"\n")
            if "progress" not in message:
                self.pipe.close()

    def send_failure(self, error: BkpoolError) -> None:
        """Sends why the appliance does not start."""
        failed = {"message": error.message, "hint": error.hint, "code": error.code, "exit_code": error.exit_code}
        self.send({"failed": failed})


@contextmanager
def failures_sent_to(parent: WaitingParent | None) -> Iterator[None]:
    """Also sends an error that ends this process to the `up -d` that waits for it, if there is one."""
    try:
        yield
    except BkpoolError as error:
        if parent is not None:
            parent.send_failure(error)
        raise
    except Exception as error:
        if parent is not None:  # what is written to the log may be lost: the disk may be full
            text = f"internal error ({type(error).__name__}); please report it"
            parent.send_failure(BkpoolError(text, hint="Read `bkpool logs` and logs/crash.log.", exit_code=INTERNAL))
        raise


def _result(pipe: BinaryIO, log: Path, size_before: int) -> dict[str, Any]:
    with console.Progress("starting") as progress:
        for line in pipe:
            message: dict[str, Any] = json.loads(line)
            if "progress" in message:
                show(progress, str(message["progress"]))
            elif "failed" in message:
                raise BkpoolError(**message["failed"])
            else:
                return message
    with log.open("rb") as file:
        file.seek(max(size_before, log.stat().st_size - _LOG_TAIL))
        lines = file.read().decode(errors="replace").strip().splitlines()
    # Under an error there may be a hint, which says nothing without it.
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = f": {[*lines, *errors][-1]}" if lines else ", and it wrote nothing to its log"
    raise HostFault(f"the appliance ended before it was ready{last}", hint=f"Read {log}.")


def show(progress: console.Progress | None, text: str) -> None:
    """Shows progress for a moment; the choice of the backend and notes stay on the screen."""
    if text.startswith(("backend: ", "note: ")):
        (progress.keep if progress is not None else console.note)(text)
    elif progress is not None:
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
            hint="Set BKPOOL_HOME to a directory that you may write to.",
            code="Permission",
        ) from None
    return path


def _environment() -> dict[str, str]:
    """The environment of this process, with absolute paths: the appliance runs in its own directory."""
    environment = dict(os.environ, BKPOOL_HOME=str(home.home()))
    if cache := environment.get("BKPOOL_CACHE"):
        environment["BKPOOL_CACHE"] = str(Path(cache).absolute())
    return environment
