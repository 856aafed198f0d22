"""One buildkitd process: starts it, adopts it from an earlier run, watches and ends it.

Three processes matter: the wrapper (unshare or rootlesskit; our child, if we started it), the first process in the
namespaces (when it ends, the kernel ends all others in there), and buildkitd, which owns the socket. Nothing here
knows slots, caches or owners.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files, with_limit_at_start
from bkpool.workers.log_tail import informative_lines
from bkpool.workers.probe import probe
from bkpool.workers.processes import process_table
from bkpool.workers.processes.child import ChildProcess
from bkpool.workers.processes.process_table import Process
from bkpool.workers.processes.slot_files import DaemonRecord
from bkpool.workers.processes.slot_log import read_end

MARK = "BKPOOL_SLOT"
"""An environment variable of everything that is started for a slot. It finds what a crash left unrecorded."""

_FIRST_RETRY, _LAST_RETRY = 0.005, 0.05  # seconds between probes while buildkitd has not bound its socket yet
_WRAPPER_TIMEOUT = 5.0  # seconds in which the wrapper ends after the first process; usually in a millisecond
_LOG_BYTES = 8192  # of the log's end, in which informative lines are looked for


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that is needed to start a daemon."""

    command: Sequence[str]
    """The command line of the wrapper, which ends with that of buildkitd."""
    environment: Mapping[str, str]
    """It has MARK."""
    socket: Path
    log: Path
    network_ready: Path | None = None
    """A file that is there when the daemon's network is complete; None: it uses one that is there already."""


class Daemon:
    """A buildkitd that has answered a call."""

    def __init__(self, pid: int, socket: Path, log: Path, wrapper: ChildProcess | None = None) -> None:
        with contextlib.ExitStack() as stack:
            self._server = Process(pid)
            stack.callback(self._server.close)
            self._first = Process(process_table.parent(pid))
            stack.callback(self._first.close)
            self.start_time = process_table.start_time(pid)
            self._handles = stack.pop_all()
        self.pid = pid
        self.socket = socket
        self._log = log
        self._wrapper = wrapper

    @property
    def is_adopted(self) -> bool:
        """Whether an earlier run has started it: its wrapper is not our child, and may stay when it has ended."""
        return self._wrapper is None

    @classmethod
    async def start(cls, launch: Launch, seconds: float) -> Daemon:
        """Starts a daemon and waits until it answers.

        Args:
            launch: What to start.
            seconds: How long it may take.

        Raises:
            WorkerFailed: It ended, or did not answer in time. Its namespaces have ended.
            HostFault: The program cannot be run, or no file descriptor is left to watch it.
        """
        wrapper = _start_wrapper(launch)
        try:
            return await _wait_for_answer(launch, wrapper, seconds)
        except BaseException:
            await wrapper.end()
            raise

    @classmethod
    async def adopt(cls, record: DaemonRecord, log: Path, seconds: float) -> Daemon | None:
        """Adopts the daemon of a record. Returns None if that process has ended or does not answer in time."""
        if record.boot_id != process_table.boot_id() or record.pid is None or record.socket is None:
            return None
        socket = Path(record.socket)
        with contextlib.suppress(OSError, Unavailable, WorkerFailed):
            async with asyncio.timeout(seconds):
                peer = await probe(socket)
            if peer == record.pid:
                daemon = cls(peer, socket, log)
                if daemon.start_time == record.start_time:
                    return daemon
                daemon.release()
        return None

    async def wait_for_exit(self) -> WorkerFailed:
        """Waits until it ends. Returns, as an error, how it ended and the end of its log."""
        await self._first.exited.wait()
        how = "ended"
        if self._wrapper:
            with contextlib.suppress(WorkerFailed):  # it hangs in the kernel; the daemon has ended
                how = _exit_text(await self._reap_wrapper())
        self._handles.close()
        return WorkerFailed(f"buildkitd (process {self.pid}) {how}", log_tail=log_tail(self._log))

    async def stop(self, grace: float) -> None:
        """Ends the daemon and everything that it started. If it was adopted, its wrapper is not waited for.

        Args:
            grace: Seconds for running builds. After SIGTERM buildkitd accepts no new ones and lets these finish
                (docs/clients.md#stopping). Then it is killed.

        Raises:
            WorkerFailed: It has not ended although it was killed.
        """
        self._server.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._first.exited.wait()
        except TimeoutError:
            await process_table.kill([self._first])
        await self._reap_wrapper()
        self._handles.close()

    async def _reap_wrapper(self) -> int:
        """Reaps our child once the first process has ended, for which it waits. Returns its exit code."""
        if self._wrapper is None:
            return 0
        code = await self._wrapper.wait(_WRAPPER_TIMEOUT)
        return await self._wrapper.end() if code is None else code

    def release(self) -> None:
        """Stops watching it. It runs on."""
        if self._wrapper:
            self._wrapper.release()
        self._handles.close()


def _start_wrapper(launch: Launch) -> ChildProcess:
    try:
        with launch.log.open("ab") as log:
            return ChildProcess(with_limit_at_start(launch.command), launch.environment, log)
    except OSError as error:
        if is_lack_of_descriptors(error):
            raise too_many_open_files(f"{launch.log} cannot be opened") from None
        raise HostFault(f"{launch.log} cannot be opened: {error.strerror}", hint="Run bkpool doctor.") from None


async def _wait_for_answer(launch: Launch, wrapper: ChildProcess, seconds: float) -> Daemon:
    """Probes a daemon that starts, until it answers a call."""
    pause, reason = _FIRST_RETRY, "it does not listen"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (code := await wrapper.wait(0)) is None:
                try:
                    pid = await probe(launch.socket)
                except Unavailable:
                    pass  # its socket is not bound yet, and no event announces that
                except WorkerFailed as error:
                    reason = error.message
                else:
                    reason = "its network is not complete"
                    if launch.network_ready is None or launch.network_ready.exists():
                        try:
                            return _checked(pid, launch, wrapper)
                        except OSError as error:
                            if is_lack_of_descriptors(error):
                                raise too_many_open_files("buildkitd cannot be watched") from None
                            # else it has just ended; the wrapper's exit code tells how
                await wrapper.wait(pause)
                pause = min(pause * 1.3, _LAST_RETRY)
            raise WorkerFailed(f"buildkitd {_exit_text(code)} before it answered", log_tail=log_tail(launch.log))
    raise WorkerFailed(f"buildkitd was not ready after {seconds:.0f} s: {reason}", log_tail=log_tail(launch.log))


def _checked(pid: int, launch: Launch, wrapper: ChildProcess) -> Daemon:
    """Checks that the process behind the socket runs in our wrapper."""
    if not process_table.is_below(pid, wrapper.pid):
        raise WorkerFailed(f"process {pid} answers on {launch.socket}, but another buildkitd was started for it")
    return Daemon(pid, launch.socket, launch.log, wrapper)


def log_tail(log: Path) -> str:
    """The informative lines at the end of a log; empty if there are none."""
    try:
        lines = informative_lines(read_end(log, _LOG_BYTES).decode("utf-8", "replace"))
    except OSError:
        return ""
    return "\n".join(lines)


def _exit_text(code: int) -> str:
    """Describes an exit code. `worker_init` between us and the process reports a signal as 128 + its number."""
    number = -code if code < 0 else code - 128
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {code}"
