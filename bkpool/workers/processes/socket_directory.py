"""The private directory of the workers' sockets.

Its path is short, because a Unix socket's path has at most 108 bytes and a home directory may be deep. Only this user
may enter it, because everybody who can connect to a worker's socket can use the worker.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot

_LONGEST = 103  # bytes: sun_path of unix(7) has 108 on Linux, 104 elsewhere, with the final zero


def home_digest(home: Path) -> str:
    """A name for this home, so that workers of several homes on one machine are not confused."""
    return hashlib.sha256(bytes(home.resolve())).hexdigest()[:12]


def default_directory(home: Path, environ: Mapping[str, str]) -> Path:
    """`$XDG_RUNTIME_DIR/bkpool-<digest>`, or `/tmp/bkpool-<uid>-<digest>` where a session has no such directory."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return Path(runtime, f"bkpool-{home_digest(home)}")
    return Path("/tmp", f"bkpool-{os.geteuid()}-{home_digest(home)}")  # noqa: S108 - claim() checks that it is ours


def claim(directory: Path) -> None:
    """Makes the directory, or checks that the existing one belongs to this user alone.

    Raises:
        HostFault: It is a link, belongs to another user, is open to others, or cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise HostFault(
            f"the directory {directory} for the workers' sockets cannot be made: {error.strerror}",
            hint="Set XDG_RUNTIME_DIR to a directory that this user may write to.",
            code="Permission",
        ) from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    if not private:
        raise HostFault(
            f"{directory} is not a directory of this user with mode 0700; the workers' sockets are not safe there",
            hint="Remove it, or set XDG_RUNTIME_DIR to a directory that only you may enter.",
            code="Permission",
        )


def slot_directory(directory: Path, slot: Slot) -> Path:
    """Where the sockets of a slot are. People can read the name, as far as its length allows.

    Raises:
        HostFault: The paths of its sockets would be too long.
    """
    digest = hashlib.sha256(repr(tuple(slot)).encode()).hexdigest()[:6]
    path = directory / f"{slot.pool[:16]}-{slot.number}-{digest}"
    longest = len(bytes(path / "rootlesskit" / "api.sock"))
    if longest > _LONGEST:
        raise HostFault(
            f"{directory} is too deep for sockets: their paths would have {longest} bytes, {_LONGEST} are possible",
            hint="Set XDG_RUNTIME_DIR to a directory with a shorter path.",
        )
    return path
