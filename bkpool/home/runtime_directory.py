"""The private directory of an appliance's Unix sockets.

Its path is short, because a Unix socket's path has at most 108 bytes and a home directory may be deep. Only this user
may enter it, because everybody who can connect to a worker's socket can use the worker. Nothing here opens a socket.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from bkpool.core.errors import HostFault

LONGEST_SOCKET = 103
"""Bytes of a socket's path: sun_path of unix(7) has 108 on Linux, 104 elsewhere, with the final zero."""
_OF_ROOT = Path("/run/bkpool")  # in /run, nobody but root can make this name before us


def home_digest(home: Path) -> str:
    """A name for this home, so that the appliances of several homes on one machine are not confused."""
    return hashlib.sha256(bytes(home.resolve())).hexdigest()[:12]


def default_directory(home: Path, environ: Mapping[str, str]) -> Path:
    """The directory for the sockets of this home. It need not exist yet; `claim` makes it.

    Returns:
        For root `/run/bkpool/<digest>`. For others `$XDG_RUNTIME_DIR/bkpool-<digest>`, if that directory is theirs.
        Otherwise, and for root where /run cannot be written, `/tmp/bkpool-<uid>-<digest>`.
    """
    return next(_candidates(home, environ))


def possible_directories(home: Path, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """All directories that can be used for this home at the moment, the default first."""
    return tuple(_candidates(home, environ))


def last_resort(home: Path) -> Path:
    """Where a running appliance makes its sockets if the directory that it had is gone and cannot be made again.

    It does not depend on the environment, so commands of another session find it. It is that of the home's owner.
    """
    try:
        uid = home.stat().st_uid
    except OSError:
        uid = os.geteuid()
    return _in_tmp(home_digest(home), uid)


def former_directories(home: Path, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where an earlier version, or a session with another environment, may have put the sockets of this home."""
    session = Path("/run/user", str(os.geteuid()), f"bkpool-{home_digest(home)}")
    current = default_directory(home, environ)
    found = dict.fromkeys((*_candidates(home, environ, every=True), session))
    return tuple(path for path in found if path != current)


def claim(directory: Path) -> None:
    """Makes the directory, or checks that the existing one belongs to this user alone. It follows no link.

    One that only this user's group could enter is closed and emptied: buildkitd makes the directory of its socket
    like that if somebody removed it while buildkitd was starting.

    Raises:
        HostFault: It is a link, belongs to another user, is open to others, or cannot be made.
    """
    if directory.parent == _OF_ROOT:
        _claim(_OF_ROOT)
    if _claim(directory):
        for entry in directory.iterdir():
            _remove(entry)


def hold(directory: Path) -> int:
    """Locks the directory, so that systemd-tmpfiles leaves it alone with all that is in there (tmpfiles.d(5)).

    Returns:
        A descriptor. The lock ends when it is closed.

    Raises:
        HostFault: The directory cannot be opened.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise HostFault(
            f"{directory} cannot be opened: {error.strerror}", hint="Make it readable for this user."
        ) from None
    with suppress(OSError):  # somebody else has locked it, or this file system has no locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def first_usable(directories: Iterable[Path]) -> Path:
    """Makes the first of these directories that this user can have, see `claim`.

    Raises:
        HostFault: None of them; the reason is that of the first.
    """
    fault: HostFault | None = None
    for directory in directories:
        try:
            claim(directory)
        except HostFault as error:
            fault = fault or error
        else:
            return directory
    raise fault or HostFault("there is no directory for sockets", hint="Set XDG_RUNTIME_DIR to one of your own.")


def check(directory: Path) -> None:
    """Checks, like `claim`, what is there already. It makes nothing.

    Raises:
        HostFault: It is a link, belongs to another user, or is open to others.
    """
    for path in (_OF_ROOT, directory) if directory.parent == _OF_ROOT else (directory,):
        if os.path.lexists(path):
            _check(path)


def is_private(directory: Path) -> bool:
    """Whether this is a directory, and no link to one, that belongs to this user alone."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def check_length(socket: Path, directory: Path) -> None:
    """Checks that a socket can have this path.

    Args:
        socket: The socket with the longest path.
        directory: The directory of the sockets, for the message.

    Raises:
        HostFault: It is too long.
    """
    length = len(bytes(socket))
    if length > LONGEST_SOCKET:
        raise HostFault(
            f"{directory} is too deep for sockets: their paths would have {length} bytes, "
            f"{LONGEST_SOCKET} are possible",
            hint="Set XDG_RUNTIME_DIR to a directory with a shorter path.",
        )


def _candidates(home: Path, environ: Mapping[str, str], *, every: bool = False) -> Iterator[Path]:
    """The possible directories, the best one first; with `every` also those that cannot be used at the moment."""
    digest, session = home_digest(home), environ.get("XDG_RUNTIME_DIR", "")
    if os.geteuid() == 0 and os.access(_OF_ROOT.parent, os.W_OK | os.X_OK):
        yield _OF_ROOT / digest
    if session.startswith("/") and (every or _is_own(Path(session))):
        yield Path(session, f"bkpool-{digest}")
    yield _in_tmp(digest, os.geteuid())


def _in_tmp(digest: str, uid: int) -> Path:
    return Path("/tmp", f"bkpool-{uid}-{digest}")  # noqa: S108 - claim() checks that it is ours


def _is_own(session: Path) -> bool:
    """Whether this user, and nobody else, can make files in this directory."""
    try:
        found = session.stat()
    except OSError:
        return False
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return own and os.access(session, os.W_OK | os.X_OK)


def _claim(directory: Path) -> bool:
    """Makes or checks a directory. Returns whether the user's group could enter it until now."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        was_open = _close(directory)
    except OSError as error:
        raise HostFault(
            f"the directory {directory} for sockets cannot be made: {error.strerror}",
            hint="Remove what is in its place, or set XDG_RUNTIME_DIR to a directory that this user may write to.",
            code="Permission",
        ) from None
    _check(directory)
    return was_open


def _close(directory: Path) -> bool:
    """Takes a directory of this user from its group. Returns whether that was necessary."""
    found = directory.lstat()
    only_group = found.st_mode & 0o070 and not found.st_mode & 0o007
    if not (stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and only_group):
        return False
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return True


def _remove(entry: Path) -> None:
    with suppress(OSError):  # what cannot be removed is reported by whoever needs its name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check(directory: Path) -> None:
    if not is_private(directory):
        raise HostFault(
            f"{directory} is not a directory of this user with mode 0700; sockets are not safe there",
            hint="Remove it, or set XDG_RUNTIME_DIR to a directory that only you may enter.",
            code="Permission",
        )
