"""The runtime of a machine without a cluster: each worker is a buildkitd process on a Unix socket.

It keeps what it does on disk before it does it, so that a killed appliance finds its daemons again, and never starts
buildkitd on a cache that is another owner's. It knows nothing of leases, pools' sizes or time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from bkpool.core.errors import Conflict, HostFault, WorkerFailed
from bkpool.core.names import Slot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.workers import DaemonState, Observation, Told
from bkpool.workers.ignored_fields import IGNORED_BY_PROCESSES
from bkpool.workers.processes import process_table, socket_directory
from bkpool.workers.processes.daemon import Daemon
from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.sandbox import Binaries, Sandbox
from bkpool.workers.processes.slot_files import (
    CacheRecord,
    CacheState,
    DaemonRecord,
    SlotFiles,
    slots_directory,
    slots_on_disk,
)

__all__ = ["Binaries", "ProcessRuntime"]

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _ProcessSlot:
    """A slot in memory."""

    files: SlotFiles
    cache: CacheRecord | None = None
    daemon: Daemon | None = None
    watch: asyncio.Task[None] | None = None
    observation: Observation | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ProcessRuntime:
    """Runs buildkitd processes; implements Runtime.

    Args:
        home: BKPOOL_HOME; slots and logs are in it.
        binaries: The programs, as absolute paths.
        runtime_dir: For the sockets; a short private directory by default.
        environ: Where PATH, proxies and certificate paths for buildkitd come from.
        cold_starts: How many daemons may be starting at once.
        start_deadline: Seconds until a daemon must have answered; it takes less than one where nothing is wrong.
        stop_grace: Seconds between SIGTERM and SIGKILL.
    """

    capacity = None
    ignored_spec_fields = IGNORED_BY_PROCESSES

    def __init__(
        self,
        home: Path,
        binaries: Binaries,
        *,
        runtime_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        cold_starts: int = 4,
        start_deadline: float = 60.0,
        stop_grace: float = 10.0,
    ) -> None:
        environ = os.environ if environ is None else environ
        self._home = home.resolve()
        self._sandbox = Sandbox(binaries, environ)
        runtime_dir = runtime_dir or socket_directory.default_directory(self._home, environ)
        self._launcher = Launcher(self._home, runtime_dir, self._sandbox)
        self._starting = asyncio.Semaphore(cold_starts)
        self._start_deadline = start_deadline
        self._stop_grace = stop_grace
        self._places: dict[Slot, _ProcessSlot] = {}
        self._callbacks: list[Callable[[], None]] = []

    async def adopt(self) -> None:
        """Takes over living daemons, ends those that can't be, and finishes wipes that a crash interrupted."""
        places = [self._place(slot) for slot in slots_on_disk(self._home)]
        await asyncio.gather(*(self._take_over(place) for place in places))
        adopted = {place.files.slot for place in places if place.daemon}
        if ended := await self._launcher.end_all_but(adopted):
            log.warning("workers.leftovers_ended", processes=ended)
        await asyncio.gather(*(self._tidy(place) for place in places if place.daemon is None))
        self._changed()

    def observe(self) -> Mapping[Slot, Observation]:
        """What runs, or ended, in each slot."""
        return {slot: place.observation for slot, place in self._places.items() if place.observation}

    def caches(self) -> Mapping[Slot, str | None]:
        """The caches that exist, with their owners."""
        return {slot: place.cache.owner for slot, place in self._places.items() if place.cache}

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls back whenever observe() or caches() may have changed."""
        self._callbacks.append(callback)

    async def start(self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, told: Told) -> str:  # noqa: ARG002 - nothing here waits for others
        """Brings buildkitd up in the slot, on this owner's cache; see Runtime."""
        place = self._place(slot)
        async with place.lock:
            foreign = place.cache is not None and place.cache.foreign_to(owner)
            seen = place.observation
            if place.daemon and seen and seen.worker_uid == worker_uid and not foreign:
                await self._give(place, owner)
                return seen.endpoint
            await self._stop(place)
            if foreign:
                await self._wipe(place)
            await self._give(place, owner)
            async with self._starting:
                return await self._bring_up(place, worker_uid, pool.spec)

    async def own(self, slot: Slot, owner: str) -> None:
        """Writes durably that the clean cache in this slot is now this owner's; see Runtime."""
        place = self._place(slot)
        async with place.lock:
            if place.cache and place.cache.foreign_to(owner):
                raise Conflict(
                    f"the cache of {slot.worker} belongs to another identity", hint="It must be wiped first."
                )
            await self._give(place, owner)

    async def protect(self, slot: Slot, *, held: bool) -> None:
        """Does nothing: nobody else manages these processes."""

    async def follow(self, pool: Pool) -> None:
        """Does nothing: processes share nothing of a pool."""

    async def stop(self, slot: Slot) -> None:
        """Ends buildkitd in the slot; the cache stays."""
        place = self._place(slot)
        async with place.lock:
            await self._stop(place)

    async def wipe(self, slot: Slot) -> None:
        """Ends buildkitd in the slot and removes its cache."""
        place = self._place(slot)
        async with place.lock:
            await self._stop(place)
            await self._wipe(place)

    async def close(self, *, stop_workers: bool) -> None:
        """Lets go of everything; with stop_workers also ends every buildkitd, all at once."""
        if stop_workers:
            await asyncio.gather(*(self.stop(slot) for slot in list(self._places)))
            self._launcher.close()
        for place in self._places.values():
            await self._unwatch(place)
            if place.daemon:
                place.daemon.release()
        self._places.clear()

    async def purge(self) -> None:
        """Ends every buildkitd and removes every slot with its cache; adopt() must have been called."""
        await asyncio.gather(*(self.wipe(slot) for slot in list(self._places)))
        with contextlib.suppress(OSError):  # never made, or something in it that is not ours
            slots_directory(self._home).rmdir()
        self._launcher.close()

    # --- one slot, under its lock -----------------------------------------------------------------------------------

    async def _bring_up(self, place: _ProcessSlot, worker_uid: str, spec: PoolSpec) -> str:
        slot, files = place.files.slot, place.files
        launch = await _in_thread(self._launcher.prepare, files, spec)
        intent = DaemonRecord(worker_uid, process_table.boot_id())
        await _in_thread(files.write_daemon, intent)
        try:
            daemon = await Daemon.start(launch, self._start_deadline)
        except BaseException as error:
            files.forget_daemon()
            self._launcher.clear(place.files.slot)
            if isinstance(error, WorkerFailed):
                error.hint = error.hint or self._sandbox.advice()
            raise
        record = replace(intent, pid=daemon.pid, start_time=daemon.start_time, socket=str(daemon.socket))
        self._run(place, daemon, worker_uid)
        await _in_thread(files.write_daemon, record)
        log.info("worker.started", worker=str(slot.worker), pid=daemon.pid)
        return _endpoint(daemon)

    def _run(self, place: _ProcessSlot, daemon: Daemon, worker_uid: str) -> None:
        owner = place.cache.owner if place.cache else None
        place.daemon = daemon
        place.observation = Observation(worker_uid, DaemonState.READY, _endpoint(daemon), owner)
        self._watch(place, daemon)
        self._changed()

    def _watch(self, place: _ProcessSlot, daemon: Daemon) -> None:
        place.watch = asyncio.create_task(self._mourn(place, daemon), name=f"watch {place.files.slot.worker}")

    async def _mourn(self, place: _ProcessSlot, daemon: Daemon) -> None:
        failure = await daemon.ended()
        log.warning(
            "worker.exited",
            worker=str(place.files.slot.worker),
            pid=daemon.pid,
            message=failure.message,
            log_tail=failure.log_tail,
            log=str(place.files.log),
        )
        place.daemon = place.watch = None
        place.files.forget_daemon()
        if place.observation:
            place.observation = replace(
                place.observation, state=DaemonState.EXITED, message=failure.message, log_tail=failure.log_tail
            )
        self._changed()

    async def _stop(self, place: _ProcessSlot) -> None:
        await self._unwatch(place)
        if daemon := place.daemon:
            try:
                await daemon.stop(self._stop_grace)
            except BaseException:  # given up, or in vain: it is still there
                self._watch(place, daemon)
                raise
            place.daemon = None
            place.files.forget_daemon()
            log.info("worker.stopped", worker=str(place.files.slot.worker), pid=daemon.pid)
        self._launcher.clear(place.files.slot)
        if place.observation:
            place.observation = None
            self._changed()

    async def _give(self, place: _ProcessSlot, owner: str | None) -> None:
        """Makes the cache this owner's; with None it stays whose it is."""
        record = CacheRecord.of(owner or (place.cache.owner if place.cache else None))
        if record == place.cache:
            return
        await _in_thread(place.files.write_cache, record)
        place.cache = record
        if place.observation:
            place.observation = replace(place.observation, cache_owner=record.owner)
        self._changed()

    async def _wipe(self, place: _ProcessSlot) -> None:
        files = place.files
        if place.cache is None and not files.directory.exists():
            return
        place.cache = CacheRecord(CacheState.WIPING)
        await _in_thread(files.write_cache, place.cache)
        await self._launcher.remove(files.slot, files.set_root_aside())
        await _in_thread(files.remove)
        place.cache = None
        log.info("cache.wiped", worker=str(files.slot.worker))
        self._changed()

    async def _take_over(self, place: _ProcessSlot) -> None:
        record = place.files.read_daemon()
        if record and place.cache and place.cache.state is not CacheState.WIPING:
            daemon = await Daemon.adopt(record, place.files.log)
            if daemon:
                self._run(place, daemon, record.worker_uid)
                log.info("worker.adopted", worker=str(place.files.slot.worker), pid=daemon.pid)

    async def _tidy(self, place: _ProcessSlot) -> None:
        """Finishes what a crash left of a slot without a daemon."""
        async with place.lock:
            place.files.forget_daemon()
            self._launcher.clear(place.files.slot)
            if place.cache and place.cache.state is CacheState.WIPING:
                try:
                    await self._wipe(place)
                except HostFault as error:  # start() will try again, and tell whoever wants the slot
                    log.warning("cache.not_wiped", worker=str(place.files.slot.worker), error=error.message)

    # --- small things -----------------------------------------------------------------------------------------------

    def _place(self, slot: Slot) -> _ProcessSlot:
        if slot not in self._places:
            files = SlotFiles(self._home, slot)
            self._places[slot] = _ProcessSlot(files, files.read_cache())
        return self._places[slot]

    async def _unwatch(self, place: _ProcessSlot) -> None:
        if place.watch:
            place.watch.cancel()
            await asyncio.gather(place.watch, return_exceptions=True)
            place.watch = None

    def _changed(self) -> None:
        for callback in self._callbacks:
            callback()


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs file work in a thread, to its end even if the caller is cancelled: it must not go on beside the next."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def _endpoint(daemon: Daemon) -> str:
    return f"unix://{daemon.socket}"
