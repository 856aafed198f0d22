"""For how long leases that no caller has look as they do now, as one controller has seen it.

An API replica that is alive changes such a lease again and again. So nobody has to know which replicas there are, and
the clocks of two machines are never compared. After a start everything is new, so nothing ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Protocol

from bkpool.core.names import Key
from bkpool.core.worker import Undelivered, Worker

LONGEST_STEP = timedelta(seconds=30)
"""What one pause between two looks counts at most: a machine that slept for hours renewed nothing meanwhile."""


class UndeliveredFor(Protocol):
    """For the id of each lease that no caller is known to have: for how long it has been unchanged."""

    def get(self, lease_id: str, /) -> timedelta | None:
        """For how long this one has; None: a caller has it, as far as is known."""


NONE_UNDELIVERED: UndeliveredFor = MappingProxyType({})


class UndeliveredLeases:
    """What one controller has seen of them.

    `pass_time` must be called at most `LONGEST_STEP` apart while there are such leases: a longer pause counts as one.
    """

    def __init__(self) -> None:
        self._of: dict[Key, str] = {}
        self._since: dict[str, tuple[Undelivered, timedelta]] = {}
        self._passed = timedelta(0)
        """How much time has passed in all, not counting that for which the machine slept."""
        self._looked_at: datetime | None = None

    def pass_time(self, now: datetime) -> None:
        """Counts the time that has passed since the last call."""
        if self._looked_at is not None:
            self._passed += min(max(now - self._looked_at, timedelta(0)), LONGEST_STEP)
        self._looked_at = now

    def look(self, key: Key, worker: Worker | None) -> None:
        """Takes note of a worker that has changed.

        Args:
            key: The worker's name.
            worker: The worker as it is now; None: it was deleted, or cannot be read.
        """
        known = self._of.pop(key, "")
        before = self._since.pop(known, None)
        if worker is None or worker.lease is None or worker.undelivered is None:
            return
        same = before is not None and known == worker.lease.id and before[0] == worker.undelivered
        since = before[1] if before is not None and same else self._passed
        self._of[key] = worker.lease.id
        self._since[worker.lease.id] = worker.undelivered, since

    def now(self) -> UndeliveredFor:
        """What is known of all of them."""
        return _Unchanged(self._since, self._passed)


@dataclass(frozen=True, slots=True)
class _Unchanged:
    since: dict[str, tuple[Undelivered, timedelta]]
    passed: timedelta

    def get(self, lease_id: str, /) -> timedelta | None:
        found = self.since.get(lease_id)
        return None if found is None else self.passed - found[1]
