"""The waiting room of a pool: the requests that wait, and the slots that served requests are claiming.

`core.queueing.assign` decides who is served. This module only keeps the queue and wakes the requests that are served.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from bkpool.core.errors import NoCapacity
from bkpool.core.names import Slot
from bkpool.core.placement import Caches
from bkpool.core.pool import Pool
from bkpool.core.pool_index import PoolIndex
from bkpool.core.queueing import Target, assign, slot_of_target
from bkpool.core.worker import Worker

MAX_WAITERS = 1000
"""Requests that may wait for one pool at once; one more is refused (rule 11, docs/rules.md#r11)."""


@dataclass(eq=False, slots=True)
class Waiter:
    """One request that waits; a `queueing.QueuedRequest`."""

    owner: str
    request_key: str | None
    tenant: str
    holder: str
    admin: bool
    only_ready: bool = False
    waited: bool = False
    """Nothing was free for it at once."""
    served: asyncio.Future[Target] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Gets the worker or slot that the request was given."""


class WaitQueue:
    """The requests that wait for one pool at this replica.

    Args:
        max_waiters: Requests that may wait at once.
    """

    def __init__(self, max_waiters: int = MAX_WAITERS) -> None:
        self._max_waiters = max_waiters
        self._waiting: OrderedDict[Waiter, None] = OrderedDict()
        self._of_tenant: Counter[str] = Counter()  # how many of them wait
        self._claiming: dict[Slot, Waiter] = {}
        self._turns: OrderedDict[str, None] = OrderedDict()  # the tenants that wait, in the order of their turns

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, waiter: Waiter, *, first: bool = False) -> None:
        """Puts a request at the end of the queue, or at the front after another replica was faster to claim.

        The turn of a tenant who did not wait comes after those of all others.

        Raises:
            NoCapacity: The queue is full.
        """
        if len(self._waiting) >= self._max_waiters:
            raise NoCapacity(
                f"{len(self._waiting)} requests already wait for this pool",
                hint="Raise spec.scaling.max of the pool, or try again later.",
                code="TooManyWaiters",
                retry_after=30,
            )
        self._waiting[waiter] = None
        self._of_tenant[waiter.tenant] += 1
        self._turns.setdefault(waiter.tenant)
        if first:
            self._waiting.move_to_end(waiter, last=False)
            self._turns.move_to_end(waiter.tenant, last=False)

    def leave(self, waiter: Waiter) -> None:
        """Removes a request that no longer waits. What it was given already becomes free again."""
        if waiter in self._waiting:
            self._remove(waiter)
        if waiter.served.done() and not waiter.served.cancelled() and not waiter.served.exception():
            self.claim_ended(waiter)
        waiter.served.cancel()

    def is_claiming(self, request_key: str) -> bool:
        """Whether a request with this key is claiming what it was given."""
        return any(waiter.request_key == request_key for waiter in self._claiming.values())

    def claim_ended(self, waiter: Waiter) -> bool:
        """Notes that the claim of a request succeeded or failed: the slot need not be kept apart for it any more.

        Returns:
            Whether it was until now. If so, the queue must be served: nothing else may change.
        """
        slot = slot_of_target(waiter.served.result())
        if self._claiming.get(slot) is not waiter:
            return False
        del self._claiming[slot]
        return True

    def refuse_all(self, error: Exception) -> None:
        """Fails every request that waits: the pool was deleted, or the appliance stops."""
        for waiter in tuple(self._waiting):
            self._remove(waiter)
            if not waiter.served.done():  # the caller has gone a moment ago
                waiter.served.set_exception(error)

    def serve(
        self,
        pool: Pool,
        index: PoolIndex,
        caches: Caches,
        unreadable: Collection[Slot],
        now: datetime,
    ) -> None:
        """Serves the requests that `queueing.assign` gives something to."""
        if not self._waiting:
            return
        served = assign(
            tuple(waiter for waiter in self._waiting if not waiter.served.done()),  # others leave in a moment
            pool,
            index,
            caches,
            turns=tuple(self._turns),
            claiming={slot: waiter.holder for slot, waiter in self._claiming.items()},
            claiming_requests={waiter.request_key for waiter in self._claiming.values()},
            unreadable=unreadable,
            now=now,
        )
        for given in served:
            self._remove(given.waiter)
            if not _is_leased(given.target):
                self._claiming[slot_of_target(given.target)] = given.waiter
                self._end_turn(given.waiter.tenant)
            given.waiter.served.set_result(given.target)

    def _remove(self, waiter: Waiter) -> None:
        """Its cost does not depend on how many others wait."""
        del self._waiting[waiter]
        self._of_tenant[waiter.tenant] -= 1
        if not self._of_tenant[waiter.tenant]:
            del self._of_tenant[waiter.tenant]
            del self._turns[waiter.tenant]

    def _end_turn(self, tenant: str) -> None:
        """The tenant has got a worker: the turns of all others come first."""
        if tenant in self._turns:
            self._turns.move_to_end(tenant)


def _is_leased(target: Target) -> bool:
    """Whether the request has this worker already, so that there is nothing to claim."""
    return isinstance(target, Worker) and target.lease is not None
