"""Works out what a change of the store's copy changes in the gateway's table of leases.

It notes which pools and workers have changed, so that a burst of changes costs one look at each of them. It never
waits, writes nothing, and gives nothing to the gateway itself. What concerns many workers comes in parts: leases that
have ended first.
"""

from __future__ import annotations

from itertools import chain, islice
from types import MappingProxyType
from typing import NamedTuple

from bkpool.core.names import Key
from bkpool.core.pool import PoolGateway
from bkpool.core.worker import EndReason, Worker
from bkpool.gateway.session.lease_table import TableChange, WorkerLeases, leases_of, unreadable_leases
from bkpool.store.mirror import Mirror, MirrorChange

_DEFAULTS = PoolGateway()
"""For the workers of a pool that does not exist or cannot be read."""


AT_ONCE = 32
"""Workers of which one change of the table has news: about 2 ms for each loop (rule 16, docs/rules.md#r16)."""


class _State(NamedTuple):
    """What the table has of a worker's lease. If it changes, connections of the lease may have to end."""

    id: str
    end_reason: EndReason | None
    ended: bool


class LeaseFeed:
    """The changes of the table of leases. The first ones have all pools and workers that there are.

    A lease of the table that has ended comes before everything else, so that its connections are cut soon however
    many other workers have changed.

    Args:
        mirror: Has pools and workers.
    """

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._first: dict[Key, None] = {}
        """Those that come first: their lease in the table has ended, or somebody waits for it (`hurry`)."""
        self._workers: dict[Key, None] = {}
        """Those that have changed, in the order in which they did."""
        self._behind = dict.fromkeys((*mirror.workers, *mirror.unreadable_workers))
        """Those of which the table may have something else because of their pool. The others come before them."""
        self._pools: set[Key] = {*mirror.pools, *mirror.unreadable_pools}
        self._gateways: dict[Key, PoolGateway] = {}
        self._existing: frozenset[Key] = frozenset()
        # Unreadable workers in no slot: the mirror does not name them in its changes.
        self._slotless: set[Key] = set()
        self._taken: dict[Key, _State] = {}
        """The leases that workers had when `take` returned them last."""

    def note(self, change: MirrorChange) -> None:
        """Notes that a pool or a worker has changed (`Mirror.subscribe`)."""
        if change.slot is None:
            self._pools.add(change.pool)
        else:
            worker = change.slot.worker
            (self._first if self._has_ended(worker) else self._workers)[worker] = None

    def hurry(self, token_sha256: str) -> bool:
        """Makes the worker with this lease, or that had it, the next one that `take` returns.

        Returns:
            Whether there is one.
        """
        worker = self._mirror.leases.worker_of(token_sha256)
        if worker is not None:
            self._first = {worker: None} | self._first
        return worker is not None

    @property
    def has_more(self) -> bool:
        """Whether something is left that `take` did not return yet."""
        return bool(self._pools or self._first or self._workers or self._behind)

    def take(self) -> TableChange | None:
        """Returns what has changed in the table since the last call, of `AT_ONCE` workers at most; None: nothing."""
        existing = self._existing
        pools, self._pools = self._pools, set()
        for pool in pools:
            self._behind |= self._concerned(pool)
        workers = {*islice(chain(self._first, self._workers, self._behind), AT_ONCE)}
        for worker in workers:
            self._first.pop(worker, None)
            self._workers.pop(worker, None)
            self._behind.pop(worker, None)
        workers |= self._slotless
        self._slotless = {key for key in workers if self._is_slotless(key)}
        if not workers and self._existing == existing:
            return None
        return TableChange(MappingProxyType({key: self._leases_of(key) for key in workers}), self._existing)

    def _concerned(self, pool: Key) -> dict[Key, None]:
        """Takes over a pool, and returns the workers of which the table has something else now, or may have."""
        mirror = self._mirror
        exists = pool in mirror.pools or pool in mirror.unreadable_pools
        if exists != (pool in self._existing):
            self._existing ^= {pool}
        concerned = dict.fromkeys(found.key for found in mirror.unreadable_of(pool) if found.slot is None)
        before = self._gateways.pop(pool, _DEFAULTS)
        if pool in mirror.pools:
            self._gateways[pool] = mirror.pools[pool].spec.gateway
        if self._gateways.get(pool, _DEFAULTS) != before:
            leased = (worker.key for worker in mirror.workers_of(pool) if worker.lease is not None)
            concerned |= dict.fromkeys(leased)
        return concerned

    def _has_ended(self, worker: Key) -> bool:
        """Whether the lease that the table has of a worker has ended, in a way that the table does not know."""
        taken = self._taken.get(worker)
        return taken is not None and taken != _state(self._mirror.workers.get(worker))

    def _is_slotless(self, worker: Key) -> bool:
        found = self._mirror.unreadable_workers.get(worker)
        return found is not None and found.slot is None

    def _leases_of(self, key: Key) -> WorkerLeases:
        worker = self._mirror.workers.get(key)
        state = _state(worker)
        if state is None:
            self._taken.pop(key, None)
        else:
            self._taken[key] = state
        if worker is not None:
            return leases_of(worker, self._gateways.get(worker.pool, _DEFAULTS))
        found = self._mirror.unreadable_workers.get(key)
        return WorkerLeases() if found is None else unreadable_leases(found)


def _state(worker: Worker | None) -> _State | None:
    lease = worker.lease if worker is not None else None
    return None if lease is None else _State(lease.id, lease.end_reason, lease.ended_at is not None)
