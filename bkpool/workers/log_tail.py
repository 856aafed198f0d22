"""Chooses the lines of buildkitd's log that are worth showing when it has failed. Pure.

Credentials that a caller may give as attributes of a cache, and values of build arguments, are never shown.
"""

from __future__ import annotations

import re

_LINES, _LINE = 5, 300  # at most this many lines, of this many characters each
_NOISE = re.compile(r"^\t|^\S+\.\S+$|level=(info|debug)")  # Go's stack traces, and routine messages

_ATTRIBUTES = re.compile(r"(build-arg:|cache-(?:imports|exports|from|to)\b).*")
_CREDENTIAL = re.compile(
    r"""((?:secret_)?access_key(?:_id)?|session_token|account_key|(?:gh)?token|password|x-amz-[a-z-]+|sig)"""
    r"""(\\*["']?\s*:\s*\\*["']|["']?=\\*["']?)[^\s"'\\,&\]}]+""",
    re.IGNORECASE,
)


def informative_lines(log: str) -> list[str]:
    """The last lines that help to find the cause, each shortened; empty if there are none."""
    lines = [_shortened(_redacted(line)) for line in log.splitlines() if line and not _NOISE.search(line)]
    return lines[-_LINES:]


def _redacted(line: str) -> str:
    return _CREDENTIAL.sub(r"\1\2***", _ATTRIBUTES.sub(r"\1***", line))


def _shortened(line: str) -> str:
    """The beginning and the end of a line: rootlesskit writes what happened after the whole command line."""
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} … {line[-_LINE // 2 :]}"
