"""Chooses the lines of buildkitd's log that are worth showing when it has failed. Pure."""

from __future__ import annotations

import re

_LINES, _LINE = 5, 300  # at most this many lines, of this many characters each
_NOISE = re.compile(r"^\t|^\S+\.\S+$|level=(info|debug)")  # Go's stack traces, and routine messages


def informative_lines(log: str) -> list[str]:
    """The last lines that help to find the cause, each shortened; empty if there are none."""
    lines = [_shortened(line) for line in log.splitlines() if line and not _NOISE.search(line)]
    return lines[-_LINES:]


def _shortened(line: str) -> str:
    """The beginning and the end of a line: rootlesskit writes what happened after the whole command line."""
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} … {line[-_LINE // 2 :]}"
