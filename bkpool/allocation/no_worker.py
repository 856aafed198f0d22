"""Why a request got no worker, in words: the pool is full, its caller has their share, or something is slow.

It only makes the errors. It decides nothing and waits for nothing.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from bkpool.allocation.known_objects import unusable_workers
from bkpool.core.caller_share import most_leases
from bkpool.core.durations import render
from bkpool.core.errors import NoCapacity, Unavailable
from bkpool.core.names import Key
from bkpool.core.shown_worker import shown_message, shown_phase
from bkpool.core.worker import Worker
from bkpool.identity import Identity
from bkpool.store.mirror import Mirror

_RETRY_AFTER = 30  # seconds


def store_is_slow(pool: Key, wait: timedelta) -> Unavailable:
    """The store has not written the claim of a free worker in time."""
    return Unavailable(
        f"pool {pool.name!r} has a free worker, but the store did not write the lease within {render(wait)}",
        hint="Wait longer. If it happens again, another program has locked the store, or its disk is slow.",
        retry_after=_RETRY_AFTER,
    )


def job_is_unknown(pool: Key, wait: timedelta) -> Unavailable:
    """The store, or its watch, has not told in time which lease a job has."""
    return Unavailable(
        f"the store is slow: it did not say within {render(wait)} which worker of pool {pool.name!r} this job has",
        hint="Wait longer. If it happens again, look at the log for watches that are interrupted. After two replicas "
        "of the API were killed, a job may have to wait for 2 minutes.",
        retry_after=_RETRY_AFTER,
    )


def not_ready(worker: Worker, wait: timedelta, now: datetime) -> NoCapacity:
    """The leased worker was not ready in time."""
    why = shown_message(worker, now) or f"it is {shown_phase(worker, now).value}"
    return NoCapacity(
        f"{worker.key.name} of pool {worker.pool.name!r} was not ready within {render(wait)}: {why}",
        hint=f"Wait longer. `bkpool logs {worker.key.name}` shows what its buildkitd wrote.",
        retry_after=_RETRY_AFTER,
    )


def none_free(mirror: Mirror, caller: Identity, pool: Key, wait: timedelta, now: datetime) -> NoCapacity:
    """No worker became free in time; with a wait of zero, none was ready.

    Args:
        mirror: The copy of the store.
        caller: Who asked. They may have as many leases as one caller gets.
        pool: The pool that they asked for.
        wait: How long they waited.
        now: The time.
    """
    if (most := _reached_share(mirror, caller, pool, now)) is not None:
        return _has_their_share(caller, pool, most, wait)
    if wait <= timedelta(0):
        return NoCapacity(
            f"no worker of pool {pool.name!r} is ready now{unusable_workers(mirror, pool)}",
            hint="Wait for some time (`--wait 1m`), so that a worker can be started or emptied.",
            retry_after=_RETRY_AFTER,
        )
    return NoCapacity(
        f"no worker of pool {pool.name!r} became free within {render(wait)}{unusable_workers(mirror, pool)}",
        hint="Wait longer, or raise spec.scaling.max of the pool.",
        retry_after=_RETRY_AFTER,
    )


def _reached_share(mirror: Mirror, caller: Identity, key: Key, now: datetime) -> int | None:
    """How many leases the caller has, if one more is only for others; else None."""
    pool = mirror.pools.get(key)
    most = most_leases(pool.spec, admin=caller.admin) if pool else None
    if pool is None or most is None or most == pool.spec.scaling.max:
        return None
    return most if mirror.index_of(key).leases.count_of(caller.digest, now) >= most else None


def _has_their_share(caller: Identity, pool: Key, most: int, wait: timedelta) -> NoCapacity:
    field = "spec.auth.limits.identity.leases"
    return NoCapacity(
        f"{field}: {caller.name} has {most} of the {most + 1} workers of pool {pool.name!r}, one "
        f"caller gets no more, and none of these leases ended within {render(wait)}",
        hint="Release a lease, or ask the operator of the appliance to set this limit of the pool.",
        code="LimitReached",
        field=field,
        retry_after=_RETRY_AFTER,
    )
