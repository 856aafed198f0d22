"""How much of a build step's output BuildKit shows, as the variables that its daemon reads.

BuildKit clips the output of a step at 2 MiB in all and 200 KiB a second. Its configuration file has no field for it.
"""

from __future__ import annotations

import re

from bkpool.core.pool import UNLIMITED, PoolSpec

MAX_SIZE, MAX_SPEED = "BUILDKIT_STEP_LOG_MAX_SIZE", "BUILDKIT_STEP_LOG_MAX_SPEED"

_MOST = (1 << 31) - 1
"""Bytes; BuildKit ignores a number that is larger (util/progress/logs)."""
_PARTS = re.compile(r"(?P<number>[0-9.]+)\s?(?P<unit>[kKMG]?)")


def step_log_environment(spec: PoolSpec) -> dict[str, str]:
    """The variables for what the pool's spec says; empty if it says nothing."""
    given = {MAX_SIZE: spec.step_log.max_size, MAX_SPEED: spec.step_log.max_speed}
    return {name: str(_bytes(value)) for name, value in given.items() if value is not None}


def _bytes(value: str) -> int:
    """A size in bytes, with units as in buildkitd.toml: 1 kB is 1024 bytes. -1 stands for no limit."""
    if value == UNLIMITED:
        return -1
    parts = _PARTS.match(value)
    if parts is None:  # pragma: no cover - the model has checked it
        raise ValueError(f"{value!r} is not a size")
    return min(_MOST, int(float(parts["number"]) * 1024 ** " KMG".index(parts["unit"].upper() or " ")))
