"""Finds leases by the digest of their token, whatever the number of workers. Pure; it is kept from change to change.

It has the leases that workers hold and those that they remember as ended. It never decides whether a lease is over.
"""

from __future__ import annotations

from collections.abc import Iterator

from bkpool.core.names import Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import EndedLease, Worker


class LeaseIndex:
    """The leases of all workers, also of those that cannot be read.

    The time of a look-up in a dict tells an attacker nothing: it depends on digests, and nobody can choose a token
    for a wanted digest. So there is no comparison in constant time.
    """

    def __init__(self) -> None:
        self._holders: dict[str, Worker | Unreadable] = {}
        self._ended: dict[str, tuple[Key, EndedLease]] = {}
        self._workers: dict[Key, Worker | Unreadable] = {}

    def put(self, key: Key, worker: Worker | Unreadable | None) -> None:
        """Takes over a worker as it is now; None: it was deleted."""
        before = self._workers.pop(key, None)
        if before is not None:
            self._forget(before)
        if worker is None:
            return
        self._workers[key] = worker
        if digest := _held_digest(worker):
            self._holders[digest] = worker
        self._ended.update((ended.token_sha256, (key, ended)) for ended in _ended_of(worker))

    def find(self, digest: str) -> Worker | Unreadable | EndedLease | None:
        """The worker that holds the lease with this token digest; else what is remembered of the lease's end."""
        found = self._holders.get(digest)
        if found is None and digest in self._ended:
            _, ended = self._ended[digest]
            return ended
        return found

    def worker_of(self, digest: str) -> Key | None:
        """The worker that holds the lease with this token digest, or else remembers its end."""
        if digest in self._holders:
            return self._holders[digest].key
        return self._ended[digest][0] if digest in self._ended else None

    def _forget(self, worker: Worker | Unreadable) -> None:
        digest = _held_digest(worker)
        if self._holders.get(digest) is worker:
            del self._holders[digest]
        for ended in _ended_of(worker):
            if ended.token_sha256 in self._ended and self._ended[ended.token_sha256][1] is ended:
                del self._ended[ended.token_sha256]


def _held_digest(worker: Worker | Unreadable) -> str:
    """The digest of the token of the lease on a worker; empty if there is none, or not yet."""
    if isinstance(worker, Unreadable):
        return worker.of_lease("tokenSHA256")
    return worker.lease.token_sha256 if worker.lease is not None else ""


def _ended_of(worker: Worker | Unreadable) -> Iterator[EndedLease]:
    """The ended leases that a worker remembers. Of two with the same token the first counts, so it comes last."""
    return reversed(worker.ended_leases) if isinstance(worker, Worker) else iter(())
