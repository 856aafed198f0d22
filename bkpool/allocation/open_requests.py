"""Counts the requests that are open for each lease, to find leases that nobody knows of.

Two requests with the same jobId share one lease. When the last of them goes away and none was answered, no caller
knows the lease, and it must end.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Lease:
    requests: int = 0
    known: bool = False
    """A caller knows the lease, or may know it."""


class OpenRequests:
    """The leases that requests of this replica wait for, by lease id."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._leases

    def add(self, lease_id: str, *, known: bool) -> None:
        """Notes one more request for a lease.

        Args:
            lease_id: The lease.
            known: The lease existed before this request, so a caller may have its token already.
        """
        lease = self._leases.setdefault(lease_id, _Lease(known=known))
        lease.requests += 1

    def answered(self, lease_id: str) -> None:
        """Notes that a caller gets the lease, and so knows it."""
        self._leases[lease_id].known = True

    def remove(self, lease_id: str) -> bool:
        """Notes that one request for the lease is finished. Returns whether the lease must end: nobody knows it."""
        lease = self._leases[lease_id]
        lease.requests -= 1
        if lease.requests:
            return False
        del self._leases[lease_id]
        return not lease.known
