"""Go durations ("1h30m", "500ms"), as the API and the objects have them, to and from timedelta.

It accepts exactly what Go's time.ParseDuration accepts, except negative durations.
"""

from __future__ import annotations

import re
from datetime import timedelta

from bkpool.core.errors import InvalidInput

# https://pkg.go.dev/time#ParseDuration
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_LONGEST = 64  # characters: no sensible duration is longer, and it limits the work on untrusted input
_HINT = "Write a duration such as 30m, 1h or 1h30m."


def parse(text: str, *, field: str = "duration") -> timedelta:
    """Reads a Go duration.

    Args:
        text: For example "1h", "90m" or "1h30m". "0" is allowed; "+" is the only allowed sign.
        field: The name of the value, for the error message.

    Raises:
        InvalidInput: It is not a duration, is negative, or does not fit into Go's 64 bits of nanoseconds.
    """
    body = text.removeprefix("+")
    if body == "0":
        return timedelta(0)
    if body.startswith("-"):
        raise InvalidInput(f"{field}: {_shown(text)} is negative", hint=_HINT, field=field)
    if not body or len(body) > _LONGEST or _PART.sub("", body):
        raise InvalidInput(f"{field}: {_shown(text)} is not a duration", hint=_HINT, field=field)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(body))
    if seconds > 2**63 / 1e9:
        raise InvalidInput(f"{field}: {_shown(text)} is longer than 292 years", hint=_HINT, field=field)
    return timedelta(seconds=seconds)


def render(value: timedelta) -> str:
    """Writes a duration as Go does, without parts that are zero: 1h, 1h30m, 1.5s, 0s."""
    total = value.total_seconds()
    if total == 0:
        return "0s"
    if 0 < total < 1:
        return f"{total * 1000:g}ms"
    hours, rest = divmod(total, 3600)
    minutes, seconds = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (round(seconds, 6), "s")]
    return "".join(f"{number:g}{unit}" for number, unit in parts if number)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…")
