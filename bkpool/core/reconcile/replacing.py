"""Which idle workers are started again, because their daemon was started with an earlier spec of their pool.

They are replaced a few at a time, so that enough others stay ready, whatever has changed: one pool's spec, or the way
in which a new version of bkpool makes the digest. Leased workers follow when their lease ends (`lease_end`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from datetime import datetime
from itertools import islice

from bkpool.core.names import Slot
from bkpool.core.observation import Observation, ready_observation
from bkpool.core.pool_index import last_used
from bkpool.core.worker import Phase, Worker

_SHARE = 4
"""At most one of so many idle workers of a pool is down for this, but at least one."""


class IdleDaemons:
    """The daemons of a pool's workers without a lease that are to stay."""

    def __init__(self) -> None:
        self._ready: set[Slot] = set()
        self._at_once: set[Slot] = set()
        self._outdated: list[tuple[datetime, Slot]] = []
        """Those that are ready and outdated, the least recently used first."""
        self._places: dict[Slot, tuple[datetime, Slot]] = {}

    def put(self, slot: Slot, worker: Worker | None, seen: Observation | None, *, busy: bool) -> None:
        """Takes note of a slot as it is now.

        Args:
            slot: The slot.
            worker: Its worker, if that has no lease and is to stay; else None.
            seen: What the runtime sees there.
            busy: An action is under way.
        """
        up = ready_observation(worker, seen) if worker is not None and not busy else None
        for slots, belongs in (
            (self._ready, up is not None),
            (self._at_once, up is not None and up.reaches_other),
        ):
            (slots.add if belongs else slots.discard)(slot)
        if (place := self._places.pop(slot, None)) is not None:
            del self._outdated[bisect_left(self._outdated, place)]
        if worker is not None and up is not None and up.outdated:
            self._places[slot] = place = (last_used(worker), slot)
            insort(self._outdated, place)

    @property
    def has_outdated(self) -> bool:
        """Whether one of them is outdated."""
        return bool(self._outdated)

    def to_replace(self, idle: int, restarts_left: int) -> set[Slot]:
        """The slots whose daemon is stopped now. Then it is started again as today's spec wants it.

        A daemon whose builds reach what the spec does not open is stopped at once. Of the others, the least recently
        used come first. If new ones do not start, they count as down, so the last ready ones are kept.

        Args:
            idle: How many workers without a lease are to stay.
            restarts_left: How many may be replaced now, beside what is under way in all pools.
        """
        down = idle - len(self._ready) + len(self._at_once)
        most = min(max(1, idle // _SHARE) - down, restarts_left)
        gradually = (slot for _, slot in self._outdated if slot not in self._at_once)
        return self._at_once | set(islice(gradually, max(0, most)))


def out_of_use(worker: Worker) -> Worker:
    """The worker as it is stored before its daemon is stopped: who leases it now waits for the next daemon."""
    return worker.with_status(phase=Phase.PENDING, endpoint=None, pod_ip=None)
