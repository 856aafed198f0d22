"""How much of a pool one caller may have where its spec says nothing, so that one cannot lock out all others.

The admin has no such limit. It counts nothing: allocation and the queue do.
"""

from __future__ import annotations

from bkpool.core.pool import PoolSpec


def most_leases(spec: PoolSpec, *, admin: bool) -> int | None:
    """How many leases one caller may have before their requests wait, although a worker is free.

    One worker is left for others, if there are several. None: no such limit, for the admin or because
    `spec.auth.limits.identity.leases` is given, above which a request is refused.
    """
    if admin or spec.auth.limits.identity.leases is not None:
        return None
    return max(1, spec.scaling.max - 1)


def most_waiting(spec: PoolSpec, *, admin: bool, places: int) -> int | None:
    """How many requests of one caller may wait; one more is refused. None: no limit.

    Args:
        spec: The pool's.
        admin: Whether the caller is the admin.
        places: Requests that may wait for the pool in all. By default one caller gets at most half of them.
    """
    if admin:
        return None
    given = spec.auth.limits.identity.waiters
    return given if given is not None else max(1, min(2 * spec.scaling.max, places // 2))
