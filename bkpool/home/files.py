"""Private files: written completely or not at all, and read only if no other user can read them.

Keys, tokens and the home directory itself are handled here. Permissions are never repaired: another user may have
read the secret already, and its owner must know that.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bkpool.core.errors import HostFault
from bkpool.home.disk import disk_full, is_full

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_directory(path: Path) -> None:
    """Creates a directory of mode 0700, or checks that the existing one is private.

    Raises:
        HostFault: `Permission` (owned by another user, or open to others), `DiskFull`, or it cannot be created.
    """
    with as_host_fault(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            _check(path, path.stat(), "Permission")
            if not path.is_dir():
                raise
        else:
            sync_directory(path.parent)


def read_private(path: Path, *, hint: str = "") -> bytes:
    """The content of a file that only this user can read.

    Args:
        path: The file.
        hint: What to do if it is missing or damaged.

    Raises:
        HostFault: `Unreadable`: missing, not readable, owned by another user, or open to others.
    """
    try:
        with path.open("rb") as file:
            _check(path, os.fstat(file.fileno()), "Unreadable")
            return file.read()
    except OSError as error:
        raise unreadable(path, error.strerror or type(error).__name__, hint=hint) from None


def write_private(path: Path, data: bytes) -> None:
    """Writes a file of mode 0600, replacing an existing one. After a crash, the file is the old one or the new one.

    Raises:
        HostFault: `DiskFull`, `Permission`, or another error of the system.
    """
    draft = path.with_name(path.name + ".new")
    with as_host_fault(path):
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes files that were created, renamed or removed in a directory survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unreadable(path: Path, why: str, *, hint: str = "") -> HostFault:
    """The error for a stored file that cannot be used. bkpool never replaces such a file."""
    return HostFault(
        f"{path}: {why}",
        hint=hint or "Restore it from a backup; bkpool never replaces it.",
        code="Unreadable",
    )


def _check(path: Path, status: os.stat_result, code: str) -> None:
    if status.st_uid != os.geteuid():
        why, fix = f"belongs to user {status.st_uid}", f"Run bkpool as that user, or: chown {os.geteuid()} {path}"
    elif status.st_mode & _OTHERS:
        mode = "700" if stat.S_ISDIR(status.st_mode) else "600"
        why, fix = f"is open to other users (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod {mode} {path}"
    else:
        return
    raise HostFault(f"{path} {why}", hint=fix, code=code)


@contextmanager
def as_host_fault(path: Path) -> Iterator[None]:
    """Turns an OSError about a path into a HostFault that says what to do."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename or path}: {error.strerror or error}"
        if is_full(error):
            raise disk_full(Path(error.filename or path), quota=error.errno == errno.EDQUOT) from None
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise HostFault(
                where,
                hint=permission_hint(Path(error.filename or path))
                or "Give your user write access to it, or set BKPOOL_HOME to a directory of yours.",
                code="Permission",
            ) from None
        raise HostFault(where, hint="Check that path.") from None


def permission_hint(path: Path) -> str:
    """What to do about a path that this user may not use, if another user owns it or its directory; else ""."""
    for place in (path, *path.absolute().parents):
        try:
            owner = place.stat().st_uid
        except OSError:  # it is in a directory of another user, or does not exist
            continue
        if owner == os.geteuid():
            return ""
        whose = f"{place} belongs to user {owner}."
        return f"{whose} Run bkpool as that user, or set BKPOOL_HOME to a directory of yours."
    return ""
