"""Which connection is closed when there are too many: one that has asked for nothing yet, the oldest of its address.

So clients that connect and wait cannot keep out a client that has a request, and the address that has the most such
connections loses one first. It holds no socket and closes nothing: it says which connection must be closed.
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
        self._waiting: dict[str, dict[C, None]] = {}  # by origin: those that have asked for nothing, the oldest first
        self._origins_with: dict[int, dict[str, None]] = {}  # by how many of them an origin has
        self._most_waiting = 0  # how many the origin has that has most

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
            The connection that must be closed and has no place any more; None if there is room. If its origin has
            too many, it is the oldest of that origin that has asked for nothing. If there are too many in all, it is
            the oldest of the origin that has most of them: a client who is slow, or far away, is not closed for the
            flood of another. It is the new one itself if all others have asked for something.
        """
        self._origins[connection] = origin
        self._count[origin] += 1
        self.asks_nothing(connection)
        if self._count[origin] > self._most_per_origin:
            closed = next(iter(self._waiting[origin]))
        elif len(self._origins) > self._most:
            largest = next(iter(self._origins_with[self._most_waiting]))
            closed = next(iter(self._waiting[largest]))
        else:
            return None
        self.leave(closed)
        return closed

    def asks(self, connection: C) -> None:
        """The connection has asked for something: it is not closed to make room."""
        if connection in self._origins:
            self._stop_waiting(connection)

    def asks_nothing(self, connection: C) -> None:
        """The connection has asked for nothing, or has got its answer: it is the youngest of those that wait."""
        if connection in self._origins:
            self._stop_waiting(connection)
            origin = self._origins[connection]
            of_origin = self._waiting.setdefault(origin, {})
            of_origin[connection] = None
            self._count_waiting(origin, len(of_origin) - 1, len(of_origin))

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
        origin = self._origins[connection]
        of_origin = self._waiting.get(origin, {})
        if connection not in of_origin:
            return
        del of_origin[connection]
        if not of_origin:
            del self._waiting[origin]
        self._count_waiting(origin, len(of_origin) + 1, len(of_origin))

    def _count_waiting(self, origin: str, before: int, now: int) -> None:
        """Sorts an origin in by its new number, which differs by one: it takes the same time with 4,000 origins."""
        if before:
            del self._origins_with[before][origin]
            if not self._origins_with[before]:
                del self._origins_with[before]
        if now:
            self._origins_with.setdefault(now, {})[origin] = None
        if now > self._most_waiting or self._most_waiting not in self._origins_with:
            self._most_waiting = now
