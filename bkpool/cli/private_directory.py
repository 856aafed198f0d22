"""A directory for keys that is removed at the end, and after `kill -9` by the next run of bkpool.

Its owner holds a lock on it, which ends with the process. Only directories without such a lock are removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NEW = "new-"
"""Begins the name of a directory until it is locked. There is no key in it yet."""


@contextmanager
def private_directory(prefix: str) -> Iterator[Path]:
    """A directory of mode 0700 in $XDG_RUNTIME_DIR, or where that cannot be used among the temporary files.

    First it removes those with the same prefix that killed processes of this user have left in both places.

    Args:
        prefix: Begins its name.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = bool(runtime) and os.access(runtime, os.W_OK | os.X_OK)
    parent = Path(runtime if usable else tempfile.gettempdir()).absolute()
    for place in {parent, Path(tempfile.gettempdir())}:
        remove_abandoned(place, prefix)
    draft = Path(tempfile.mkdtemp(prefix=f"{_NEW}{prefix}", dir=parent))
    descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        directory = draft.rename(draft.with_name(draft.name.removeprefix(_NEW)))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the directories of this user with this prefix whose owner has ended. It follows no link."""
    with suppress(OSError):
        for entry in parent.glob(f"{prefix}*"):
            _remove_unless_held(entry)


def _remove_unless_held(directory: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
        finally:
            os.close(descriptor)
