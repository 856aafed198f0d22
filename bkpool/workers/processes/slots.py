"""The slots of one home, in memory: what is known of each, who is called when it changes, and who does its file work.

Nothing here starts or removes anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bkpool.core.names import Slot
from bkpool.core.observation import Observation
from bkpool.core.subscribers import Subscribers
from bkpool.workers.processes.daemon import Daemon
from bkpool.workers.processes.slot_files import CacheRecord, SlotFiles
from bkpool.workers.processes.slot_threads import SlotThreads


@dataclass(slots=True)
class ProcessSlot:
    """A slot in memory. Whoever changes it holds its lock."""

    files: SlotFiles
    cache: CacheRecord | None = None
    """None: there is no cache."""
    daemon: Daemon | None = None
    exit_watch: asyncio.Task[None] | None = None
    """Waits for the daemon's exit."""
    observation: Observation | None = None
    cache_identity: tuple[int, int] | None = None
    """That of the daemon's cache, see `slot_upkeep.identity`."""
    confinement: str = ""
    """That of the daemon, see `DaemonRecord`."""
    reach: str = ""
    """The same."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """The worker's name, for the log."""
        return str(self.files.slot.worker)


class SlotTable:
    """All slots that were used or found since the start.

    Args:
        home: BKPOOL_HOME.
        threads: Do the file work of the slots.
    """

    def __init__(self, home: Path, threads: SlotThreads) -> None:
        self.home = home
        self.threads = threads
        self._slots: dict[Slot, ProcessSlot] = {}
        self.subscribers: Subscribers[[Slot]] = Subscribers()
        """Called with each slot that may have changed."""

    def get(self, slot: Slot) -> ProcessSlot:
        """The slot; the first call reads from disk who owns its cache."""
        if slot not in self._slots:
            files = SlotFiles(self.home, slot)
            self._slots[slot] = ProcessSlot(files, files.read_cache())
        return self._slots[slot]

    def find(self, slot: Slot) -> ProcessSlot | None:
        """The slot, if it was used or found; None: nothing is known of it."""
        return self._slots.get(slot)

    def __iter__(self) -> Iterator[ProcessSlot]:
        return iter(list(self._slots.values()))

    def clear(self) -> None:
        """Forgets all slots; nothing on disk changes."""
        self._slots.clear()

    def changed(self, slot: Slot) -> None:
        """Tells the subscribers that this slot may have changed."""
        self.subscribers.notify(slot)
