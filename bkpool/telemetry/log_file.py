"""The log file of a process that runs in the background: it has a maximum size, and so have the older ones beside it.

The file is also the process's stderr, so that what Python or C writes there at a crash is in it, too. A full file is
renamed, and the descriptors are turned to a new one. No line is lost by that, and none is copied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bkpool.telemetry.log_writer import DescriptorSink

KEPT = 4
"""Older files that are kept, with the suffixes .1 (the newest) to .4."""
_RETRY = 64 * 1024  # bytes: after a rotation that failed, so much is written before the next attempt


class RotatedFile:
    """A file that is open for appending.

    Args:
        path: Its name.
        descriptors: All of this process that lead to it. Lines are written to the first.
        size: Bytes that it has at most.
        kept: How many older files are kept.
    """

    def __init__(self, path: Path, descriptors: Sequence[int], *, size: int, kept: int = KEPT) -> None:
        self._path = path
        self._descriptors = tuple(descriptors)
        self._limit = size
        self._kept = kept
        self._sink = DescriptorSink(self._descriptors[0])
        self._rotate_at = size

    def write(self, data: bytes) -> int:
        """See LogSink. Before the file gets too large, and after somebody has removed it, it begins a new one."""
        now = os.fstat(self._descriptors[0])
        size = now.st_size
        if now.st_nlink == 0 or (size and size + len(data) > self._rotate_at):
            try:
                self._rotate()
            except OSError:  # the disk is full, or the directory cannot be written: go on with this file
                self._rotate_at = size + _RETRY
            else:
                self._rotate_at = self._limit
        return self._sink.write(data)

    def _rotate(self) -> None:
        """Renames the file and opens a new one. If it fails, lines still go to the file with this name."""
        self._path.parent.mkdir(mode=0o700, exist_ok=True)  # it may be gone together with the file
        draft = self._path.with_name(f"{self._path.name}.new")
        fresh = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            if is_open_as(self._path, self._descriptors[0]):  # else somebody has renamed or removed it
                for number in range(self._kept, 1, -1):
                    with suppress(FileNotFoundError):
                        older_file(self._path, number - 1).rename(older_file(self._path, number))
                self._path.rename(older_file(self._path, 1))
            draft.rename(self._path)
            for descriptor in self._descriptors:
                os.dup2(fresh, descriptor)
        finally:
            os.close(fresh)


def older_file(path: Path, number: int) -> Path:
    """The file that a log was renamed to: 1 is the newest."""
    return path.with_name(f"{path.name}.{number}")


def is_open_as(path: Path, descriptor: int) -> bool:
    """Whether a descriptor leads to the file with this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
