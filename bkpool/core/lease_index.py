"""Finds leases by the digest of their token, whatever the number of workers. Pure; it is kept from change to change.

It has the leases that workers hold and those that they remember as ended. It never decides whether a lease is over.
"""

from __future__ import annotations

from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndedLease, Worker


class LeaseIndex:
    """The leases of all workers, also of those that cannot be read.

    The time of a look-up in a dict tells an attacker nothing: it depends on digests, and nobody can choose a token
    for a wanted digest. So there is no comparison in constant time.
    """

    def __init__(self) -> None:
        self._workers: dict[Key, Worker | Unreadable] = {}
        self._having: dict[str, tuple[Key, ...]] = {}
        """The workers that hold or remember a lease, in order: almost always one. A copied worker is a second one."""

    def put(self, key: Key, worker: Worker | Unreadable | None) -> None:
        """Takes over a worker as it is now; None: it was deleted."""
        before, after = _digests(self._workers.pop(key, None)), _digests(worker)
        if worker is not None:
            self._workers[key] = worker
        for digest in before - after:
            self._set_having(digest, {*self._having[digest]} - {key})
        for digest in after - before:
            self._set_having(digest, {*self._having.get(digest, ()), key})

    def find(self, digest: str) -> Worker | Unreadable | EndedLease | None:
        """The worker that holds the lease with this token digest; else what is remembered of the lease's end."""
        having = self._first(digest)
        if having is None or _held_digest(having) == digest or not isinstance(having, Worker):
            return having
        return next(ended for ended in having.ended_leases if ended.token_sha256 == digest)

    def worker_of(self, digest: str) -> Key | None:
        """The worker that holds the lease with this token digest, or else remembers its end."""
        having = self._first(digest)
        return having.key if having is not None else None

    def _first(self, digest: str) -> Worker | Unreadable | None:
        """A worker that holds the lease, best one that can be read; else one that remembers its end."""
        workers = [self._workers[key] for key in self._having.get(digest, ())]
        return min(workers, key=lambda one: (_held_digest(one) != digest, isinstance(one, Unreadable)), default=None)

    def _set_having(self, digest: str, workers: set[Key]) -> None:
        if workers:
            self._having[digest] = tuple(sorted(workers))
        else:
            del self._having[digest]


def _held_digest(worker: Worker | Unreadable) -> str:
    """The digest of the token of the lease on a worker; empty if there is none, or not yet."""
    if isinstance(worker, Unreadable):
        return worker.of_lease("tokenSHA256")
    return worker.lease.token_sha256 if worker.lease is not None else ""


def _digests(worker: Worker | Unreadable | None) -> frozenset[str]:
    """The digests of the tokens of all leases that a worker holds or remembers as ended."""
    if worker is None:
        return frozenset()
    ended = worker.ended_leases if isinstance(worker, Worker) else ()
    return frozenset({_held_digest(worker), *(one.token_sha256 for one in ended)}) - {""}
