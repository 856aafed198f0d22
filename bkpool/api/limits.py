"""The API's limits of time and size (rule 11, docs/rules.md#r11).

Nothing here enforces a limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """What a caller of the API may ask for."""

    max_body: int = 64 * 1024
    """Bytes of a request body: many times the size of a CSR and 64 metadata entries."""
    body_timeout: float = 30.0
    """Seconds for a body to arrive. aiohttp has no such bound, and after a malformed chunk it waits for ever."""
    max_wait: timedelta = timedelta(hours=1)
    """The longest `wait` of an allocate request. A caller who names none waits for 5 minutes, or for this if it is
    less."""
