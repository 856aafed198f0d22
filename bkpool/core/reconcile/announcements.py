"""Which leases are to be announced as made: each one once, when its holder can use the worker.

A status tells too little for that: it is written later than the lease, or not at all. So when another controller
begins, an event may be missing, or recorded again. A lease that ends before this controller has taken it over gets no
event but that of its end. It records nothing itself.
"""

from __future__ import annotations

from datetime import datetime

from bkpool.core.names import Key
from bkpool.core.worker import Phase, Worker


class Announcements:
    """The leases that one controller has announced, or has found announced when it began."""

    def __init__(self) -> None:
        self._announced: dict[Key, str] = {}
        """By worker: the id of its lease; empty if it had none."""
        self._waiting: dict[Key, Worker] = {}

    def look(self, key: Key, worker: Worker | None, now: datetime) -> None:
        """Takes note of how a worker is at this time; None: it was deleted, or cannot be read."""
        if worker is None:
            self._announced.pop(key, None)
            return
        lease, first_look = worker.lease, key not in self._announced
        if lease is None:
            self._announced[key] = ""
        elif first_look and worker.status.phase in {Phase.ALLOCATED, Phase.DRAINING}:
            self._announced[key] = lease.id  # by the controller before this one
        elif self._announced.get(key) != lease.id and worker.routable_endpoint is not None and not lease.ended(now):
            self._announced[key] = lease.id
            self._waiting[key] = worker

    def take(self) -> list[Worker]:
        """The workers whose lease is to be announced now."""
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())
