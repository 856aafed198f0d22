"""Gets tools for a command and shows the progress to the user."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import click
import structlog

from bkpool.cli import console
from bkpool.telemetry.log_writer import LineLogger
from bkpool.toolchain import Tool, Toolchain, default_cache


def quiet_logging() -> None:
    """Keeps log lines out of the answer of a command: warnings and errors go to stderr, others are dropped."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_names: LineLogger(lambda line: click.echo(line, nl=False, err=True)),
    )


def ensure(wanted: Sequence[Tool]) -> dict[Tool, Path]:
    """The paths of these tools. Gets those that this machine does not have.

    Raises:
        HostFault: A tool cannot be got; the message has the reason.
    """
    quiet_logging()
    with console.Progress("looking for tools") as progress:

        def report(tool: Tool, text: str, fraction: float | None) -> None:
            progress.update(f"{tool}: {text}", fraction)

        return Toolchain(default_cache(), progress=report).ensure_all(wanted)
