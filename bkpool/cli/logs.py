"""`bkpool logs`: shows a log with the older files that it was continued from, and follows it into the next one.

It only reads. Who writes a log, and when it is rotated, is in `telemetry.log_file` and in `slot_log` of workers.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import click

from bkpool.cli import console, home, options
from bkpool.core.errors import HostFault, NotFound

_KEPT = 4  # as telemetry.log_file.KEPT, which this command does not import
_FOLLOW_INTERVAL = 0.2  # seconds between two looks at a log that is followed
_BLOCK = 64 * 1024


@click.command(short_help="Show the log of the appliance or of a worker.")
@click.argument("worker", required=False)
@click.option("-f", "--follow", is_flag=True, help="Continue with new lines until Ctrl-C.")
@click.option("-l", "--lines", type=click.IntRange(min=0), help="Show only this many of the last lines.")
@options.namespace
def command(worker: str | None, follow: bool, lines: int | None, namespace: str) -> None:
    """Show the log of the appliance, or of WORKER (such as default-worker-0) of this machine."""
    logs = home.home() / "logs"
    path = logs / (f"{namespace}.{worker}.log" if worker else "appliance.log")
    if worker and not path.is_file() and (kubeconfig := home.home() / "kubeconfig").is_file():
        raise NotFound(
            f"{worker} has no log here: the workers of this home are pods",
            hint=f"kubectl --kubeconfig {kubeconfig} -n {namespace} logs {worker}",
        )
    if not path.is_file() or path.parent != logs:
        what = f"{worker} of the namespace {namespace}" if worker else "an appliance in the background"
        known = _known(logs, namespace) if worker else ""
        raise NotFound(
            f"there is no log of {what} in {logs}",
            hint=f"There are logs of: {known}." if known else "`bkpool up -d` writes one.",
        )
    if not worker and (note := _note_of_foreground(path)):
        console.note(note)
    try:
        _show(path, lines, follow=follow)
    except PermissionError as error:
        raise HostFault(
            f"{error.filename}: {error.strerror}", hint="Run bkpool as its owner.", code="Permission"
        ) from None


def _note_of_foreground(path: Path) -> str:
    """Says that this is not the log of the appliance that runs: that one writes to the stderr of its `up`."""
    try:
        running = home.running()
        if running is None or Path(f"/proc/{running.pid}/fd/2").samefile(path):
            return ""
    except (OSError, HostFault):  # another user's, or it has just ended
        return ""
    return f"note: bkpool runs in the foreground (pid {running.pid}), with its log; this is an earlier log"


def _show(path: Path, lines: int | None, *, follow: bool) -> None:
    with ExitStack() as stack:
        # The newest first: what is renamed meanwhile is then shown twice at worst, and never missing.
        found = (part for part in (path, *_older(path)) if part.is_file())
        files = _without_duplicates([stack.enter_context(part.open("rb")) for part in found])
        whole: Iterable[bytes] = itertools.chain.from_iterable(reversed(files))
        for line in whole if lines is None else deque(whole, maxlen=lines):
            sys.stdout.buffer.write(line)
        sys.stdout.flush()
        if follow:
            _follow(path, files[0])


def _older(path: Path) -> list[Path]:
    """The files in which a log began, the newest first."""
    if path.name == "appliance.log":
        return [path.with_name(f"{path.name}.{number}") for number in range(1, _KEPT + 1)]
    return [path.with_name(f"{path.name}.earlier")]


def _without_duplicates(files: list[BinaryIO]) -> list[BinaryIO]:
    """The files, without one that was renamed between two looks and found twice."""
    found: dict[tuple[int, int], BinaryIO] = {}
    for file in files:
        status = os.fstat(file.fileno())
        found.setdefault((status.st_dev, status.st_ino), file)
    return list(found.values())


def _follow(path: Path, file: BinaryIO) -> None:
    """Shows what is written to a log from now on, also after it was rotated or made empty. It does not end."""
    while True:
        _copy(file)
        try:
            replaced = not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:  # it is being rotated
            replaced = False
        if replaced:
            _copy(file)  # the last lines before the rotation
            file.close()
            file = path.open("rb")
            continue
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)
        time.sleep(_FOLLOW_INTERVAL)


def _copy(file: BinaryIO) -> None:
    while block := file.read(_BLOCK):
        sys.stdout.buffer.write(block)
    sys.stdout.flush()


def _known(logs: Path, namespace: str) -> str:
    """The workers that have a log here, as the user would name them; those of another namespace with its option."""
    names = sorted(tuple(file.name.removesuffix(".log").split(".", 1)) for file in logs.glob("*.*.log"))
    return ", ".join(worker if of == namespace else f"{worker} (-n {of})" for of, worker in names)
