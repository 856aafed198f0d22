"""What the rest of bkpool may ask of whatever runs buildkitd: processes here, pods in a cluster.

A runtime never decides: it brings a slot to the state it is told, and guarantees one thing by itself, that nobody is
ever given another owner's cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from bkpool.core.names import Slot
from bkpool.core.observation import DaemonState, Observation, WorkerCapacity
from bkpool.core.pool import Pool

__all__ = ["DaemonState", "Observation", "Runtime", "Told", "WorkerCapacity"]

Told = Callable[[str], Awaitable[None]]
"""Told what a worker on its way waits for, each time that this changes; "" when it waits for nothing any more."""


class Runtime(Protocol):
    """Runs at most one buildkitd in a slot. Slots are independent; calls for one slot are made one after another."""

    async def adopt(self) -> None:
        """Finds what earlier runs of the appliance left: living daemons are taken over, half-made things undone."""

    def observe(self) -> Mapping[Slot, Observation]:
        """What is known to be there. From memory: no I/O."""

    def caches(self) -> Mapping[Slot, str | None]:
        """The caches that exist, used or not, with the digest of their owner (None: clean). From memory."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back, in the event loop, whenever observe() or caches() may have changed."""

    @property
    def capacity(self) -> WorkerCapacity | None:
        """How many workers of all pools it can run at once; None: as many as there are resources."""

    @property
    def ignored_spec_fields(self) -> Collection[str]:
        """Paths below a pool's `spec` that nothing reads where this runtime runs, with everything below them."""

    async def start(self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, told: Told) -> str:
        """Brings buildkitd up in the slot and returns its endpoint once it answers a gRPC call.

        A cache of another owner is wiped before. `owner` None leaves a cache that has an owner to that owner: it is
        for a worker that nobody holds yet. Started already for this worker and owner: returns at once.

        Raises:
            WorkerFailed: It did not come up; the error's `log_tail` has the end of buildkitd's log.
            HostFault: This machine lacks something; the hint says what.
        """

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes durably that the clean cache in this slot is now `owner`'s.

        Raises:
            Conflict: It is another's.
        """

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Asks others to leave the worker alone while it is leased, or no longer; `Observation.protected` tells."""

    async def follow(self, pool: Pool) -> None:
        """Brings what the workers of a pool have in common to a spec that may have changed.

        Raises:
            WorkerFailed: It cannot be; the message names the field.
        """

    async def stop(self, slot: Slot) -> None:
        """Ends buildkitd in the slot; the cache stays. Nothing there: does nothing."""

    async def wipe(self, slot: Slot) -> None:
        """Stops buildkitd and empties the cache. A crash in between is finished by the next call or by adopt()."""

    async def close(self, *, stop_workers: bool) -> None:
        """Lets go of everything; with stop_workers also ends every buildkitd that would not outlive this process."""
