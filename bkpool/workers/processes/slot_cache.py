"""The step by which the cache of one slot gets an owner. The caller holds the slot's lock.

It is on disk before the owner uses the cache, so a crash never leaves a cache whose owner is unknown.
"""

from __future__ import annotations

from dataclasses import replace

from bkpool.workers.processes.slot_files import CacheRecord
from bkpool.workers.processes.slot_threads import FileWork
from bkpool.workers.processes.slots import ProcessSlot, SlotTable


async def assign_owner(table: SlotTable, slot: ProcessSlot, owner: str | None) -> None:
    """Writes durably that the cache belongs to an owner.

    Args:
        table: Has the slot, and calls back after the change.
        slot: The slot; its cache does not belong to another owner.
        owner: Digest of the owner; None: the owner stays as they are.

    Raises:
        HostFault: It cannot be written.
    """
    record = CacheRecord.of(owner or (slot.cache.owner if slot.cache else None))
    if record == slot.cache:
        return
    await table.threads.run(FileWork.RECORD, slot.files.slot, slot.files.write_cache, record)
    slot.cache = record
    if slot.observation:
        slot.observation = replace(slot.observation, cache_owner=record.owner)
    table.changed(slot.files.slot)
