"""For how long leases that no caller has look as they do now, as one controller has seen it.

An API replica that is alive changes such a lease again and again. So nobody has to know which replicas there are, and
the clocks of two machines are never compared. After a start everything is new, so nothing ends at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from bkpool.core.worker import Undelivered, Worker

LONGEST_STEP = timedelta(seconds=30)
"""What one pause between two looks counts at most: a machine that slept for hours renewed nothing meanwhile."""


class UndeliveredLeases:
    """What one controller has seen of them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Undelivered, timedelta]] = {}
        self._looked_at: datetime | None = None

    def look(self, workers: Iterable[Worker], now: datetime) -> Mapping[str, timedelta]:
        """Looks at all workers. While there are such leases, the next look is at most `LONGEST_STEP` later.

        Returns:
            For the id of each lease that no caller is known to have: for how long it has been unchanged.
        """
        passed = timedelta(0)
        if self._looked_at is not None:
            passed = min(max(now - self._looked_at, timedelta(0)), LONGEST_STEP)
        self._looked_at = now
        before, self._seen = self._seen, {}
        for worker in workers:
            lease, undelivered = worker.lease, worker.undelivered
            if lease is None or undelivered is None:
                continue
            earlier, unchanged_for = before.get(lease.id, (None, timedelta(0)))
            self._seen[lease.id] = undelivered, unchanged_for + passed if earlier == undelivered else timedelta(0)
        return {lease_id: unchanged_for for lease_id, (_, unchanged_for) in self._seen.items()}
