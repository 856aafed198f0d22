"""Runs the `kind` tool for a limited time, reports what it is doing, and turns its failures into errors."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from bkpool.core import durations
from bkpool.core.errors import DiskFull, HostFault

ReportText = Callable[[str], None]
"""Receives one line for the user about what is being done."""

_STAGE = re.compile(r" • (?P<stage>.*?)\s+\.\.\.\s*")  # pkg/internal/cli/status.go of kind, when not on a terminal
_IN_USE = re.compile(r"(\d+\.\d+\.\d+\.\d+:\d+).*(?:already allocated|address already in use)")
_ERROR_LINES = 4  # the last lines of kind's output that an error shows
_ERROR_LINE_LENGTH = 300  # characters of each of them: those of kubeadm are very long
_LOOK = 0.1  # seconds between two looks at the output of kind


@dataclass(frozen=True, slots=True)
class KindLimits:
    """How many seconds kind may take. Each is many times what a slow machine needs: kind hangs if the engine does."""

    create: float = 1800.0
    """It may download the image of the node, of some 400 MB, and waits for the node."""
    load: float = 1800.0
    """An archive may have some gigabytes."""
    delete: float = 300.0
    other: float = 60.0

    def of(self, arguments: Sequence[str]) -> float:
        """The limit of a command line."""
        return {"create": self.create, "load": self.load, "delete": self.delete}.get(arguments[0], self.other)


USUAL_LIMITS = KindLimits()


def run_kind(program: Path, arguments: Sequence[str], limits: KindLimits) -> list[str]:
    """Runs kind and returns the lines of its standard output.

    Raises:
        HostFault: kind failed, and the message shows the end of its output; or it did not end in time.
    """
    with _output() as out, _output() as errors:
        code = _run(program, arguments, limits, out=out, errors=errors)
        if code != 0:
            _raise_failure(" ".join(arguments[:2]), _text(errors).splitlines())
        return _text(out).splitlines(keepends=True)


def run_kind_in_stages(
    program: Path, arguments: Sequence[str], limits: KindLimits, *, cluster: str, lock: int, report: ReportText
) -> None:
    """Runs kind and reports each stage that it announces.

    Args:
        program: The `kind` tool.
        arguments: Its command line.
        limits: How long it may take.
        cluster: The cluster's name, for the reports.
        lock: A locked file that kind inherits: if this process is killed, the next one can wait for kind to end.
        report: Receives the stages.

    Raises:
        KindHangs: It did not end in time. What it has made is still there.
        HostFault: kind failed; the message shows the end of its output.
    """
    reported = 0

    def report_new(out: int) -> None:
        nonlocal reported
        complete = _text(out).rpartition("\n")[0].split("\n")
        for line in complete[reported:]:
            if stage := parse_stage(line, cluster):
                report(stage)
        reported = len(complete)

    with _output() as out:
        code = _run(program, arguments, limits, out=out, errors=out, lock=lock, look=report_new)
        if code != 0:
            _raise_failure(" ".join(arguments[:2]), _text(out).splitlines())


def _run(
    program: Path,
    arguments: Sequence[str],
    limits: KindLimits,
    *,
    out: int,
    errors: int,
    lock: int | None = None,
    look: Callable[[int], None] = lambda _out: None,
) -> int:
    """Runs kind until it has ended and returns its exit code.

    Its output goes into files, because the docker that kind starts may hold a pipe open after kind has ended.
    """
    seconds = limits.of(arguments)
    deadline = time.monotonic() + seconds
    process = subprocess.Popen(
        [program, *arguments],
        env=_environment(),
        pass_fds=() if lock is None else (lock,),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=errors,
    )
    try:
        while True:
            left = deadline - time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, min(left, _LOOK)))
                look(out)
                return code
            look(out)
            if left <= 0:
                raise KindHangs(arguments, seconds, _text(errors).splitlines())
    finally:
        _end(process)


class KindHangs(HostFault):
    """kind did not end in time, and was killed with what it had started.

    Args:
        arguments: Its command line.
        seconds: How long it had.
        output: The lines that it has printed.
    """

    def __init__(self, arguments: Sequence[str], seconds: float, output: Sequence[str]) -> None:
        last = next((line.strip() for line in reversed(output) if line.strip()), "")
        super().__init__(
            f"`{shlex.join(['kind', *arguments])}` has not ended after {durations.render(timedelta(seconds=seconds))}"
            f"{f', its last line: {last[:_ERROR_LINE_LENGTH]}' if last else ''}",
            hint="Look whether the container engine answers (docker ps) and restart it if it does not, then repeat. "
            "What kind has left is removed then. If it was downloading an image, docker pull it first.",
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills kind, if it has not ended, and the programs that it waits for.

    They have no process group of their own, so that Ctrl-C ends them, too.
    """
    if process.poll() is None:
        started = _descendants(process.pid)
        process.kill()
        for pid in started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


@contextmanager
def _output() -> Iterator[int]:
    """A file in memory for the output of a program."""
    file = os.memfd_create("kind")
    try:
        yield file
    finally:
        os.close(file)


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")


def parse_stage(line: str, cluster: str) -> str | None:
    """What a line of `kind create cluster` announces, as text for the user; None if it announces nothing."""
    match = _STAGE.fullmatch(line.rstrip("\n"))
    if match is None:
        return None
    text = re.sub(r"[^\x20-\x7e≤]", "", match["stage"]).strip()  # kind puts an emoji behind each stage
    return f"cluster {cluster}: {text[:1].lower()}{text[1:]}"


def _environment() -> dict[str, str]:
    """Without KUBECONFIG, which names the user's own file."""
    return {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}


def _raise_failure(action: str, output: Iterable[str]) -> NoReturn:
    """Raises the error that kind's output describes."""
    lines = [line.strip() for line in output if line.strip()]
    for line in lines:
        if "no space left on device" in line:
            raise DiskFull(f"kind {action}: no space left on device", hint="Free some disk space.")
        if in_use := _IN_USE.search(line):
            raise HostFault(
                f"kind {action}: {in_use[1]} is in use",
                hint="Stop the program that listens there (another kind cluster?), or change the ports in "
                "kind-config.yaml.",
                code="PortTaken",
            )
    errors = [line for line in lines if line.startswith("ERROR")][:1]
    shown = errors + [line for line in lines[-_ERROR_LINES:] if line not in errors]
    pull_failed = any("failed to pull image" in line for line in errors)
    raise HostFault(
        f"kind {action} failed: {' | '.join(line[:_ERROR_LINE_LENGTH] for line in shown) or 'it printed nothing'}",
        hint="Give an image that the engine already has: --node-image IMAGE." if pull_failed else "",
    )
