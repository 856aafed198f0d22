"""What is known of a pool or a worker by its name: it is there, it is not there, or it cannot be read.

It looks at the copy in memory only, and decides nothing.
"""

from __future__ import annotations

from bkpool.core.errors import Gone, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.removal import refusal, removal_of
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


def find_lending_pool(mirror: Mirror, key: Key) -> Pool:
    """The pool of that name, which may give a new lease. Raises the error of `no_lease_from` if there is none."""
    pool = mirror.pools.get(key)
    if pool is None or removal_of(pool) is not None:
        raise no_lease_from(mirror, key)
    return pool


def no_lease_from(mirror: Mirror, key: Key) -> NotFound | UnreadableObject | Gone:
    """The error for requests that wait for a pool that gives no lease any more: it is not there, or being removed."""
    pool = mirror.pools.get(key)
    return missing_pool(mirror, key) if pool is None else refusal(pool)


def missing_pool(mirror: Mirror, key: Key) -> NotFound | UnreadableObject:
    """The error for a pool that the mirror does not have: it does not exist, or it cannot be read."""
    if found := mirror.unreadable_pools.get(key):
        return UnreadableObject(found)
    return NotFound(
        f"there is no pool {key.name!r} in namespace {key.namespace!r}",
        hint="`bkpool status` lists the pools.",
        field="poolName",
    )
