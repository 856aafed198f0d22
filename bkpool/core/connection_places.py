"""Which connection is closed when there are too many: the oldest one that has asked for nothing yet.

So clients that connect and wait cannot keep out a client that has a request. It holds no socket and closes nothing:
it says which connection must be closed.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)

_IPV6_NETWORK = 64
"""Bits. One customer of a provider usually has at least a network of this size (RFC 6177)."""


def origin_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or a network of 64 bits in IPv6.

    Args:
        host: The client's address, as the system gives it; anything else stands for itself.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, _IPV6_NETWORK), strict=False))


class ConnectionPlaces(Generic[C]):
    """The places for connections, in all and of each origin.

    Args:
        most: Connections in all.
        most_per_origin: Connections of one origin.
    """

    def __init__(self, most: int, most_per_origin: int) -> None:
        self._most = most
        self._most_per_origin = most_per_origin
        self._origins: dict[C, str] = {}
        self._count: Counter[str] = Counter()
        self._waiting: dict[C, None] = {}  # those that have asked for nothing; the oldest first
        self._waiting_of: dict[str, dict[C, None]] = {}

    def __len__(self) -> int:
        """The number of connections."""
        return len(self._origins)

    def __iter__(self) -> Iterator[C]:
        """The connections, the oldest first."""
        return iter(list(self._origins))

    def __contains__(self, connection: object) -> bool:
        """Whether the connection has a place."""
        return connection in self._origins

    def enter(self, connection: C, origin: str) -> C | None:
        """Gives a new connection a place.

        Args:
            connection: It has asked for nothing yet.
            origin: Where it comes from (`origin_of`).

        Returns:
            The connection that must be closed and has no place any more: an old one, or the new one if all others
            have asked for something. None if there is room.
        """
        self._origins[connection] = origin
        self._count[origin] += 1
        self.asks_nothing(connection)
        if self._count[origin] > self._most_per_origin:
            closed = next(iter(self._waiting_of[origin]))
        elif len(self._origins) > self._most:
            closed = next(iter(self._waiting))
        else:
            return None
        self.leave(closed)
        return closed

    def asks(self, connection: C) -> None:
        """The connection has asked for something: it is not closed to make room."""
        if connection in self._waiting:
            self._stop_waiting(connection)

    def asks_nothing(self, connection: C) -> None:
        """The connection has asked for nothing, or has got its answer: it is the youngest of those that wait."""
        if connection in self._origins:
            self._stop_waiting(connection)
            self._waiting[connection] = None
            self._waiting_of.setdefault(self._origins[connection], {})[connection] = None

    def leave(self, connection: C) -> None:
        """The connection is closed. Does nothing if it has no place."""
        if connection not in self._origins:
            return
        self._stop_waiting(connection)
        origin = self._origins.pop(connection)
        self._count[origin] -= 1
        if not self._count[origin]:
            del self._count[origin]

    def _stop_waiting(self, connection: C) -> None:
        self._waiting.pop(connection, None)
        origin = self._origins[connection]
        of_origin = self._waiting_of.get(origin, {})
        of_origin.pop(connection, None)
        if not of_origin:
            self._waiting_of.pop(origin, None)
