"""What the controller does for a pool as a whole: its status, and what its workers share. One thing at a time each.

It decides nothing. What could not be done is tried again in a later round, after a pause if the store is not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from bkpool.core.errors import BkpoolError, Conflict, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.reconcile.pool_state import PoolState
from bkpool.core.reconcile.pool_status import PoolStatusInputs, pool_status
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.removal import removal_of
from bkpool.core.unreadable import CONDITION, noted_by
from bkpool.store import Store
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror
from bkpool.workers import Daemons

log = structlog.get_logger(__name__)

PAUSE = 2.0
"""Seconds for which a slot or pool is left alone after something failed unexpectedly (no store, or a bug)."""


class PoolWork:
    """Background work for pools.

    Args:
        store: Where pools are.
        mirror: The copy in memory.
        daemons: Follow a changed spec.
        status_inputs: What a pool's status shows besides its workers.
        recorder: Gets an event when a pool has workers that cannot be read.
        look_again: Called with a pool when some work for it has ended.
    """

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        daemons: Daemons,
        status_inputs: Callable[[Pool], PoolStatusInputs],
        *,
        recorder: Recorder,
        look_again: Callable[[Key], None],
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._daemons = daemons
        self._status_inputs = status_inputs
        self._recorder = recorder
        self._look_again = look_again
        self._applied: dict[Key, tuple[tuple[str, int | None], Mapping[str, str]]] = {}
        """The version of each pool's spec that was applied to its workers, with the annotations that it had."""
        self._written_at: dict[Key, float] = {}
        """When each pool's status was written last, in monotonic time."""
        self.tasks: dict[Key, asyncio.Task[None]] = {}
        """What is under way, by pool."""

    def run(self, pool: Key, work: Coroutine[None, None, None]) -> None:
        """Runs work for one pool in the background. Until it ends, nothing else is started for that pool."""
        task = asyncio.create_task(work)
        self.tasks[pool] = task

        def done(_task: asyncio.Task[None]) -> None:
            del self.tasks[pool]
            self._look_again(pool)

        task.add_done_callback(done)

    def update(self, state: PoolState, moment: Moment, seconds: float) -> datetime | None:
        """Writes the pool's status if it changed, one write at a time: many leases at once then cost few writes.

        Args:
            state: The pool, after a plan.
            moment: The moment of that plan.
            seconds: Monotonic time of that moment.

        Returns:
            When the pool's status may be written that must wait now; None: nothing waits for a time.
        """
        pool = state.pool
        if pool.key in self.tasks:
            return None
        if removal_of(pool) is not None and state.is_gone:
            self.run(pool.key, self._delete(pool))
            return None
        inputs = replace(self._status_inputs(pool), unreadable=self._mirror.unreadable_of(pool.key))
        status = pool_status(state, inputs, moment.now, moment.registered_until)
        changed, wait = status != pool.status, self._wait(pool.key, moment, seconds)
        if changed and wait <= timedelta(0):
            self._written_at[pool.key] = seconds
            self.run(pool.key, self._write_status(pool.but(status=status)))
        elif self._applied.get(pool.key) != (pool.spec_version, pool.metadata.annotations):
            self.run(pool.key, self._apply_spec(pool))
        elif changed:
            return moment.now + wait
        return None

    def forget(self, pool: Key) -> None:
        """Forgets a pool that does not exist any more."""
        self._applied.pop(pool, None)
        self._written_at.pop(pool, None)

    def _wait(self, pool: Key, moment: Moment, seconds: float) -> timedelta:
        """For how long a status that has changed is not written yet."""
        written_at = self._written_at.get(pool)
        if written_at is None:
            return timedelta(0)
        return moment.pauses.pool - timedelta(seconds=seconds - written_at)

    async def _apply_spec(self, pool: Pool) -> None:
        """Applies a changed spec to what the pool's workers share."""
        try:
            await self._daemons.follow(pool)
            self._applied[pool.key] = (pool.spec_version, pool.metadata.annotations)
        except BkpoolError as error:
            log.warning("pool.spec_not_applied", pool=str(pool.key), error=error.message)
            await asyncio.sleep(PAUSE)

    async def _delete(self, pool: Pool) -> None:
        """Deletes a removed pool of which nothing is left, unless it has changed: it may be named again."""
        try:
            await self._store.delete(Pool, *pool.key, uid=pool.uid, resource_version=pool.metadata.resource_version)
            log.info("pool.removed", pool=str(pool.key))
        except (Conflict, NotFound):
            with suppress(BkpoolError):
                self._mirror.apply(await self._store.get(Pool, *pool.key))
        except BkpoolError as error:
            log.warning("pool.not_removed", pool=str(pool.key), error=error.message)
            await asyncio.sleep(PAUSE)

    async def _write_status(self, pool: Pool) -> None:
        before = self._mirror.pools.get(pool.key, pool).status.conditions
        try:
            self._mirror.apply(await self._store.replace_status(pool))
            unreadable = noted_by(pool.status.conditions)
            if unreadable and unreadable != noted_by(before):
                self._recorder.record(pool, CONDITION, unreadable, warning=True)
        except (Conflict, NotFound):
            with suppress(BkpoolError):
                self._mirror.apply(await self._store.get(Pool, *pool.key))
        except BkpoolError as error:
            log.warning("pool.status_not_written", pool=str(pool.key), error=error.message)
            await asyncio.sleep(PAUSE)
