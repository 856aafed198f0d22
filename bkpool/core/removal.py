"""The removal of a pool: what marks a pool that is being removed, when its caches go, and when it is gone. Pure.

A pool that is being removed gives out no lease and lets nobody in but the admin. The leases that it has go on. Its
caches stay for a day, so that a pool that was left out of a file by mistake is whole again when it is named again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from bkpool.core.errors import Gone
from bkpool.core.names import ANNOTATION_REMOVE_CACHES, ANNOTATION_REMOVING, ANNOTATION_SOURCE, Slot
from bkpool.core.pool import Pool

CACHES_KEPT = timedelta(hours=24)
"""How long the caches of a removed pool stay after its last lease, and at least after its removal has begun."""
AT_ONCE = "at-once"
"""The value of ANNOTATION_REMOVE_CACHES if they are not kept."""
FROM_FILE = "file"
"""The value of ANNOTATION_SOURCE on a pool of a file of `up -f`."""
OWN_ANNOTATIONS = frozenset({ANNOTATION_REMOVING, ANNOTATION_REMOVE_CACHES, ANNOTATION_SOURCE})
"""The annotations that only bkpool sets."""

REASON = "the pool is being removed: no file of the last `bkpool up -f` names it, or `bkpool pool delete` deleted it"


@dataclass(frozen=True, slots=True)
class RemovalMark:
    """A pool is being removed."""

    since: datetime
    caches_at_once: bool = False
    """Its caches are not kept."""

    def caches_go_at(self, last_lease: datetime | None) -> datetime:
        """When caches go that somebody has used, if the pool has no lease.

        Args:
            last_lease: When the pool's last lease left its worker; None: not known.
        """
        begun = max(self.since, last_lease or self.since)
        return begun if self.caches_at_once else begun + CACHES_KEPT


def removal_of(pool: Pool) -> RemovalMark | None:
    """The removal of the pool; None if it stays."""
    given = pool.metadata.annotations.get(ANNOTATION_REMOVING)
    if given is None:
        return None
    try:
        since = datetime.fromisoformat(given)
    except ValueError:
        return None
    if since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    return RemovalMark(since, pool.metadata.annotations.get(ANNOTATION_REMOVE_CACHES) == AT_ONCE)


def being_removed(pool: Pool, now: datetime, *, caches_at_once: bool = False) -> Pool:
    """The pool with the mark of a removal. One that began before goes on, perhaps without keeping caches."""
    begun = removal_of(pool) or RemovalMark(now)
    marks = {ANNOTATION_REMOVING: begun.since.isoformat(timespec="seconds")}
    if caches_at_once or begun.caches_at_once:
        marks[ANNOTATION_REMOVE_CACHES] = AT_ONCE
    return pool.but(metadata=pool.metadata.but(annotations={**pool.metadata.annotations, **marks}))


def is_from_file(pool: Pool) -> bool:
    """Whether the pool came from a file of `up -f`, so that it follows the files."""
    return pool.metadata.annotations.get(ANNOTATION_SOURCE) == FROM_FILE


def refusal(pool: Pool) -> Gone:
    """The error for a caller who wants a lease of a pool that is being removed."""
    return Gone(
        f"pool {pool.key.name!r} in namespace {pool.key.namespace!r} gives no more leases: {REASON}",
        hint="Use another pool. To keep this one, name it in a file of `bkpool up -f` again.",
        code="PoolRemoved",
        field="poolName",
    )


def caches_due(
    free: Mapping[Slot, str | None], removal: RemovalMark, leases: int, last_lease: datetime | None, now: datetime
) -> tuple[list[Slot], datetime | None]:
    """The slots whose cache goes now, and when time alone brings the next ones.

    A cache that nobody has used goes at once, any other when it is not kept any longer.

    Args:
        free: The caches of slots without a worker, with their owners.
        removal: The removal of the pool.
        leases: How many leases the pool has.
        last_lease: When the last one left its worker (`last_lease_at`).
        now: The time.
    """
    unused = [slot for slot, owner in free.items() if owner is None]
    used = [slot for slot, owner in free.items() if owner is not None]
    if leases or not used:
        return unused, None
    due = removal.caches_go_at(last_lease)
    return (unused + used, None) if due <= now else (unused, due)


def last_lease_at(pool: Pool, last_end: datetime | None, leases: int, now: datetime) -> datetime | None:
    """When the pool's last lease left its worker, as the pool's status has it next; None: it never had one.

    It is taken from the workers, and from the pool's status, because workers are removed. The status also tells of a
    lease that has ended since it was written.

    Args:
        pool: The pool with its status as it is stored.
        last_end: When the last lease left one of its workers of today.
        leases: How many leases it has.
        now: The time.
    """
    known = max((end for end in (last_end, pool.status.last_lease_at) if end is not None), default=None)
    if pool.status.allocated and not leases and known == pool.status.last_lease_at:
        return now  # the worker that had it is gone already
    return known


def what_happens(pool: Pool, removal: RemovalMark, leases: int, last_end: datetime | None, now: datetime) -> str:
    """One sentence for a person about what is left of a removed pool, and until when.

    Args:
        pool: The pool with its status as it is stored.
        removal: Its removal.
        leases: How many leases it has.
        last_end: When the last lease left one of its workers of today.
        now: The time.
    """
    return "; ".join(("it is being removed", *_parts(pool, removal, leases, last_end, now)))


def _parts(pool: Pool, removal: RemovalMark, leases: int, last_end: datetime | None, now: datetime) -> Iterator[str]:
    if removal.caches_at_once:
        yield "its builds are cut and its caches are deleted now"
        return
    if leases:
        yield f"{leases} lease{'s go' if leases > 1 else ' goes'} on; its caches are deleted 24 h after the last one"
    else:
        at = removal.caches_go_at(last_lease_at(pool, last_end, leases, now))
        yield f"its caches are deleted at {at:%Y-%m-%d %H:%M} UTC"
    yield "a file of `up -f` that names it keeps it"
