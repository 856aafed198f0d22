"""Starts, stops and observes the buildkitd processes of this machine, one in each slot.

A record is on disk before a process is started, so that a killed appliance finds its daemons again. Nothing here
knows of leases or of the size of pools.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from bkpool.buildkit import connect
from bkpool.core.cache_owner import history_ends_with_lease
from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.core.names import Key, Slot
from bkpool.core.observation import DaemonState, Observation
from bkpool.core.pool import Pool, PoolSpec
from bkpool.home.disk import fault_if_full
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files
from bkpool.workers import history
from bkpool.workers.daemons import ReportWaiting
from bkpool.workers.health import Health
from bkpool.workers.history import not_cleared
from bkpool.workers.probe import probe
from bkpool.workers.processes import process_table, slot_upkeep
from bkpool.workers.processes.daemon import Daemon
from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.slot_cache import assign_owner
from bkpool.workers.processes.slot_files import CacheState, DaemonRecord
from bkpool.workers.processes.slot_threads import FileWork
from bkpool.workers.processes.slots import ProcessSlot, SlotTable
from bkpool.workers.processes.wiping import Wiper

log = structlog.get_logger(__name__)

_NO_TIME_TO_FINISH = 0.5
"""Seconds. If nothing runs in buildkitd any more, it closes its databases in this time."""


class ProcessDaemons:
    """Implements `Daemons` with processes.

    Args:
        table: The slots.
        launcher: Prepares starts and removes what daemons leave.
        wiper: Removes caches.
        limits: How many may start at once, and how long a daemon may take.
        ignored_spec_fields: What nothing reads here, see `Daemons`.
    """

    capacity = None

    def __init__(
        self,
        table: SlotTable,
        launcher: Launcher,
        wiper: Wiper,
        limits: ProcessLimits,
        ignored_spec_fields: frozenset[str],
    ) -> None:
        self.starts_at_once = limits.concurrent_starts
        self.ignored_spec_fields = ignored_spec_fields
        self._table = table
        self._launcher = launcher
        self._wiper = wiper
        self._starting = asyncio.Semaphore(limits.concurrent_starts)
        self._limits = limits
        self._health = Health(self._ask, self._health_changed, limits.probes)
        self._wanted: dict[Key, tuple[str, str]] = {}
        """Each pool's confinement and reach of today (`Launcher`)."""

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        """What is not taken from the pool's own buildkitd.toml; see `Daemons`."""
        return self._launcher.ignored_config(spec)

    def observe(self) -> Mapping[Slot, Observation]:
        """The daemon in each slot, also one that has exited."""
        return {slot.files.slot: slot.observation for slot in self._table if slot.observation}

    def seen(self, slot: Slot) -> Observation | None:
        """The daemon in one slot, also if it has exited."""
        entry = self._table.find(slot)
        return entry.observation if entry is not None else None

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        """Calls back when `observe()` may have changed; returns a function that unsubscribes. See `Daemons`."""
        return self._table.subscribers.add(callback)

    async def watch_health(self) -> None:
        """Asks the daemons in turn; see `Daemons`."""
        await self._health.run()

    async def answers(self, slot: Slot, worker_uid: str, *, fresh: bool = True) -> bool:
        """Whether the worker's daemon answers; see `Daemons`."""
        seen = self._table.get(slot).observation
        return seen is not None and seen.worker_uid == worker_uid and await self._health.answers(slot, fresh=fresh)

    async def start(
        self,
        slot: Slot,
        worker_uid: str,
        owner: str | None,
        pool: Pool,
        report_waiting: ReportWaiting,  # noqa: ARG002 - a process waits for nothing outside this machine
    ) -> str:
        """Starts buildkitd on this owner's cache; see `Daemons`."""
        entry = self._table.get(slot)
        try:
            async with entry.lock:
                return await self._start_locked(entry, worker_uid, owner, pool)
        except OSError as error:
            raise _cannot_start(entry.name, error) from None

    async def _start_locked(self, entry: ProcessSlot, worker_uid: str, owner: str | None, pool: Pool) -> str:
        must_wipe = entry.cache is not None and entry.cache.must_be_wiped_for(owner)
        seen = entry.observation
        if entry.daemon and seen and seen.worker_uid == worker_uid and not must_wipe:
            await assign_owner(self._table, entry, owner)
            return seen.endpoint
        await self.stop_locked(entry)
        if must_wipe:
            await self._wiper.remove_cache(entry)
        await assign_owner(self._table, entry, owner)
        async with self._starting:
            return await self._launch(entry, worker_uid, pool)

    async def _ask(self, slot: Slot) -> None:
        """Returns when the daemon in a slot has answered a call, and can work."""
        entry = self._table.get(slot)
        if entry.daemon is None:
            raise Unavailable("it has ended")
        slot_upkeep.keep(entry.files, entry.daemon.socket, entry.cache_identity)
        await probe(entry.daemon.socket)

    def _health_changed(self, slot: Slot) -> None:
        entry = self._table.get(slot)
        if entry.observation:
            entry.observation = replace(entry.observation, silence=self._health.silence(slot))
            self._table.changed(slot)

    async def clear_history(self, slot: Slot) -> None:
        """Clears the build history, or ends buildkitd; see `Daemons`."""
        entry = self._table.get(slot)
        async with entry.lock:
            if entry.daemon is None:
                return
            try:
                await _clear_history(entry.daemon)
            except (Unavailable, WorkerFailed) as error:
                log.warning("worker.history_not_cleared", worker=entry.name, reason=error.message)
                await self.stop_locked(entry)

    async def stop(self, slot: Slot, *, at_once: bool = False) -> None:
        """Ends buildkitd in the slot; see `Daemons`."""
        entry = self._table.get(slot)
        async with entry.lock:
            await self.stop_locked(entry, grace=_NO_TIME_TO_FINISH if at_once else None)

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Does nothing: nobody else manages these processes."""

    async def follow(self, pool: Pool) -> None:
        """Marks the daemons that were started with a spec that opens or gives something else than this one."""
        run = self._table.threads.run
        confinement = await run(FileWork.PREPARE, None, self._launcher.confinement, pool.spec)
        reach = await run(FileWork.PREPARE, None, self._launcher.reach, pool.spec)
        self._wanted[pool.key] = confinement, reach
        for slot in [entry.files.slot for entry in self._table if self._compare(entry)]:
            self._table.changed(slot)

    # --- for the runtime and the caches: one slot, whose lock the caller holds --------------------------------------

    async def stop_locked(self, slot: ProcessSlot, grace: float | None = None) -> None:
        """Ends the daemon in a slot and removes what it leaves outside of its cache.

        Args:
            slot: Which slot.
            grace: Seconds for running builds; None: those of the limits.

        Raises:
            WorkerFailed: It does not end. It is watched as before.
        """
        await self._cancel_exit_watch(slot)
        self._health.ended(slot.files.slot)
        if daemon := slot.daemon:
            try:
                await daemon.stop(self._limits.stop_timeout if grace is None else grace)
                if daemon.is_adopted:
                    await self._end_rest(slot)
            except BaseException:  # cancelled, or in vain: the daemon is still there
                self._watch_for_exit(slot, daemon)
                raise
            slot.daemon = None
            await self._forget(slot)
            log.info("worker.stopped", worker=slot.name, pid=daemon.pid)
        elif await self._table.threads.run(FileWork.RECORD, slot.files.slot, slot.files.read_daemon):
            await self._end_rest(slot)
            await self._forget(slot)
        await self._clear(slot)
        if (
            slot_upkeep.identity(slot.files.root) is None
        ):  # somebody has removed it, maybe with the record of its owner
            slot.cache = slot.files.read_cache()
        if slot.observation:
            slot.observation = None
            self._table.changed(slot.files.slot)

    async def adopt(self, slot: ProcessSlot, *, to_stop: bool) -> None:
        """Takes over the daemon that an earlier run has started, if it answers. Called before any start.

        A daemon that an older version has isolated less, or with another network, is ended by the caller instead,
        unless all are stopped anyway.
        """
        record = slot.files.read_daemon()
        usable = record and (to_stop or record.isolation == self._launcher.isolation)
        if record and usable and slot.cache and slot.cache.state is not CacheState.WIPING:
            daemon = await Daemon.adopt(record, slot.files.log, self._limits.adopt_timeout)
            if daemon:
                self._register(slot, daemon, record)
                log.info("worker.adopted", worker=slot.name, pid=daemon.pid)

    async def release(self, slot: ProcessSlot) -> None:
        """Stops watching a daemon. It runs on."""
        await self._cancel_exit_watch(slot)
        if slot.daemon:
            slot.daemon.release()

    async def _launch(self, slot: ProcessSlot, worker_uid: str, pool: Pool) -> str:
        files, run = slot.files, self._table.threads.run
        if full := fault_if_full(files.directory):
            raise full
        launch = await run(FileWork.PREPARE, files.slot, self._launcher.prepare, files, pool.spec)
        intent = DaemonRecord(
            worker_uid,
            process_table.boot_id(),
            isolation=self._launcher.isolation,
            confinement=await run(FileWork.PREPARE, files.slot, self._launcher.confinement, pool.spec),
            reach=await run(FileWork.PREPARE, files.slot, self._launcher.reach, pool.spec),
        )
        await run(FileWork.RECORD, files.slot, files.write_daemon, intent)
        try:
            daemon = await Daemon.start(launch, self._limits.start_timeout)
        except BaseException as error:
            await run(FileWork.PREPARE, files.slot, self._launcher.end_all_of, files.slot)
            await self._forget(slot)
            await self._clear(slot)
            if isinstance(error, WorkerFailed):
                if full := fault_if_full(files.directory):  # not the worker's fault
                    raise full from error
                error.hint = error.hint or self._launcher.advice()
            raise
        await self._begin_history(slot, daemon, pool)
        record = replace(intent, pid=daemon.pid, start_time=daemon.start_time, socket=str(daemon.socket))
        self._register(slot, daemon, record)
        try:
            await run(FileWork.RECORD, files.slot, files.write_daemon, record)
        except HostFault:  # a later run could not take it over
            await self.stop_locked(slot, grace=_NO_TIME_TO_FINISH)
            raise
        log.info("worker.started", worker=slot.name, pid=daemon.pid)
        return _endpoint(daemon)

    async def _begin_history(self, slot: ProcessSlot, daemon: Daemon, pool: Pool) -> None:
        """Clears what a cache of the whole pool brings along. The daemon is not known yet, so nobody is connected.

        Raises:
            WorkerFailed: It could not be cleared. The daemon has ended, and the cache is wiped.
        """
        if not history_ends_with_lease(slot.cache.owner if slot.cache else None, pool.uid):
            return
        try:
            await _clear_history(daemon)
        except BaseException as error:
            await daemon.stop(self._limits.stop_timeout)
            await self._forget(slot)
            await self._clear(slot)
            if not isinstance(error, Unavailable | WorkerFailed):
                raise
            await self._wiper.remove_cache(slot)
            raise not_cleared(error) from None

    async def _end_rest(self, slot: ProcessSlot) -> None:
        """Ends what is left of an adopted daemon: its wrapper is not our child, and may hang."""
        await self._table.threads.run(FileWork.PREPARE, slot.files.slot, self._launcher.end_all_of, slot.files.slot)

    async def _forget(self, slot: ProcessSlot) -> None:
        """Removes the record of a daemon that has ended."""
        await self._table.threads.run(FileWork.RECORD, slot.files.slot, slot.files.forget_daemon)

    async def _clear(self, slot: ProcessSlot) -> None:
        """Removes what a daemon that has ended leaves outside of its cache."""
        await self._table.threads.run(FileWork.PREPARE, slot.files.slot, self._launcher.clear, slot.files)

    def _register(self, slot: ProcessSlot, daemon: Daemon, record: DaemonRecord) -> None:
        owner = slot.cache.owner if slot.cache else None
        slot.daemon = daemon
        slot.cache_identity = slot_upkeep.identity(slot.files.root)
        slot.confinement, slot.reach = record.confinement, record.reach
        slot.observation = Observation(
            record.worker_uid, DaemonState.READY, _endpoint(daemon), owner, spec_digest=record.confinement
        )
        self._compare(slot)
        self._health.began(slot.files.slot)
        self._watch_for_exit(slot, daemon)
        self._table.changed(slot.files.slot)

    def _compare(self, slot: ProcessSlot) -> bool:
        """Notes whether the daemon was started with the pool's spec of today. Returns whether that has changed."""
        wanted = self._wanted.get(Key(slot.files.slot.namespace, slot.files.slot.pool))
        if slot.observation is None or wanted is None:
            return False
        before = slot.observation
        confinement, reach = wanted
        slot.observation = replace(
            before,
            outdated=not confinement or slot.confinement != confinement,
            reaches_other=bool(slot.reach) and slot.reach != reach,
        )
        return slot.observation != before

    def _watch_for_exit(self, slot: ProcessSlot, daemon: Daemon) -> None:
        slot.exit_watch = asyncio.create_task(self._note_exit(slot, daemon), name=f"watch {slot.name}")

    async def _note_exit(self, slot: ProcessSlot, daemon: Daemon) -> None:
        failure = await daemon.wait_for_exit()
        self._health.ended(slot.files.slot)
        slot.daemon = slot.exit_watch = None
        if slot.observation:
            slot.observation = replace(
                slot.observation,
                state=DaemonState.EXITED,
                message=failure.message,
                log_tail=failure.log_tail,
                silence=None,
            )
        self._table.changed(slot.files.slot)
        if not daemon.is_adopted:  # else the record says that something may be left, for `stop_locked`
            with suppress(HostFault):  # a record of a process that has ended is as good as none
                slot.files.forget_daemon()
        log.warning(
            "worker.exited",
            worker=slot.name,
            pid=daemon.pid,
            message=failure.message,
            log_tail=failure.log_tail,
            log=str(slot.files.log),
        )

    async def _cancel_exit_watch(self, slot: ProcessSlot) -> None:
        if slot.exit_watch:
            slot.exit_watch.cancel()
            await asyncio.gather(slot.exit_watch, return_exceptions=True)
            slot.exit_watch = None


def _cannot_start(worker: str, error: OSError) -> HostFault:
    if is_lack_of_descriptors(error):
        return too_many_open_files(f"{worker} cannot be started")
    return HostFault(f"{worker} cannot be started: {error.strerror or error}", hint="Run bkpool doctor.")


async def _clear_history(daemon: Daemon) -> None:
    async with connect(_endpoint(daemon)) as client:
        await history.clear(client)


def _endpoint(daemon: Daemon) -> str:
    return f"unix://{daemon.socket}"
