"""One buildkitd: started, taken over from an earlier appliance, watched, ended.

Three processes matter: the wrapper (unshare or rootlesskit: our child, if we started it), the first process in the
namespaces (with it everything in there ends), and buildkitd (what the socket belongs to). Nothing here knows slots,
caches or owners.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.workers.last_words import telling
from bkpool.workers.probe import probe
from bkpool.workers.processes import process_table
from bkpool.workers.processes.process_table import Process
from bkpool.workers.processes.slot_files import DaemonRecord

MARK = "BKPOOL_SLOT"
"""In the environment of everything started for a slot: what a crash left without a record is found by it."""

_FIRST_RETRY, _LAST_RETRY = 0.005, 0.05  # seconds between tries while buildkitd has not bound its socket yet
_ADOPTION_DEADLINE = 5.0  # seconds; it has been up for long, or it is of no use
_LOG_BYTES = 8192  # of the log's end, in which lines worth showing are looked for


@dataclass(frozen=True, slots=True)
class Launch:
    """What is needed to start a daemon."""

    command: Sequence[str]
    """The wrapper, with buildkitd and all arguments."""
    environment: Mapping[str, str]
    """With MARK in it."""
    socket: Path
    log: Path


class Daemon:
    """A buildkitd that has answered."""

    def __init__(self, pid: int, socket: Path, log: Path, wrapper: _Wrapper | None = None) -> None:
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

    @classmethod
    async def start(cls, launch: Launch, deadline: float) -> Daemon:
        """Starts a daemon and waits until it answers.

        Args:
            launch: What to start.
            deadline: Seconds it may take.

        Raises:
            WorkerFailed: It ended or did not answer in time; nothing of it is left.
            HostFault: It can't be run at all.
        """
        wrapper = _Wrapper(launch)
        try:
            return await _first_answer(launch, wrapper, deadline)
        except BaseException:
            await process_table.kill_marked(MARK, launch.environment[MARK].__eq__)
            await wrapper.reap()
            raise

    @classmethod
    async def adopt(cls, record: DaemonRecord, log: Path) -> Daemon | None:
        """Takes over the daemon that a record speaks of, if it is still that one and answers."""
        if record.boot_id != process_table.boot_id() or record.pid is None or record.socket is None:
            return None
        socket = Path(record.socket)
        with contextlib.suppress(OSError, Unavailable, WorkerFailed):
            async with asyncio.timeout(_ADOPTION_DEADLINE):
                peer = await probe(socket)
            if peer == record.pid:
                daemon = cls(peer, socket, log)
                if daemon.start_time == record.start_time:
                    return daemon
                daemon.release()
        return None

    async def ended(self) -> WorkerFailed:
        """Waits until it ends. Returns, as an error, how it ended and the end of its log."""
        await self._first.exited.wait()
        how = _how(await self._wrapper.reap()) if self._wrapper else "ended"
        self._handles.close()
        return WorkerFailed(f"buildkitd (process {self.pid}) {how}", log_tail=log_tail(self._log))

    async def stop(self, grace: float) -> None:
        """Ends it and everything it started.

        Args:
            grace: Seconds for builds in flight: after SIGTERM buildkitd takes no new ones and waits for these.

        Raises:
            WorkerFailed: It would not die.
        """
        self._server.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._first.exited.wait()
        except TimeoutError:
            await process_table.kill([self._first])
        if self._wrapper:
            await self._wrapper.reap()
        self._handles.close()

    def release(self) -> None:
        """Lets go of it; it runs on."""
        if self._wrapper:
            self._wrapper.release()
        self._handles.close()


class _Wrapper:
    """The process that we start ourselves, and so must reap."""

    def __init__(self, launch: Launch) -> None:
        try:
            with launch.log.open("ab") as log:
                self._child = subprocess.Popen(
                    launch.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    env=launch.environment,
                    umask=0o077,
                    start_new_session=True,
                )
            self._process = self._held()
        except OSError as error:
            raise HostFault(
                f"{launch.command[0]} can't be run: {error.strerror}", hint="Run bkpool doctor.", code="ToolMissing"
            ) from None
        self.pid = self._child.pid

    def _held(self) -> Process:
        try:
            return Process(self._child.pid)
        except OSError:  # no descriptor left
            self._child.kill()
            self._child.wait()
            raise

    @property
    def exited(self) -> asyncio.Event:
        return self._process.exited

    async def ended(self) -> int:
        """Waits for its end and returns how it ended, as subprocess has it."""
        await self._process.exited.wait()
        return self._child.wait()

    async def reap(self) -> int:
        """Waits for its end and lets go of it."""
        code = await self.ended()
        self._process.close()
        return code

    def release(self) -> None:
        self._process.close()
        self._child.returncode = 0  # otherwise subprocess complains that it was not waited for; init will do that


async def _first_answer(launch: Launch, wrapper: _Wrapper, deadline: float) -> Daemon:
    """The daemon, as soon as it answers a call."""
    pause, said = _FIRST_RETRY, "it does not listen"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(deadline):
            while not wrapper.exited.is_set():
                try:
                    pid = await probe(launch.socket)
                except Unavailable:
                    pass  # not bound yet: there is no event to wait for but the wrapper's end
                except WorkerFailed as error:
                    said = error.message
                else:
                    with contextlib.suppress(OSError):  # it has just ended; the wrapper will say how
                        return _checked(pid, launch, wrapper)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await wrapper.exited.wait()
                pause = min(pause * 1.3, _LAST_RETRY)
            how = _how(await wrapper.ended())
            raise WorkerFailed(f"buildkitd {how} before it answered", log_tail=log_tail(launch.log))
    raise WorkerFailed(f"buildkitd was not ready after {deadline:.0f} s: {said}", log_tail=log_tail(launch.log))


def _checked(pid: int, launch: Launch, wrapper: _Wrapper) -> Daemon:
    """The daemon behind the socket, if it is the one in our wrapper."""
    if process_table.parent(process_table.parent(pid)) != wrapper.pid:
        raise WorkerFailed(f"process {pid} answers on {launch.socket}, which is not the buildkitd started for it")
    return Daemon(pid, launch.socket, launch.log, wrapper)


def log_tail(log: Path) -> str:
    """The last lines of a log that are worth showing; empty if there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            lines = telling(file.read().decode("utf-8", "replace"))
    except OSError:
        return ""
    return "\n".join(lines)


def _how(code: int) -> str:
    """How a process ended; a shell in between reports a signal as 128 + its number."""
    number = -code if code < 0 else code - 128
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {code}"
