"""Runs the `kind` tool, reports what it is doing, and turns its failures into errors."""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from bkpool.core.errors import DiskFull, HostFault

ReportText = Callable[[str], None]
"""Receives one line for the user about what is being done."""

_STAGE = re.compile(r" • (?P<stage>.*?)\s+\.\.\.\s*")  # pkg/internal/cli/status.go of kind, when not on a terminal
_IN_USE = re.compile(r"(\d+\.\d+\.\d+\.\d+:\d+).*(?:already allocated|address already in use)")
_ERROR_LINES = 4  # the last lines of kind's output that an error shows
_ERROR_LINE_LENGTH = 300  # characters of each of them: those of kubeadm are very long
_KEPT_LINES = 200  # of kind's output, in memory


def run_kind(program: Path, arguments: Sequence[str]) -> list[str]:
    """Runs kind and returns the lines of its standard output.

    Raises:
        HostFault: kind failed; the message shows the end of its output.
    """
    done = subprocess.run(
        [program, *arguments],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        _raise_failure(" ".join(arguments[:2]), done.stderr.splitlines())
    return done.stdout.splitlines(keepends=True)


def run_kind_in_stages(
    program: Path, arguments: Sequence[str], *, cluster: str, lock: int, report: ReportText
) -> None:
    """Runs kind and reports each stage that it announces.

    Args:
        program: The `kind` tool.
        arguments: Its command line.
        cluster: The cluster's name, for the reports.
        lock: A locked file that kind inherits: if this process is killed, the next one can wait for kind to end.
        report: Receives the stages.

    Raises:
        HostFault: kind failed; the message shows the end of its output.
    """
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(
        [program, *arguments],
        env=_environment(),
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if stage := parse_stage(line, cluster):
                report(stage)
    if process.returncode != 0:
        _raise_failure(" ".join(arguments[:2]), lines)


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
