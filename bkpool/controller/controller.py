"""The control loop: it decides for pools that have changed or are due, and starts at most one action for each slot.

What an action could not do (a conflict, a failed start) is decided again in the next round. The loop never waits for
an action, and slots do not wait for one another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime

import structlog

from bkpool.controller.expired_registrations import Judged, check_expired, judged_heartbeats
from bkpool.controller.lease_ends import LeaseEnds
from bkpool.controller.looks import AT_ONCE
from bkpool.controller.metrics import ControllerMetrics, Result
from bkpool.controller.missing_pools import MissingPools
from bkpool.controller.pool_states import PoolStates
from bkpool.controller.pool_work import PAUSE, PoolWork
from bkpool.controller.starts import Starts
from bkpool.core.errors import BkpoolError, Conflict, DiskFull, HostFault, NotFound, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.observation import MOST_RESTARTS
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import (
    Action,
    CheckDaemon,
    CreateWorker,
    FinishLease,
    ForgetLogs,
    LoseLease,
    RemoveWorker,
    ReplaceDaemon,
    SetCacheOwner,
    SetProtection,
    StartDaemon,
    StopDaemon,
    WipeCache,
    WriteStatus,
    slot_of_action,
)
from bkpool.core.reconcile.failures import DEFAULT_LIMITS, FailureLimits, failed_worker
from bkpool.core.reconcile.later_writes import DEFAULT_PAUSES, WritePauses
from bkpool.core.reconcile.lease_end import without_logs
from bkpool.core.reconcile.pool_state import PoolState, Spec
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.reconcile.replacing import out_of_use
from bkpool.core.reconcile.slot_step import Moment
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.wall_clock import ClockReading, pause_until
from bkpool.core.worker import EndReason, Worker, new_worker
from bkpool.store import Store
from bkpool.store.events import Recorder
from bkpool.store.mirror import Mirror
from bkpool.telemetry.registry import new_registry
from bkpool.workers import Caches, Daemons

log = structlog.get_logger(__name__)


class Controller:
    """Carries out what `core.reconcile` decides, for every pool.

    Args:
        store: Where pools and workers are.
        mirror: The copy in memory to decide from.
        daemons: Starts and stops buildkitd.
        caches: Assigns and wipes caches.
        now: The clock.
        status_inputs: What a pool's status shows besides its workers.
        recorder: Gets the events that a person would ask about.
        metrics: Counts decisions and actions; counted nowhere if None.
        failure_limits: How often, and after which pauses, a worker that failed is started again.
        seconds: Monotonic time, by which the registrations of gateways are judged.
        pauses: For how long something must hold before it is written.
    """

    def __init__(
        self,
        *,
        store: Store,
        mirror: Mirror,
        daemons: Daemons,
        caches: Caches,
        now: Callable[[], datetime],
        status_inputs: Callable[[Pool], PoolStatusInputs],
        recorder: Recorder,
        metrics: ControllerMetrics | None = None,
        failure_limits: FailureLimits = DEFAULT_LIMITS,
        seconds: Callable[[], float] = time.monotonic,
        pauses: WritePauses = DEFAULT_PAUSES,
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._daemons = daemons
        self._caches = caches
        self._now = now
        self._recorder = recorder
        self._failure_limits = failure_limits
        self._seconds = seconds
        self._pauses = pauses
        self._lease_ends = LeaseEnds(store, mirror, daemons, recorder, now)
        self._states = PoolStates(mirror, daemons, caches)
        self._starts = Starts(daemons.starts_at_once, self._states.pool_changed)
        self._decided = ClockReading(now(), seconds())
        """When it has decided last."""
        self._wake_at: datetime | None = None
        """When it wants to decide again if nothing changes before; None: never."""
        self._metrics = metrics or ControllerMetrics(new_registry())
        self._pool_work = PoolWork(
            store, mirror, daemons, status_inputs, recorder=recorder, look_again=self.look_again
        )
        self._missing_pools = MissingPools(store, mirror, now, self._states.pool_deleted, PAUSE)
        self._wake = asyncio.Event()
        self._changed_at: float | None = None
        """When the first change after the last plan became known, in the event loop's time."""
        self._asked: list[asyncio.Future[None]] = []
        self._actions: set[asyncio.Task[None]] = set()
        self._restarting: set[Slot] = set()
        """The slots in which a daemon is being started or stopped."""

    async def run(self) -> None:
        """Runs until it is cancelled. Running actions are cancelled too; the next start finishes them."""
        await self._mirror.ready.wait()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._daemons.watch_health())
            tasks.create_task(self._decide_again_and_again())

    async def _decide_again_and_again(self) -> None:
        subscriptions = self._states.follow(self._wake_up)
        try:
            while True:
                self._wake.clear()
                changed_at, self._changed_at = self._changed_at, None
                self._wake_at = self._decide()
                if changed_at is not None:
                    self._metrics.lagged(asyncio.get_running_loop().time() - changed_at)
                if self._states.has_more:
                    self._answer()
                    await asyncio.sleep(0)  # everything else in the loop comes before the next round
                else:
                    await self._sleep()
        finally:
            subscriptions.close()
            self._starts.close()
            tasks = [*self._actions, *self._pool_work.tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def look_again(self, pool: Key | None = None) -> None:
        """Makes the controller decide again for a pool, because something has changed; None: for every pool."""
        if pool is None:
            self._states.note_everything()
        else:
            self._states.pool_changed(pool)

    def _wake_up(self) -> None:
        if self._changed_at is None:
            self._changed_at = asyncio.get_running_loop().time()
        self._wake.set()

    def check_clock(self) -> None:
        """Makes the controller decide again if it is time to. Somebody waits, and the machine may have slept."""
        if self._is_time():
            self._wake_up()

    def _is_time(self) -> bool:
        """Whether time alone may have changed what was decided."""
        reading = ClockReading(self._now(), self._seconds())
        return self._wake_at is not None and (reading.wall >= self._wake_at or self._decided.jumped(reading))

    async def answers(self) -> None:
        """Returns when the loop has come round. It decides nothing because of that."""
        asked = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self._wake.set()
        await asked

    def _answer(self) -> None:
        asked, self._asked = self._asked, []
        for future in asked:
            if not future.done():
                future.set_result(None)

    async def _sleep(self) -> None:
        """Waits for a change, or until it is time to decide again. It looks at the clock every LONGEST_SLEEP."""
        while True:
            self._wake.clear()
            self._answer()
            if self._changed_at is not None or self._is_time():
                return
            pause = None if self._wake_at is None else pause_until(self._wake_at, self._now())
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    def _decide(self) -> datetime | None:
        """Decides for the pools that have changed or are due, and starts actions. Returns when it is due again."""
        reading = ClockReading(self._now(), self._seconds())
        if self._decided.jumped(reading):
            self._states.look_at_everything()
        self._decided = reading
        self._states.undelivered.pass_time(reading.wall)
        pools = self._states.take_over(reading)
        self._announce()
        for key, state in pools.items():
            self._decide_pool(key, state, reading)
        self._metrics.decided(len(pools))
        return self._states.due_at

    def _decide_pool(self, key: Key, state: PoolState, reading: ClockReading) -> None:
        moment = self._moment(reading)
        plan = state.plan(moment, AT_ONCE)
        self._starts.planned(key, begun=plan.free_starts, wanted=state.wanted_starts)
        for action in plan.actions:
            judged = judged_heartbeats(action, self._states.registrations)
            self._start_action(slot_of_action(action), type(action), self._carry_out(action, state.pool, judged))
        for slot in state.strays[:AT_ONCE]:
            self._start_action(slot, None, self._stop_stray(slot))
        if plan.unfinished:
            self._states.plan_unfinished(key)
            return
        wake_at = plan.wake_at
        if key in self._mirror.pools:
            due = self._pool_work.update(state, moment, reading.seconds)
            wake_at = min(filter(None, (wake_at, due)), default=None)
        self._states.look_again_at(key, wake_at)
        if key in self._mirror.pools:
            return
        if state.is_gone:
            self._states.forget(key)
            self._pool_work.forget(key)
        elif state.spec is Spec.MISSING and state.has_workers and key not in self._pool_work.tasks:
            self._pool_work.run(key, self._missing_pools.ask(key))

    def _moment(self, reading: ClockReading) -> Moment:
        return Moment(
            reading.wall,
            self._states.registrations.at(reading.wall, reading.seconds),
            self._states.undelivered.now(),
            MOST_RESTARTS - len(self._restarting),
            self._failure_limits,
            self._states.leases.at(reading.wall, reading.seconds),
            self._pauses,
            self._starts.left,
        )

    def _start_action(self, slot: Slot, kind: type[Action] | None, work: Coroutine[None, None, Result]) -> None:
        task = asyncio.create_task(self._run_action(slot, kind, work))
        self._actions.add(task)
        self._states.action_began(slot)
        if kind in {StartDaemon, StopDaemon, ReplaceDaemon}:
            self._restarting.add(slot)
        if kind is StartDaemon:
            self._starts.began(slot)

        def ended(_task: asyncio.Task[None]) -> None:
            self._actions.discard(task)
            self._starts.ended(slot)
            if slot in self._restarting:
                self._restarting.discard(slot)
                self._states.restart_ended()
            self._states.action_ended(slot)

        task.add_done_callback(ended)

    async def _run_action(self, slot: Slot, kind: type[Action] | None, work: Coroutine[None, None, Result]) -> None:
        """Carries out one action. An error leaves only this slot alone for a moment; then it is decided again."""
        try:
            self._metrics.ended(kind, await work)
        except (Conflict, NotFound):
            # Another writer was faster. Read the worker now, so that the next plan certainly sees that write.
            self._metrics.ended(kind, Result.CONFLICT)
            await self._read_again(slot)
        except BkpoolError as error:
            self._metrics.ended(kind, Result.FAILED)
            log.warning("action.failed", slot=str(slot.worker), error=error.message)
            await asyncio.sleep(PAUSE)
        except Exception:
            self._metrics.ended(kind, Result.CRASHED)
            log.exception("action.crashed", slot=str(slot.worker))
            await asyncio.sleep(PAUSE)

    async def _read_again(self, slot: Slot) -> None:
        """Reads the worker of a slot. If it cannot be read, the slot is out of use or left alone for a moment."""
        try:
            self._mirror.apply(await self._store.get(Worker, *slot.worker))
        except NotFound:
            return
        except UnreadableObject as error:
            self._mirror.apply(error.found)
        except BkpoolError as error:
            log.warning("action.failed", slot=str(slot.worker), error=error.message)
            await asyncio.sleep(PAUSE)

    async def _stop_stray(self, slot: Slot) -> Result:
        log.warning("worker.stray", slot=str(slot.worker))
        await self._daemons.stop(slot)
        return Result.DONE

    async def _write_failure(self, worker: Worker, error: WorkerFailed | HostFault) -> None:
        log_tail = error.log_tail if isinstance(error, WorkerFailed) else ""
        log.warning("worker.failed", worker=str(worker.key), reason=error.message_and_hint, log_tail=log_tail)
        current = await self._store.get(Worker, *worker.key)
        failed = failed_worker(current, error.message_and_hint, log_tail, self._now(), self._failure_limits)
        self._recorder.record(current, "Failed", failed.status.message, warning=True)
        self._mirror.apply(await self._store.replace_status(failed))

    async def _replace_daemon(self, worker: Worker, message: str) -> None:
        """Writes why, at the version that was decided on: if a gateway has got a byte meanwhile, nothing happens.

        A client whose connection this cuts connects again at once, and reads the reason.
        """
        failed = failed_worker(worker, message, "", self._now(), self._failure_limits)
        self._mirror.apply(await self._store.replace_status(failed))
        log.warning("worker.hung", worker=str(worker.key), reason=message)
        self._recorder.record(worker, "Failed", message, warning=True)
        await self._daemons.stop(worker.slot, at_once=True)

    async def _carry_out(  # noqa: C901, PLR0912 - one case for each action
        self, action: Action, pool: Pool, judged: Judged
    ) -> Result:
        await check_expired(judged, self._mirror.heartbeats)
        match action:
            case CreateWorker(slot):
                self._mirror.apply(await self._store.create(new_worker(slot, pool, None, {})))
                self._recorder.record(pool, "ScaledUp", f"created {slot.worker.name}, to have enough idle workers")
            case StartDaemon(worker, owner):
                return await self._start_daemon(worker, owner, pool)
            case SetCacheOwner(worker, owner):
                await self._caches.own(worker.slot, owner)
            case SetProtection(worker, protected):
                await self._daemons.protect(worker.slot, held=protected)
            case WipeCache(slot):
                await self._caches.wipe(slot)
            case StopDaemon(worker):
                await self._stop_daemon(worker)
            case CheckDaemon(worker):
                if await self._daemons.answers(worker.slot, worker.uid, fresh=False):
                    self._mirror.apply(await self._store.replace_status(worker.noted_answering()))
            case ReplaceDaemon(worker, message):
                await self._replace_daemon(worker, message)
            case WriteStatus(worker):
                self._mirror.apply(await self._store.replace_status(worker))
            case ForgetLogs(worker):
                self._mirror.apply(await self._store.replace(without_logs(worker)))
            case LoseLease():
                await self._lease_ends.lose(action)
            case FinishLease():
                await self._lease_ends.finish(action, pool)
            case RemoveWorker(worker):
                await self._remove_worker(worker)
        return Result.DONE

    async def _start_daemon(self, worker: Worker, owner: str | None, pool: Pool) -> Result:
        async def report_progress(message: str) -> None:
            """Writes on the worker what its start waits for, so that the callers who wait can read it."""
            with suppress(BkpoolError):  # it is written again when it changes
                current = await self._store.get(Worker, *worker.key)
                self._mirror.apply(
                    await self._store.replace_status(current.with_status(message=message, log_tail=""))
                )

        try:
            await self._daemons.start(worker.slot, worker.uid, owner, pool, report_progress)
        except DiskFull as error:  # not the worker's fault: no attempt is counted, and its lease goes on
            await report_progress(error.message_and_hint)
            raise
        except (WorkerFailed, HostFault) as error:
            await self._write_failure(worker, error)
            return Result.FAILED
        return Result.DONE

    async def _stop_daemon(self, worker: Worker) -> None:
        if worker.lease is None or worker.lease.end_reason is not EndReason.REVOKED:
            self._mirror.apply(await self._store.replace_status(out_of_use(worker)))
        await self._daemons.stop(worker.slot, at_once=True)

    def _announce(self) -> None:
        """Records an event for each lease whose holder can use the worker since the last round."""
        for worker in self._states.announcements.take():
            lease = worker.held_lease
            job = f" for job {lease.job_id}" if lease.job_id else ""
            until = f"{lease.expires_at:%H:%M:%S} UTC"
            self._recorder.record(worker, "Allocated", f"leased to {lease.requested_by}{job} until {until}")

    async def _remove_worker(self, worker: Worker) -> None:
        """Deletes the object first, at the version that was decided on: a claim made in the meantime wins."""
        await self._store.delete(
            Worker, *worker.key, uid=worker.uid, resource_version=worker.metadata.resource_version
        )
        await self._daemons.stop(worker.slot)
        log.info("worker.removed", worker=str(worker.key))
        if pool := self._mirror.pools.get(worker.pool):
            self._recorder.record(pool, "ScaledDown", f"removed {worker.key.name}")
