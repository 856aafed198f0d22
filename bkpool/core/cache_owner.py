"""Who owns a cache: the tenant, the whole pool, or one lease, depending on the pool's `cache.reuse`.

Owners are compared by digest only. No cache is ever given to another owner without being wiped. Several tenants may
share a cache; the owner's digest also says whether they may read each other's build history.
"""

from __future__ import annotations

from bkpool.core.errors import Conflict
from bkpool.core.pool import Reuse
from bkpool.core.tokens import owner_digest


def cache_owner_digest(reuse: Reuse, tenant: str, pool_uid: str, lease_id: str, *, keep_history: bool = False) -> str:
    """The digest of the owner of the cache that a lease uses.

    With reuse `never` each lease is a separate owner. So the rule "no cache goes to another owner" wipes the cache
    after each lease.

    Args:
        reuse: The pool's `cache.reuse`.
        tenant: The caller's tenant.
        pool_uid: The pool.
        lease_id: The lease.
        keep_history: The pool's `cache.keepHistory`. A change of it is a change of the owner, so a history that was
            kept is wiped with its cache when it may not be read any more.
    """
    match reuse:
        case Reuse.IDENTITY:
            return owner_digest(f"tenant\0{tenant}")
        case Reuse.POOL:
            return owner_digest(f"pool\0{pool_uid}") if keep_history else _without_history(pool_uid)
        case Reuse.NEVER:
            return owner_digest(f"lease\0{lease_id}")


def history_ends_with_lease(owner: str | None, pool_uid: str) -> bool:
    """Whether the builds of a lease must leave the history before the next lease on the same cache.

    Args:
        owner: The digest of the owner of the cache.
        pool_uid: The pool of the worker.
    """
    return owner == _without_history(pool_uid)


def _without_history(pool_uid: str) -> str:
    """The digest of all tenants of a pool who share a cache, but not their history."""
    return owner_digest(f"pool\0{pool_uid}\0without history")


def must_be_wiped(holder: str | None, owner: str | None) -> bool:
    """Whether a cache must be wiped before it is used.

    Args:
        holder: The digest of the owner that the cache has; None: nobody has used it.
        owner: The digest of the next owner; None: nobody yet.
    """
    return owner is not None and holder not in {None, owner}


def belongs_to_another(cache: str) -> Conflict:
    """The error for a cache that somebody tried to give to another owner without wiping it.

    Args:
        cache: Names it for a reader.
    """
    return Conflict(f"the cache of {cache} belongs to another owner", hint="It must be wiped first.")
