"""The caches of a cluster: one volume claim for each slot, with its owner in an annotation.

A pool without a volume has caches that end with their pod. They are not listed: nobody can come back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bkpool.core.errors import NotFound
from bkpool.core.names import Slot
from bkpool.core.observation import SeenCache
from bkpool.workers.pods import pod_view
from bkpool.workers.pods.pod_slots import PodSlots
from bkpool.workers.pods.pod_writes import PodWrites


class PodCaches:
    """Implements `Caches` with volume claims.

    Args:
        slots: What is known of pods and claims.
        writes: Changes the cluster.
    """

    def __init__(self, slots: PodSlots, writes: PodWrites) -> None:
        self._slots = slots
        self._writes = writes

    def owners(self) -> Mapping[Slot, str | None]:
        """Every volume claim, with its owner; see `Caches`."""
        claims = [(pod_view.slot_in(claim), claim) for claim in self._slots.claims if not pod_view.deleted(claim)]
        return {slot: pod_view.cache_owner(claim) for slot, claim in claims if slot}

    def cache(self, slot: Slot) -> SeenCache | None:
        """The volume claim of one slot, with its owner; see `Caches`."""
        claim = self._slots.claims.get(slot.worker)
        if claim is None or pod_view.deleted(claim) or pod_view.slot_in(claim) != slot:
            return None
        return SeenCache(pod_view.cache_owner(claim))

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when `owners()` may have changed; returns a function that unsubscribes. See `Caches`."""
        return self._slots.subscribers.add(callback)

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes who owns the cache in a slot, and that its worker is leased; see `Caches`."""
        async with self._slots.get(slot).lock:
            pod = self._slots.pods.get(slot.worker)
            if pod is None:
                raise NotFound(f"the pod {slot.worker} is gone")
            await self._writes.own(pod, owner)

    async def wipe(self, slot: Slot) -> None:
        """Ends the pod and removes its volume; see `Caches`."""
        async with self._slots.get(slot).lock:
            await self._writes.end(slot)
            await self._writes.remove_secret(slot)
            await self._writes.remove_claim(slot)
