"""The control loop: look, decide, act; one action a slot at a time, slots beside one another.

What an action could not do (a conflict, a failed start) is left for the next look. It never waits for an action.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime

import structlog

from bkpool.allocation.leases import lease_facts
from bkpool.controller.metrics import ControllerMetrics, Result
from bkpool.core.errors import BkpoolError, Conflict, HostFault, NotFound, WorkerFailed
from bkpool.core.names import LABEL_REQUEST, Key, Slot
from bkpool.core.observation import Snapshot
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import (
    Action,
    CreateWorker,
    FinishLease,
    LoseLease,
    RemoveWorker,
    SetCacheOwner,
    SetProtection,
    StartDaemon,
    WipeCache,
    WriteStatus,
    slot_of_action,
)
from bkpool.core.reconcile.decide import decide, stray_slots
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, FailureLimits, failed_worker, failure_message
from bkpool.core.reconcile.lease_end import with_lease_remembered
from bkpool.core.reconcile.pool_status import PoolStatusInputs, pool_status
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, Phase, Worker, new_worker
from bkpool.store import Store
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror
from bkpool.telemetry.registry import new_registry
from bkpool.workers import Runtime

log = structlog.get_logger(__name__)

PAUSE = 2.0
"""Seconds for which a slot is left alone after an action that failed unexpectedly (the store away, a bug)."""


class Controller:
    """Carries out what `core.reconcile` decides, for every pool.

    Args:
        store: Where pools and workers are.
        mirror: The copy in memory to decide from.
        runtime: Runs buildkitd.
        now: The clock.
        status_inputs: What a pool's status tells beside its workers.
        recorder: Is told what a person would ask about.
        metrics: Counts decisions and actions; counted nowhere if None.
        failure_limits: How often, and after which pauses, a worker that failed is started again.
    """

    def __init__(
        self,
        *,
        store: Store,
        mirror: Mirror,
        runtime: Runtime,
        now: Callable[[], datetime],
        status_inputs: Callable[[Pool], PoolStatusInputs],
        recorder: Recorder,
        metrics: ControllerMetrics | None = None,
        failure_limits: FailureLimits = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._runtime = runtime
        self._now = now
        self._status_inputs = status_inputs
        self._recorder = recorder
        self._failure_limits = failure_limits
        self._metrics = metrics or ControllerMetrics(new_registry())
        self._ended: dict[Key, Pool] = {}
        """Pools that are known to be gone although workers of theirs are not yet."""
        self._followed: dict[Key, tuple[str, int | None]] = {}
        """Which spec of each pool its workers were brought to last."""
        self._wake = asyncio.Event()
        self._changed_at: float | None = None
        """When the first change after the last decision became known, in the event loop's time."""
        self._acting: dict[Slot, asyncio.Task[None]] = {}
        self._telling: dict[Key, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Runs until cancelled; then the actions under way are cancelled too, and finished by the next start."""
        await self._mirror.ready.wait()
        self._runtime.on_change(self.look_again)
        unsubscribe = self._mirror.subscribe(lambda _pool: self.look_again())
        try:
            while True:
                self._wake.clear()
                changed_at, self._changed_at = self._changed_at, None
                wake_at = self._look()
                if changed_at is not None:
                    self._metrics.lagged(asyncio.get_running_loop().time() - changed_at)
                pause = None if wake_at is None else max(0.0, (wake_at - self._now()).total_seconds())
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
        finally:
            unsubscribe()
            tasks = [*self._acting.values(), *self._telling.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def look_again(self) -> None:
        """Makes the controller decide again, because something has changed."""
        if self._changed_at is None:
            self._changed_at = asyncio.get_running_loop().time()
        self._wake.set()

    def _look(self) -> datetime | None:
        """Decides for every pool and begins the actions; returns when to look again if nothing changes."""
        now = self._now()
        deadlines: list[datetime] = []
        observed, caches = self._runtime.observe(), self._runtime.caches()
        pools = [*self._mirror.pools.values(), *self._ended_pools()]
        for pool in pools:
            snapshot = Snapshot(
                pool=pool,
                workers=tuple(self._mirror.workers_of(pool.key)),
                observed=observed,
                caches=caches,
                busy=frozenset(slot for slot in self._acting if (slot.namespace, slot.pool) == pool.key),
            )
            decision = decide(snapshot, now, self._failure_limits)
            for action in decision.actions:
                self._begin(slot_of_action(action), type(action), self._carry_out(action, pool))
            if decision.wake_at is not None:
                deadlines.append(decision.wake_at)
            if pool.key in self._mirror.pools:
                self._tell(pool, snapshot.workers, now)
        for slot in stray_slots(observed, self._mirror.workers.values(), self._acting):
            self._begin(slot, None, self._stop_stray(slot))
        self._metrics.decided(len(pools))
        return min(deadlines, default=None)

    def _ended_pools(self) -> list[Pool]:
        """The pools of workers that have none any more. One that is only not seen yet is asked for first."""
        without = {worker.pool for worker in self._mirror.workers.values()} - set(self._mirror.pools)
        self._ended = {key: pool for key, pool in self._ended.items() if key in without}
        for key in without - set(self._ended) - set(self._telling):
            self._beside(key, self._ask_for(key))
        return list(self._ended.values())

    async def _ask_for(self, key: Key) -> None:
        try:
            self._mirror.apply(await self._store.get(Pool, *key))
        except NotFound:
            metadata = Metadata(name=key.name, namespace=key.namespace, deletion_timestamp=self._now())
            self._ended[key] = Pool(metadata=metadata)
        except BkpoolError as error:
            log.warning("pool.not_read", pool=str(key), error=error.message)
            await asyncio.sleep(PAUSE)

    def _begin(self, slot: Slot, kind: type[Action] | None, work: Coroutine[None, None, Result]) -> None:
        task = asyncio.create_task(self._guarded(slot, kind, work))
        self._acting[slot] = task

        def ended(_task: asyncio.Task[None]) -> None:
            del self._acting[slot]
            self.look_again()

        task.add_done_callback(ended)

    async def _guarded(self, slot: Slot, kind: type[Action] | None, work: Coroutine[None, None, Result]) -> None:
        """Carries out one action. An error leaves only this slot alone for a moment; then it is decided again."""
        try:
            self._metrics.ended(kind, await work)
        except (Conflict, NotFound):
            # Another writer was faster. Read the worker now, so that the next decision certainly sees that write.
            self._metrics.ended(kind, Result.CONFLICT)
            with suppress(BkpoolError):
                self._mirror.apply(await self._store.get(Worker, *slot.worker))
        except BkpoolError as error:
            self._metrics.ended(kind, Result.FAILED)
            log.warning("action.failed", slot=str(slot.worker), error=error.message)
            await asyncio.sleep(PAUSE)
        except Exception:
            self._metrics.ended(kind, Result.CRASHED)
            log.exception("action.crashed", slot=str(slot.worker))
            await asyncio.sleep(PAUSE)

    async def _stop_stray(self, slot: Slot) -> Result:
        log.warning("worker.stray", slot=str(slot.worker))
        await self._runtime.stop(slot)
        return Result.DONE

    async def _report_failure(self, worker: Worker, error: WorkerFailed | HostFault) -> None:
        log_tail = error.log_tail if isinstance(error, WorkerFailed) else ""
        log.warning("worker.failed", worker=str(worker.key), reason=error.message_and_hint, log_tail=log_tail)
        current = await self._store.get(Worker, *worker.key)
        message = failure_message(current, error.message_and_hint, log_tail)
        self._recorder.record(current, "Failed", message, warning=True)
        self._mirror.apply(
            await self._store.replace_status(failed_worker(current, message, self._now(), self._failure_limits))
        )

    async def _carry_out(self, action: Action, pool: Pool) -> Result:
        match action:
            case CreateWorker(slot):
                self._mirror.apply(await self._store.create(new_worker(slot, pool, None, {})))
                self._recorder.record(pool, "ScaledUp", f"{slot.worker.name} is made, to stand ready")
            case StartDaemon(worker, owner):
                return await self._start(worker, owner, pool)
            case SetCacheOwner(worker, owner):
                await self._runtime.own(worker.slot, owner)
            case SetProtection(worker, held):
                await self._runtime.protect(worker.slot, held=held)
            case WipeCache(slot):
                await self._runtime.wipe(slot)
            case WriteStatus(worker):
                await self._report(worker)
            case LoseLease(worker, message):
                await self._lose(worker, message)
            case FinishLease():
                await self._finish(action)
            case RemoveWorker(worker):
                await self._remove(worker)
        return Result.DONE

    async def _start(self, worker: Worker, owner: str | None, pool: Pool) -> Result:
        async def told(message: str) -> None:
            """What it is waiting for; on the worker, so that whoever waits for it is told as well."""
            with suppress(BkpoolError):  # it is said again when it changes
                current = await self._store.get(Worker, *worker.key)
                self._mirror.apply(await self._store.replace_status(current.with_status(message=message)))

        try:
            await self._runtime.start(worker.slot, worker.uid, owner, pool, told)
        except (WorkerFailed, HostFault) as error:
            await self._report_failure(worker, error)
            return Result.FAILED
        return Result.DONE

    async def _report(self, worker: Worker) -> None:
        before = self._mirror.workers.get(worker.key)
        self._mirror.apply(await self._store.replace_status(worker))
        if worker.status.phase is Phase.ALLOCATED and (before is None or before.status.phase is not Phase.ALLOCATED):
            job = f" for job {worker.held_lease.job_id}" if worker.held_lease.job_id else ""
            until = f"{worker.held_lease.expires_at:%H:%M:%S} UTC"
            self._recorder.record(
                worker, "Allocated", f"leased to {worker.held_lease.requested_by}{job} until {until}"
            )

    async def _lose(self, worker: Worker, message: str) -> None:
        lease = worker.held_lease
        log.error("lease.lost", **lease_facts(worker), reason=message)
        lost = lease.but(ended_at=self._now(), end_reason=EndReason.LOST, end_message=message)
        self._mirror.apply(await self._store.replace(worker.with_lease(lost)))

    async def _finish(self, action: FinishLease) -> None:
        """Remembers the lease in the status first: a crash in between repeats this, and forgets nothing."""
        lease = action.worker.held_lease
        worker = await self._store.replace_status(with_lease_remembered(action, self._now()))
        labels = {key: value for key, value in worker.metadata.labels.items() if key != LABEL_REQUEST}
        worker = worker.but(metadata=worker.metadata.but(labels=labels)).with_lease(None)
        self._mirror.apply(await self._store.replace(worker))
        reason = action.ended.reason
        log.info("lease.ended", **lease_facts(action.worker), reason=reason.value)
        message = action.ended.message or f"the lease of {lease.requested_by} has ended"
        self._recorder.record(worker, reason.value.capitalize(), message, warning=reason is EndReason.LOST)

    async def _remove(self, worker: Worker) -> None:
        """Deletes the object first, at the version that was judged: a claim made meanwhile wins and is not hurt."""
        await self._store.delete(
            Worker, *worker.key, uid=worker.uid, resource_version=worker.metadata.resource_version
        )
        await self._runtime.stop(worker.slot)
        log.info("worker.removed", worker=str(worker.key))
        if pool := self._mirror.pools.get(worker.pool):
            self._recorder.record(pool, "ScaledDown", f"{worker.key.name} is removed")

    def _tell(self, pool: Pool, workers: tuple[Worker, ...], now: datetime) -> None:
        """Writes the pool's status if it changed; one write at a time, so that a burst of leases costs few."""
        if pool.key in self._telling:
            return
        status = pool_status(pool, workers, self._status_inputs(pool), now)
        if status != pool.status:
            self._beside(pool.key, self._write_pool(pool.but(status=status)))
        elif self._followed.get(pool.key) != _version(pool):
            self._beside(pool.key, self._follow(pool))

    def _beside(self, pool: Key, work: Coroutine[None, None, None]) -> None:
        """Does something about a pool while everything else goes on."""
        task = asyncio.create_task(work)
        self._telling[pool] = task

        def told(_task: asyncio.Task[None]) -> None:
            del self._telling[pool]
            self.look_again()

        task.add_done_callback(told)

    async def _follow(self, pool: Pool) -> None:
        """Lets the workers there are follow a changed spec."""
        try:
            await self._runtime.follow(pool)
            self._followed[pool.key] = _version(pool)
        except BkpoolError as error:
            log.warning("pool.not_followed", pool=str(pool.key), error=error.message)
            await asyncio.sleep(PAUSE)

    async def _write_pool(self, pool: Pool) -> None:
        try:
            self._mirror.apply(await self._store.replace_status(pool))
        except (Conflict, NotFound):
            with suppress(BkpoolError):
                self._mirror.apply(await self._store.get(Pool, *pool.key))
        except BkpoolError as error:
            log.warning("pool.status_not_written", pool=str(pool.key), error=error.message)
            await asyncio.sleep(PAUSE)


def _version(pool: Pool) -> tuple[str, int | None]:
    return pool.uid, pool.metadata.generation
