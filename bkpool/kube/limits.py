"""How long one process waits for an API server, in seconds, and how long it keeps connections and watches.

Nothing here enforces a limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KubeLimits:
    """All time limits of a client of the Kubernetes API. Tests use shorter ones."""

    connect_timeout: float = 5.0
    """To connect to the API server, within a request or for a watch."""
    request_timeout: float = 15.0
    """For one request. The API server gives up after 60, but a caller who wants a lease waits for the answer."""
    idle_timeout: float = 60.0
    """How long an idle connection is kept, because a TLS handshake adds some 5 ms to a lease. The server's limit is
    90 seconds."""
    watch_duration: float = 240.0
    """How long the server is asked to keep one watch open, and up to a quarter more, so that the watches of many
    replicas do not all begin again at once. An API server's own default is 30 minutes; load balancers often cut at
    5."""
    watch_silence: float = 100.0
    """A watch that gets no byte for this long counts as frozen. A server sends a bookmark about every minute
    (Kubernetes API concepts, "watch bookmarks")."""
