"""What of buildkitd's log is worth being told when it has failed: a pure choice of lines."""

from __future__ import annotations

import re

_LINES, _LINE = 5, 300
_NOISE = re.compile(r"^\t|^\S+\.\S+$|level=(info|debug)")  # Go's stack traces, and what is always said


def telling(log: str) -> list[str]:
    """The last lines that say something, each shortened; none if nothing does."""
    lines = [_shortened(line) for line in log.splitlines() if line and not _NOISE.search(line)]
    return lines[-_LINES:]


def _shortened(line: str) -> str:
    """The beginning and the end: rootlesskit says what happened after the whole command line."""
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} … {line[-_LINE // 2 :]}"
