"""The process that holds a home: found, checked to be that process, asked to end, and waited for.

`bkpool down` needs exactly this. A pidfd is used for everything, so no signal ever goes to another process that got
the same number. Nothing here decides how long anybody waits.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

from bkpool.core.errors import HostFault
from bkpool.home.lock import holder, lock_file

DRAIN_SIGNAL = signal.SIGUSR2
"""Asks an appliance to end once its builds have finished. Unlike SIGTERM, a second one changes nothing."""


class HolderProcess:
    """The process that holds a home. Close it after use.

    Args:
        pid: Its number.
        descriptor: A pidfd of it.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._ended = select.poll()
        self._ended.register(descriptor, select.POLLIN)

    @classmethod
    def find(cls, home: Path) -> Self | None:
        """The process that holds this home; None if there is none.

        Raises:
            HostFault: The home is held, but by no process that can be found here; or this user may not read the lock.
        """
        pid = holder(home)
        if pid is None:
            return None
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            if holder(home) == pid and _has_open(pid, lock_file(home)):
                return cls(pid, descriptor)
            os.close(descriptor)
        if holder(home) is None:  # it has ended meanwhile
            return None
        raise HostFault(
            f"{home} is held, but not by process {pid} of this machine, which its lock names",
            hint="The appliance runs in a container, or on another machine that shares the directory: stop it there.",
            code="HeldElsewhere",
        )

    def drain(self) -> None:
        """Asks the appliance to end after its builds. An appliance that ends already goes on as it is.

        An appliance of an earlier version takes a second such request for an order to cut its builds.
        """
        self._send(DRAIN_SIGNAL if _catches(self.pid, DRAIN_SIGNAL) else signal.SIGTERM)

    def cut(self) -> None:
        """Tells the appliance to cut its builds and to end."""
        # Two signals with the same number may be merged into one; signals with different numbers are not.
        self._send(signal.SIGTERM)
        self._send(signal.SIGINT)

    def ended(self, seconds: float) -> bool:
        """Waits for the end, for this many seconds at most. Returns whether the process has ended."""
        return bool(self._ended.poll(seconds * 1000))

    def close(self) -> None:
        """Closes the pidfd."""
        os.close(self._descriptor)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            try:
                signal.pidfd_send_signal(self._descriptor, number)
            except PermissionError:
                raise HostFault("the appliance belongs to another user", hint="Stop it as that user.") from None


def _has_open(pid: int, file: Path) -> bool:
    """Whether the process has this file open. For another user's process nobody can tell; the answer is yes."""
    wanted = file.stat()
    try:
        entries = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True
    except OSError:
        return False
    for entry in entries:
        with suppress(OSError):  # it was closed meanwhile
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for this signal, which would otherwise end it."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.partition(":")[2], 16) >> (number - 1) & 1)
    return False
