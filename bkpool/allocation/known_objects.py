"""What is known of a pool or a worker by its name: it is there, it is not there, or it cannot be read.

It looks at the copy in memory only, and decides nothing.
"""

from __future__ import annotations

from bkpool.core.errors import NotFound
from bkpool.core.names import Key
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker
from bkpool.store.mirror import Mirror


def known_worker(mirror: Mirror, key: Key) -> Worker | None:
    """The worker of that name; None if there is none. Raises UnreadableObject if it cannot be read."""
    if found := mirror.unreadable_workers.get(key):
        raise UnreadableObject(found)
    return mirror.workers.get(key)


def unusable_workers(mirror: Mirror, pool: Key) -> str:
    """The end of a sentence about a pool without a free worker: which cannot be used; empty if all can be."""
    found = mirror.unreadable_of(pool)
    return f", and {len(found)} of them cannot be used: {found[0].message}" if found else ""


def missing_pool(mirror: Mirror, key: Key) -> NotFound | UnreadableObject:
    """The error for a pool that the mirror does not have: it does not exist, or it cannot be read."""
    if found := mirror.unreadable_pools.get(key):
        return UnreadableObject(found)
    return NotFound(
        f"there is no pool {key.name!r} in namespace {key.namespace!r}",
        hint="`bkpool status` lists the pools.",
        field="poolName",
    )
