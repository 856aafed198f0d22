"""The tools of this machine for a command, with their progress shown to the user."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from bkpool.cli import console
from bkpool.toolchain import Tool, Toolchain, default_cache


def quiet() -> None:
    """Keeps log lines out of a command's answer: warnings and worse go to stderr, the rest nowhere."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def ensure(wanted: Sequence[Tool]) -> dict[Tool, Path]:
    """These tools, got first where this machine lacks them.

    Raises:
        HostFault: One cannot be got; the message says why.
    """
    quiet()
    with console.Progress("looking for tools") as progress:

        def tell(tool: Tool, text: str, fraction: float | None) -> None:
            progress.update(f"{tool}: {text}", fraction)

        return Toolchain(default_cache(), progress=tell).ensure_all(wanted)
