"""A process that we start ourselves, and must reap: the wrapper of a daemon, or what removes a cache.

It needs no file descriptor, because it has to end a process also when there is none left. The number of a process
that only we can reap belongs to no other one until we do. Whether it has ended is asked again and again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.toolchain.descriptor_limit import is_lack_of_descriptors, too_many_open_files

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds between two questions whether it has ended
_END_TIMEOUT = 30.0  # seconds; only a process in uninterruptible I/O lives longer after SIGKILL


class ChildProcess:
    """A process in a session of its own, without input.

    Args:
        command: What to run.
        environment: All of its variables.
        output: Where it writes.

    Raises:
        HostFault: The program cannot be run.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment,
                umask=0o077,
                start_new_session=True,
            )
        except OSError as error:
            raise _cannot_run(command[0], error) from None
        self.pid = self._process.pid

    async def wait(self, seconds: float) -> int | None:
        """Waits until it ends.

        Args:
            seconds: How long at most; with 0 it only asks.

        Returns:
            The exit code as subprocess has it, negative for a signal; None if it has not ended in time.
        """
        pause, loop = _FIRST_PAUSE, asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while (code := self._process.poll()) is None and (left := deadline - loop.time()) > 0:
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return code

    async def end(self) -> int:
        """Kills it with all of its process group, and reaps it. Returns its exit code.

        Raises:
            WorkerFailed: It has not ended.
        """
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return await self.reap()

    async def reap(self) -> int:
        """Waits until it ends, because it was killed or what it waits for has ended. Returns its exit code.

        Raises:
            WorkerFailed: It has not ended.
        """
        code = await self.wait(_END_TIMEOUT)
        if code is None:
            raise WorkerFailed(
                f"process {self.pid} has not ended {_END_TIMEOUT:.0f} s after SIGKILL",
                hint="It hangs in the kernel, usually on a disk. Look at dmesg.",
            )
        return code

    def release(self) -> None:
        """Lets it run on without us."""
        self._process.returncode = 0  # else subprocess warns that nobody has waited for it; init will


def _cannot_run(program: str, error: OSError) -> HostFault:
    """The error for a program that could not be started."""
    if is_lack_of_descriptors(error):
        return too_many_open_files(f"{program} cannot be run")
    return HostFault(f"{program} cannot be run: {error.strerror}", hint="Run bkpool doctor.", code="ToolMissing")
