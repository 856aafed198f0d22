"""Which writes may wait, and for how long: most leases are over before they are due, and then they are not needed.

A write waits only if nobody decides by it: a phase that follows from the lease, or the end of a pod's protection.
Each controller counts for itself for how long a lease has not changed, so clocks of two machines are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Protocol

from bkpool.core.names import Key
from bkpool.core.worker import Lease, Worker

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class WritePauses:
    """For how long something must hold before it is written."""

    phase: timedelta = timedelta(seconds=1)
    """A worker's phase after a change of its lease."""
    protected: timedelta = timedelta(seconds=30)
    """That a pod without a lease is not protected any more."""
    pool: timedelta = timedelta(seconds=1)
    """A pool's status after its last write. The first change is written at once."""


DEFAULT_PAUSES = WritePauses()


class LeaseSince(Protocol):
    """Since when each worker has the lease that it has, as it is; or since when it has none."""

    def get(self, key: Key, default: datetime, /) -> datetime:
        """Since when this one has; the default if it was not seen before."""


NONE_NOTED: LeaseSince = MappingProxyType({})

_LeaseNow = tuple[str, datetime | None] | None
"""What of a lease makes another phase: its id, and when it was ended. None: there is none."""


class SeenLeases:
    """Remembers since when one controller has seen the lease of each worker as it is. After a start all are new."""

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[_LeaseNow, float]] = {}

    def look(self, key: Key, worker: Worker | None, seconds: float) -> None:
        """Takes note of a worker that has changed.

        Args:
            key: The worker's name.
            worker: The worker as it is now; None: it was deleted, or cannot be read.
            seconds: Monotonic time.
        """
        if worker is None:
            self._seen.pop(key, None)
            return
        now = _of(worker.lease)
        if key not in self._seen or self._seen[key][0] != now:
            self._seen[key] = now, seconds

    def at(self, now: datetime, seconds: float) -> LeaseSince:
        """Since when each is as it is.

        Args:
            now: The time, in which the answer is given.
            seconds: Monotonic time of the same moment.
        """
        return _Since(self._seen, now, seconds)


@dataclass(frozen=True, slots=True)
class _Since:
    seen: Mapping[Key, tuple[_LeaseNow, float]]
    now: datetime
    seconds: float

    def get(self, key: Key, default: datetime, /) -> datetime:
        found = self.seen.get(key)
        return default if found is None else self.now - timedelta(seconds=self.seconds - found[1])


def due_at(worker: Worker, since: LeaseSince, pause: timedelta) -> datetime:
    """When something may be written that follows from the worker's lease, or from its having none."""
    return since.get(worker.key, _LONG_AGO) + pause


def _of(lease: Lease | None) -> _LeaseNow:
    return None if lease is None else (lease.id, lease.ended_at)
