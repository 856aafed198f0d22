"""Which of the leases of one request was claimed first, as the changes of the workers tell. Pure.

Every replica gets the changes in the same order, so all of them find the same lease first (rule 2, docs/rules.md#r2).
It takes in nothing but lists and changes in their order: what a replica has written or read itself has no place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bkpool.core.names import LABEL_REQUEST, Key
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker


class Request(NamedTuple):
    """A request with a jobId: the pool that it names, and the digest of the caller and their jobId."""

    pool: Key
    key: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A lease that has not ended, and when it was claimed: at a version above `after`, and not above `until`."""

    worker: Worker
    request: Request
    after: int
    until: int

    @property
    def lease_id(self) -> str:
        """The lease."""
        return self.worker.held_lease.id

    def before(self, other: Claim) -> bool:
        """Whether this lease was certainly claimed before the other one."""
        return self.until <= other.after


class ClaimOrder:
    """The leases of requests with a jobId, as lists and changes have shown them up to now.

    A lease that is not in it, and was claimed at a version up to `reached`, has ended. It knows
    nothing of a worker that could not be read when it was first seen.
    """

    def __init__(self) -> None:
        self.reached = 0
        """Every change up to this version is known."""
        self._claims: dict[Key, Claim] = {}
        self._of: defaultdict[Request, dict[Key, Claim]] = defaultdict(dict)
        self._unseen: dict[Key, int] = {}
        """Workers that cannot be read: the version up to which each could be."""

    def listed(self, workers: Iterable[Worker | Unreadable], version: int) -> set[Request]:
        """Takes over a list of all workers. Returns the requests whose leases may have changed."""
        changed: set[Request] = set()
        if version < self.reached:  # the store is an earlier copy of itself: nothing is known of its changes
            changed.update(self._of)
            self._claims, self._of, self._unseen, self.reached = {}, defaultdict(dict), {}, 0
        missing = self._claims.keys() | self._unseen.keys()
        for worker in workers:
            missing.discard(worker.key)
            changed |= self._put(worker.key, worker)
        for key in missing:
            changed |= self._put(key, None)
        self.reached = version
        return changed

    def event(self, key: Key, worker: Worker | Unreadable | None, version: int) -> set[Request]:
        """Takes over a change. Returns the requests whose leases may have changed.

        Args:
            key: The worker's name.
            worker: The worker as it is now; None: it was deleted.
            version: The version of the change.
        """
        changed = self._put(key, worker)
        self.reached = max(self.reached, version)
        return changed

    def knows(self, request: Request, lease_id: str) -> bool:
        """Whether this lease of the request was seen and has not ended."""
        return any(claim.lease_id == lease_id for claim in self._of.get(request, {}).values())

    def first(self, request: Request, is_live: Callable[[Worker], bool]) -> Worker | None:
        """The worker with the lease that was certainly claimed before the request's other live leases.

        Args:
            request: The request.
            is_live: Whether the lease on this worker is live, as far as is known: it may have expired, or have ended
                in a change that was not delivered yet.

        Returns:
            The worker, perhaps an old copy of it. None: there is no live lease, or the order is not known.
        """
        live = [claim for claim in self._of.get(request, {}).values() if is_live(claim.worker)]
        for claim in live:
            if all(claim.before(other) for other in live if other is not claim):
                return claim.worker
        return None

    def _put(self, key: Key, worker: Worker | Unreadable | None) -> set[Request]:
        if isinstance(worker, Unreadable):  # what was known of its lease may still be so
            self._unseen.setdefault(key, self.reached)
            return set()
        since = self._unseen.pop(key, self.reached)
        before = self._claims.pop(key, None)
        if before is not None:
            self._take_out(key, before)
        now = None if worker is None else _claim_on(worker, before, since)
        if now is not None:
            self._claims[key] = self._of[now.request][key] = now
        return {claim.request for claim in (before, now) if claim is not None}

    def _take_out(self, key: Key, claim: Claim) -> None:
        del self._of[claim.request][key]
        if not self._of[claim.request]:
            del self._of[claim.request]


def _claim_on(worker: Worker, before: Claim | None, since: int) -> Claim | None:
    """The claim of the worker's lease; None if it has none, or one that was made without a jobId, or has ended.

    Args:
        worker: The worker as it is now.
        before: The claim that was known of it.
        since: The version up to which its changes are known.
    """
    lease, request_key = worker.lease, worker.metadata.labels.get(LABEL_REQUEST)
    if lease is None or lease.ended_at is not None or not request_key:
        return None
    request = Request(worker.pool, request_key)
    if before is not None and before.lease_id == lease.id:
        return Claim(worker, request, before.after, before.until)
    return Claim(worker, request, since, int(worker.metadata.resource_version or 0))
