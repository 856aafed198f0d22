"""Workers in memory, for measurements of everything but workers: each daemon is ready as soon as it is started.

`MemoryWorkers` implements the protocols Daemons and Caches (bkpool/workers). It starts no process, and nothing in it
ever fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from bkpool.core.names import Slot
from bkpool.core.observation import MOST_STARTS, DaemonState, Observation, SeenCache, WorkerCapacity
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.subscribers import Subscribers
from bkpool.workers import ReportWaiting


class MemoryWorkers:
    """Daemons that exist as observations only, and their caches as owners only."""

    capacity: WorkerCapacity | None = None
    starts_at_once = MOST_STARTS
    ignored_spec_fields: Collection[str] = ()

    def __init__(self) -> None:
        self._daemons: dict[Slot, Observation] = {}
        self._owners: dict[Slot, str | None] = {}
        self._subscribers: Subscribers[[Slot]] = Subscribers()

    def put(self, slot: Slot, worker_uid: str, owner: str | None) -> str:
        """Lets a daemon run in a slot, on a cache of this owner. Returns its endpoint."""
        endpoint = f"unix:///{slot.pool}/{slot.number}"
        self._owners[slot] = owner
        self._set(slot, Observation(worker_uid, DaemonState.READY, endpoint, owner))
        return endpoint

    def ignored_config(self, _spec: PoolSpec) -> list[str]:
        """See Daemons. The methods below without a description are described there, too."""
        return []

    def observe(self) -> Mapping[Slot, Observation]:
        return dict(self._daemons)

    def seen(self, slot: Slot) -> Observation | None:
        return self._daemons.get(slot)

    def owners(self) -> Mapping[Slot, str | None]:
        return dict(self._owners)

    def cache(self, slot: Slot) -> SeenCache | None:
        return SeenCache(self._owners[slot]) if slot in self._owners else None

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        return self._subscribers.add(callback)

    async def watch_health(self) -> None:
        await asyncio.Event().wait()

    async def answers(self, slot: Slot, worker_uid: str, *, fresh: bool = True) -> bool:  # noqa: ARG002 - as Daemons
        seen = self._daemons.get(slot)
        return seen is not None and seen.worker_uid == worker_uid

    async def start(
        self, slot: Slot, worker_uid: str, owner: str | None, _pool: Pool, _report_waiting: ReportWaiting
    ) -> str:
        return self.put(slot, worker_uid, self._owners.get(slot) if owner is None else owner)

    async def own(self, slot: Slot, owner: str) -> None:
        self._owners[slot] = owner
        self._set(slot, replace(self._daemons[slot], cache_owner=owner))

    async def follow(self, pool: Pool) -> None: ...

    async def protect(self, slot: Slot, *, held: bool) -> None: ...

    async def clear_history(self, slot: Slot) -> None: ...

    async def stop(self, slot: Slot, *, at_once: bool = False) -> None:  # noqa: ARG002 - as Daemons
        self._set(slot, None)

    async def wipe(self, slot: Slot) -> None:
        self._owners.pop(slot, None)
        self._set(slot, None)

    def _set(self, slot: Slot, seen: Observation | None) -> None:
        if seen is None:
            self._daemons.pop(slot, None)
        else:
            self._daemons[slot] = seen
        self._subscribers.notify(slot)
