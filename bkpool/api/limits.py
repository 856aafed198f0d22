"""The API's limits of time and size (rule 11, docs/rules.md#r11).

Nothing here enforces a limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a client of an HTTP server may do before it has asked for anything."""

    connections: int = 4096
    """Open connections. One more closes one that has no request: the oldest of the address that has most of them."""
    connections_per_address: int = 1024
    """Those of one address, or of one IPv6 network of 64 bits."""
    header_timeout: float = 10.0
    """Seconds from accepting a connection to the end of the header of its first request, with the TLS handshake."""
    idle_timeout: float = 120.0
    """Seconds that a connection may be open after an answer without the header of another request. A proxy must
    close its connections earlier, or it uses one that is just being closed; many keep them for 60 s."""


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
