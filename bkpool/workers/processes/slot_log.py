"""The log of a slot, to which buildkitd writes for itself: it has a maximum size, also while buildkitd runs.

buildkitd holds the file, and goes on with it when the appliance is killed. So the file is never replaced: what is in
it is copied away, and the file is made empty. buildkitd appends, so its next line is the first one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def earlier_part(path: Path) -> Path:
    """Where the earlier part of a log is that became too large since the last start of its daemon."""
    return path.with_name(f"{path.name}.earlier")


def bound(path: Path, size: int) -> None:
    """Makes a log that is larger than this empty, and keeps the end of it as its earlier part.

    A line that is written between copy and truncation is lost. If there is no room for the copy, all of it is.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END) <= size:
            return
        file.seek(-size, os.SEEK_END)
        draft = path.with_name(f"{path.name}.new")
        try:
            # As it grows meanwhile, all of it is read, and at once.
            draft.write_bytes(file.read().partition(b"\n")[2])
            draft.replace(earlier_part(path))
        except OSError:  # to make it empty makes room
            draft.unlink(missing_ok=True)
        os.truncate(path, 0)


def read_end(path: Path, size: int) -> bytes:
    """The last bytes of a log and its earlier part. Raises OSError."""
    data = _end(path, size)
    if len(data) < size:
        with suppress(FileNotFoundError):
            data = _end(earlier_part(path), size - len(data)) + data
    return data


def _end(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read(size)
