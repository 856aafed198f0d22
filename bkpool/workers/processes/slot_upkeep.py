"""What a buildkitd that runs needs on disk: made again where that is possible, named where it is not.

A user's session may end, somebody may tidy up /tmp, or `slots` may be removed. It never removes anything.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from bkpool.workers.health import DaemonLost
from bkpool.workers.processes.slot_files import SlotFiles

TEMPORARY = "tmp"
"""In the directory of a slot's sockets: a link to the daemon's TMPDIR, which needs a short path."""


def keep(files: SlotFiles, socket: Path, cache: tuple[int, int] | None) -> None:
    """Checks what the daemon in a slot needs, and makes its TMPDIR again.

    Args:
        files: The slot's.
        socket: Where the daemon listens.
        cache: The identity of the directory of the cache, after the start.

    Raises:
        DaemonLost: Its socket or its cache was removed. Neither can be made again for a daemon that runs.
    """
    if identity(socket) is None:
        raise DaemonLost(f"{socket} was removed")
    if identity(files.root) != cache:
        raise DaemonLost(f"{files.root} was removed", builds_fail=not _out_of_reach(files.root))
    temporary = socket.parent / TEMPORARY
    if identity(temporary) is None:
        with suppress(OSError):  # then the next probe tries again
            files.scratch.mkdir(mode=0o700, exist_ok=True)
            temporary.unlink(missing_ok=True)  # a link to nothing
            temporary.symlink_to(files.scratch)


def _out_of_reach(path: Path) -> bool:
    """Whether the system cannot say now what is there. It may still be what it was."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return False


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from a later one of the same name; None if there is none, or if it is out of reach."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
