"""How the file descriptors of a process are shared, so that no server of it can take those of another.

The number of open connections is limited by descriptors first. Here the API and the gateway get their parts of them,
once, from the limit of the process. It changes no limit.
"""

from __future__ import annotations

from dataclasses import dataclass

_MOST_RESERVED = 4096
"""For worker processes, the store, logs, the API server of a cluster, metrics and the local socket."""
_OF_WORKER = 6
"""Descriptors of a worker process: those that watch it, and the probes."""
_OF_OTHERS = 64
"""Descriptors of everything else for which some are reserved."""
_LEAST = 16
"""Connections of each kind that a server gets even where the limit is too small for it."""


@dataclass(frozen=True, slots=True)
class ConnectionShares:
    """How many connections each server may have, or wants to have."""

    api: int = 0
    """Connections of the API."""
    gateway_pending: int = 0
    """Connections of the gateway without a lease."""
    gateway: int = 0
    """Connections of the gateway with a lease. Each takes two descriptors: the client's and the worker's."""


def share_descriptors(limit: int, wanted: ConnectionShares) -> ConnectionShares:
    """What each server gets of what it wants.

    A quarter of the descriptors, but at most 4,096, is reserved for everything else. The API and the gateway's
    connections without a lease get at most a quarter of the rest each, and connections with a lease what is left.

    Args:
        limit: The soft limit of open descriptors of this process.
        wanted: What the settings say; 0 for a server that does not run here.
    """
    rest = limit - _reserved(limit)
    api = _part(wanted.api, rest // 4)
    pending = _part(wanted.gateway_pending, rest // 4)
    return ConnectionShares(api, pending, _part(wanted.gateway, (rest - api - pending) // 2))


def workers_within(limit: int) -> int:
    """For how many worker processes the reserved descriptors suffice, about."""
    return max(0, (_reserved(limit) - _OF_OTHERS) // _OF_WORKER)


def _reserved(limit: int) -> int:
    return min(_MOST_RESERVED, limit // 4)


def _part(wanted: int, most: int) -> int:
    return min(wanted, max(_LEAST, most))
