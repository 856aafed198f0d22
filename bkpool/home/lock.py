"""The lock of a home, so that only one appliance uses it. It ends with the process that holds it, and tells its pid.

It is an open-file-description lock (fcntl(2), F_OFD_SETLK). Unlike flock, it can be queried without being taken, so
that `bkpool status` never makes `bkpool up` fail. Nothing here stops a process.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

from bkpool.core.errors import HostFault
from bkpool.home.files import as_host_fault, private_directory

_FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length (0: all), pid
_ALL = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_PID_WIDTH = 20  # fixed width, written in one piece over the last pid, so that a reader never finds half of it


class HomeLock:
    """Holds `<home>/lock` from `acquire` to `release`; a context manager does both.

    Args:
        home: The directory. It is created (0700) if it does not exist.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock, and writes this process's pid into it.

        Raises:
            HostFault: `AlreadyRunning`, with the pid; `Permission` if the home is open to other users.
        """
        private_directory(self._home)
        with as_host_fault(lock_file(self._home)):
            descriptor = os.open(lock_file(self._home), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _ALL)
        except BlockingIOError:
            pid = _pid_in(descriptor)
            os.close(descriptor)
            raise HostFault(
                f"bkpool is already running in {self._home} (pid {pid or 'not known yet'})",
                hint="Use it, stop it with `bkpool down`, or set BKPOOL_HOME to another directory.",
                code="AlreadyRunning",
            ) from None
        try:
            with as_host_fault(lock_file(self._home)):
                os.pwrite(descriptor, f"{os.getpid():<{_PID_WIDTH}}\n".encode(), 0)
        except HostFault:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Releases the lock. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(home: Path) -> int | None:
    """The pid of the process that holds this home, or None. It neither takes the lock nor creates a file.

    A home that cannot be written will do: to query a lock, unlike to take it, the file may be open for reading only.

    Raises:
        HostFault: `Permission`: this user may not read the lock.
    """
    with as_host_fault(lock_file(home)):
        try:
            descriptor = os.open(lock_file(home), os.O_RDONLY)
        except FileNotFoundError:
            return None
    try:
        kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _ALL))
        return None if kind == fcntl.F_UNLCK else _pid_in(descriptor)
    finally:
        os.close(descriptor)


def lock_file(home: Path) -> Path:
    """The file whose lock tells who holds a home."""
    return home / "lock"


def _pid_in(descriptor: int) -> int | None:
    text = os.pread(descriptor, _PID_WIDTH, 0).strip()
    return int(text) if text.isdigit() else None
