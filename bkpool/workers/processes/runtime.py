"""The runtime of a machine without a cluster: each worker is a buildkitd process on a Unix socket.

It puts the parts of this room together, takes over what an earlier run has left, and closes. It never starts a daemon
by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import structlog

from bkpool.core.errors import HostFault
from bkpool.core.pool import CacheGC
from bkpool.home import runtime_directory
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.config import GC_DEFAULTS
from bkpool.workers.ignored_fields import IGNORED_BY_PROCESSES, IGNORED_IN_HOST_NETWORK
from bkpool.workers.processes.init_program import InitProgram
from bkpool.workers.processes.launcher import Launcher
from bkpool.workers.processes.limits import ProcessLimits
from bkpool.workers.processes.log_limit import SlotLogs
from bkpool.workers.processes.process_caches import ProcessCaches
from bkpool.workers.processes.process_daemons import ProcessDaemons
from bkpool.workers.processes.sandbox import Binaries, Sandbox
from bkpool.workers.processes.slot_files import CacheState, slots_directory, slots_on_disk
from bkpool.workers.processes.slot_threads import FileWork, SlotThreads
from bkpool.workers.processes.slots import ProcessSlot, SlotTable
from bkpool.workers.processes.wiping import Wiper

__all__ = ["Binaries", "ProcessLimits", "ProcessRuntime"]

log = structlog.get_logger(__name__)


class ProcessRuntime:
    """Runs workers as processes; implements `Runtime`.

    Args:
        home: BKPOOL_HOME; slots and logs are in it.
        binaries: The programs, as absolute paths.
        network: What makes a network for each worker; None: workers use the network of this machine.
        own_ports: Returns the ports that the appliance listens on. No worker can reach them.
        runtime_dir: For the sockets; a short private directory by default.
        environ: Has proxies and certificate paths for buildkitd.
        limits: How many may start at once, and how long a daemon may take.
        gc_defaults: For pools whose spec says nothing about collection (`workers.config`).
    """

    def __init__(
        self,
        home: Path,
        binaries: Binaries,
        *,
        network: NetworkPrograms | None = None,
        own_ports: Callable[[], Collection[int]] = frozenset,
        runtime_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        limits: ProcessLimits = ProcessLimits(),  # noqa: B008 - immutable
        gc_defaults: CacheGC = GC_DEFAULTS,
    ) -> None:
        environ = os.environ if environ is None else environ
        home = home.resolve()
        former_dirs = () if runtime_dir else runtime_directory.former_directories(home, environ)
        possible = (runtime_dir,) if runtime_dir else runtime_directory.possible_directories(home, environ)
        init = InitProgram(network, environ, own_ports)
        self._launcher = Launcher(
            home,
            possible,
            former_dirs,
            sandbox=Sandbox(binaries, environ),
            init=init,
            gc_defaults=gc_defaults,
        )
        self._table = SlotTable(home, SlotThreads(limits))
        self._wiper = Wiper(self._table, self._launcher, limits)
        ignored = IGNORED_BY_PROCESSES if network else IGNORED_IN_HOST_NETWORK
        self.daemons = ProcessDaemons(self._table, self._launcher, self._wiper, limits, ignored)
        self.caches = ProcessCaches(self._table, self._wiper, self.daemons)
        self._logs = SlotLogs(self._table, limits.log_size)

    async def bound_logs(self) -> None:
        """Keeps the logs of daemons small until it is cancelled."""
        await self._logs.run()

    async def try_network(self) -> None:
        """Makes a network as workers get it, and removes it.

        Raises:
            HostFault: This machine cannot make one.
        """
        await self._table.threads.run(FileWork.PREPARE, None, self._launcher.try_network)

    async def adopt(self, *, to_stop: bool = False) -> None:
        """Takes over daemons that answer, ends all others of this home, and completes interrupted wipes.

        Args:
            to_stop: The caller stops the daemons next, so it does not matter how they are isolated.
        """
        slots = [self._table.get(slot) for slot in slots_on_disk(self._table.home)]
        await asyncio.gather(*(self.daemons.adopt(slot, to_stop=to_stop) for slot in slots))
        adopted = {slot.files.slot for slot in slots if slot.daemon}
        if ended := await self._table.threads.run(FileWork.PREPARE, None, self._launcher.end_all_but, adopted):
            log.warning("workers.leftovers_ended", processes=ended)
        await asyncio.gather(*(self._recover(slot) for slot in slots if slot.daemon is None))
        for entry in self._table:
            self._table.changed(entry.files.slot)

    async def close(self, *, stop_workers: bool) -> None:
        """Ends all background work. Daemons run on, and the next run adopts them.

        Args:
            stop_workers: Ends every daemon as well, all at once.
        """
        faults: list[BaseException] = []
        if stop_workers:
            faults = await self._for_each(lambda slot: self.daemons.stop(slot.files.slot))
            self._launcher.close()
        for slot in self._table:
            await self.daemons.release(slot)
        self._table.clear()
        self._table.threads.close()
        if faults:
            raise faults[0]

    async def purge(self) -> None:
        """Ends every daemon and removes every slot with its cache. `adopt()` must have been called before."""
        if faults := await self._for_each(lambda slot: self.caches.wipe(slot.files.slot)):
            raise faults[0]
        with contextlib.suppress(OSError):  # it was never made, or it has something that is not ours
            slots_directory(self._table.home).rmdir()
        self._launcher.close()

    async def _for_each(self, work: Callable[[ProcessSlot], Coroutine[Any, Any, None]]) -> list[BaseException]:
        """Does something in each slot, whatever fails in others. Returns what has failed."""
        done = await asyncio.gather(*(work(slot) for slot in self._table), return_exceptions=True)
        return [error for error in done if error is not None]

    async def _recover(self, slot: ProcessSlot) -> None:
        """Completes what a crash has left undone in a slot without a daemon."""
        async with slot.lock:
            await self._table.threads.run(FileWork.RECORD, slot.files.slot, slot.files.forget_daemon)
            await self._table.threads.run(FileWork.PREPARE, slot.files.slot, self._launcher.clear, slot.files)
            if slot.cache and slot.cache.state is CacheState.WIPING:
                try:
                    await self._wiper.remove_cache(slot)
                except HostFault as error:  # the next start in this slot tries again, and reports it
                    log.warning("cache.not_wiped", worker=slot.name, error=error.message)
