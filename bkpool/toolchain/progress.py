"""How the toolchain reports progress while it gets a tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bkpool.toolchain.table import Tool

ReportStep = Callable[[str, float | None], None]
"""Called with each step and the fraction of it that is done (0 to 1; None if that is not known)."""


class ReportProgress(Protocol):
    """Called with each step of getting a tool, from any thread that calls `ensure`."""

    def __call__(self, tool: Tool, text: str, fraction: float | None) -> None:
        """Reports a step, and the fraction of it that is done (0 to 1; None if that is not known)."""
