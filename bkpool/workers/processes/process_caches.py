"""The caches of this machine: one directory in each slot, with a record of its owner beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bkpool.core.cache_owner import belongs_to_another
from bkpool.core.names import Slot
from bkpool.core.observation import SeenCache
from bkpool.workers.processes.process_daemons import ProcessDaemons
from bkpool.workers.processes.slot_cache import assign_owner
from bkpool.workers.processes.slots import SlotTable
from bkpool.workers.processes.wiping import Wiper


class ProcessCaches:
    """Implements `Caches` with directories.

    Args:
        table: The slots.
        wiper: Removes caches.
        daemons: Stops the daemon that uses a cache.
    """

    def __init__(self, table: SlotTable, wiper: Wiper, daemons: ProcessDaemons) -> None:
        self._table = table
        self._wiper = wiper
        self._daemons = daemons

    def owners(self) -> Mapping[Slot, str | None]:
        """The caches that exist, with their owners; see `Caches`."""
        return {slot.files.slot: slot.cache.owner for slot in self._table if slot.cache}

    def cache(self, slot: Slot) -> SeenCache | None:
        """The cache of one slot; see `Caches`."""
        entry = self._table.find(slot)
        return SeenCache(entry.cache.owner) if entry is not None and entry.cache else None

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when `owners()` may have changed; returns a function that unsubscribes. See `Caches`."""
        return self._table.subscribers.add(callback)

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes durably who owns the cache in a slot; see `Caches`."""
        entry = self._table.get(slot)
        async with entry.lock:
            if entry.cache and entry.cache.must_be_wiped_for(owner):
                raise belongs_to_another(str(slot.worker))
            await assign_owner(self._table, entry, owner)

    async def wipe(self, slot: Slot) -> None:
        """Stops buildkitd in the slot and removes its cache; see `Caches`."""
        entry = self._table.get(slot)
        async with entry.lock:
            await self._daemons.stop_locked(entry)
            await self._wiper.remove_cache(entry)
