"""`bkpool logs`: replaces itself by tail(1), which already follows files well."""

from __future__ import annotations

import os
from pathlib import Path

import click

from bkpool.cli import home, options
from bkpool.core.errors import HostFault, NotFound


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
    command_line = ["tail", "-n", "+1" if lines is None else str(lines), *(["-F"] if follow else []), "--", str(path)]
    try:
        os.execvp(command_line[0], command_line)  # noqa: S606 - tail takes over this process
    except OSError as error:
        raise HostFault(
            f"tail(1) cannot be run: {error.strerror}",
            hint=f"Install coreutils, or read {path}.",
            code="ToolMissing",
        ) from None


def _known(logs: Path, namespace: str) -> str:
    """The workers that have a log here, as the user would name them; those of another namespace with its option."""
    names = sorted(tuple(file.name.removesuffix(".log").split(".", 1)) for file in logs.glob("*.*.log"))
    return ", ".join(worker if of == namespace else f"{worker} (-n {of})" for of, worker in names)
