"""A program that ends together with this process, however this process ends.

After `kill -9` of bkpool nothing else would end the program that it runs, or the lease that the program uses. Linux
does it: see PR_SET_PDEATHSIG in prctl(2).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1  # prctl.h


class Child(subprocess.Popen[bytes]):
    """Starts a program that is killed when this process ends. To be used in the main thread.

    Linux watches the thread that starts the program, and the main thread lives as long as the process.

    Args:
        command: The program and its arguments.
        env: Its environment.
        stdin, stdout, stderr: As for subprocess.Popen.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: IO[bytes] | None = None,
    ) -> None:
        prepare = ends_with_parent()
        super().__init__(command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, preexec_fn=prepare)


def ends_with_parent() -> Callable[[], None]:
    """Returns what a child of this process must call, before it runs its program, to be killed with this process."""
    # Found before the fork: afterwards the locks of other threads may be held for ever.
    prctl, getppid, exit_now, parent, kill = (
        ctypes.CDLL(None).prctl,
        os.getppid,
        os._exit,
        os.getpid(),
        signal.SIGKILL,
    )
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong]

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, kill)
        if getppid() != parent:  # it has ended already, and nothing will send the signal
            exit_now(128 + kill)

    return prepare
