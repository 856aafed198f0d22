"""Whose turn it is, in every pool: who waits, and who is served when something becomes free.

Whatever ends a claim or a wait goes through here, so the next request is served without any other change. It never
writes to the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from functools import partial

from bkpool.allocation.known_caches import KnownCaches
from bkpool.allocation.known_objects import no_lease_from
from bkpool.allocation.wait_queue import Waiter, WaitQueue
from bkpool.core.backoff import Backoff
from bkpool.core.errors import BkpoolError
from bkpool.core.names import Key
from bkpool.core.queueing import Target
from bkpool.core.removal import removal_of
from bkpool.store.mirror import Mirror

_LONGEST_PAUSE = 5.0
"""Seconds, at most, until the next request is served after the store could not write a claim. Without a pause all who
wait would be refused in a moment, one after another."""


class PoolQueues:
    """The requests that wait at this replica, pool by pool.

    Args:
        mirror: The copy in memory from which workers are chosen.
        caches: The caches of the pools' slots.
        now: The clock.
        max_waiters: Requests that may wait for one pool at once.
        on_waiting: Called when a request begins to wait, because nothing was free.
    """

    def __init__(
        self,
        mirror: Mirror,
        caches: KnownCaches,
        now: Callable[[], datetime],
        max_waiters: int,
        on_waiting: Callable[[], None],
    ) -> None:
        self._mirror = mirror
        self._caches = caches
        self._now = now
        self._max_waiters = max_waiters
        self._on_waiting = on_waiting
        self._queues: dict[Key, WaitQueue] = {}
        self._failures: dict[Key, Backoff] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        """The pools that are served in a moment."""

    def close(self) -> None:
        """Serves nobody any more whose turn has not come."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def refuse_all(self, error: BkpoolError) -> None:
        """Fails every request that waits."""
        for queue in self._queues.values():
            queue.refuse_all(error)

    def waiting(self, pool: Key) -> int:
        """How many requests wait for this pool."""
        queue = self._queues.get(pool)
        return len(queue) if queue else 0

    def is_claiming(self, pool: Key, request_key: str) -> bool:
        """Whether another request of this job is claiming a worker, so that this one waits for the store."""
        queue = self._queues.get(pool)
        return queue is not None and queue.is_claiming(request_key)

    async def wait(self, pool: Key, waiter: Waiter, *, first: bool) -> Target | None:
        """Waits for a turn. What it brings is kept apart for the request until `claim_ended`.

        Args:
            pool: The pool.
            waiter: The request.
            first: It waits at the front: it has had its turn before.

        Returns:
            What the request gets; None if it takes only a worker that is ready now and there is none.
        """
        queue = self._queues.setdefault(pool, WaitQueue(self._max_waiters))
        queue.join(waiter, first=first)
        try:
            self.serve(pool)
            if not waiter.served.done():
                if waiter.only_ready:
                    self._leave(pool, queue, waiter)
                    return None
                waiter.waited = True
                self._on_waiting()
            return await waiter.served
        except BaseException:
            self._leave(pool, queue, waiter)
            raise

    def claim_ended(self, pool: Key, waiter: Waiter, *, failed: bool) -> None:
        """Notes that the claim of what a request was given is over, and serves the next request.

        Not at once: a request whose claim was lost is first at the front of the queue again.

        Args:
            pool: The pool.
            waiter: The request.
            failed: The store could not say whether the claim succeeded. The next request is served after a pause,
                which grows.
        """
        if not self._queues[pool].claim_ended(waiter):
            return
        failures = self._failures.setdefault(pool, Backoff(_LONGEST_PAUSE))
        if failed:
            self._serve_later(pool, failures.failed())
            return
        failures.succeeded()
        if pool in self._timers:
            self._timers.pop(pool).cancel()
        self._serve_later(pool, 0)

    def serve(self, pool_key: Key) -> None:
        """Serves the requests that wait for a pool, if anything is free for them."""
        queue = self._queues.get(pool_key)
        if not queue:
            return
        pool = self._mirror.pools.get(pool_key)
        if pool is None or removal_of(pool) is not None:
            queue.refuse_all(no_lease_from(self._mirror, pool_key))
            return
        index, unreadable = self._mirror.index_of(pool_key), self._mirror.unreadable_slots(pool_key)
        queue.serve(pool, index, partial(self._caches.of, pool_key), unreadable, self._now())

    def _leave(self, pool: Key, queue: WaitQueue, waiter: Waiter) -> None:
        queue.leave(waiter)
        self._serve_later(pool, 0)

    def _serve_later(self, pool: Key, seconds: float) -> None:
        """Serves a pool after so many seconds, unless nobody waits, or it is served soon anyway."""
        if pool in self._timers or not self._queues[pool]:
            return
        self._timers[pool] = asyncio.get_running_loop().call_later(seconds, self._due, pool)

    def _due(self, pool: Key) -> None:
        del self._timers[pool]
        self.serve(pool)
