"""What the rest of bkpool may ask about the caches of workers: directories on this machine, or volume claims.

A cache belongs to a slot and has one owner. It never goes to another owner: it is wiped first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from bkpool.core.names import Slot
from bkpool.core.observation import SeenCache


class Caches(Protocol):
    """The caches of all slots. Calls for one slot run one after another, also with those of `Daemons`."""

    def owners(self) -> Mapping[Slot, str | None]:
        """Every cache that outlives its daemon, with the digest of its owner; None: nobody has used it.

        It comes from memory, without I/O.
        """

    def cache(self, slot: Slot) -> SeenCache | None:
        """The cache of one slot that outlives its daemon; None: there is none. It comes from memory, without I/O."""

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back with a slot, in the event loop, whenever what `owners()` says of it may have changed.

        Returns:
            A function that unsubscribes.
        """

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes durably that the cache in a slot, which nobody has used, now belongs to an owner.

        Args:
            slot: Which slot.
            owner: Digest of the owner.

        Raises:
            Conflict: It belongs to another owner.
            NotFound: The worker is gone.
        """

    async def wipe(self, slot: Slot) -> None:
        """Stops the daemon in a slot and removes the cache.

        A crash in between is completed by the next call, or by the next `Runtime.adopt()`.
        """
