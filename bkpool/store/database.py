"""The SQLite file: created completely or not at all, and opened only if bkpool created it and it is intact.

A file of an earlier version is migrated (`migration`), one of a newer version is refused. Of the rows this knows only
that the columns of each name an object (`rows` reads the rest), and nothing ever replaces a file that cannot be read.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from bkpool import __version__
from bkpool.core.errors import BkpoolError, HostFault, Unavailable
from bkpool.home.disk import disk_full, fault_if_full, is_full
from bkpool.home.files import sync_directory, unreadable
from bkpool.store import migration
from bkpool.store.migration import Step

_APPLICATION_ID = 0x626B706C  # "bkpl": marks a file as bkpool's (PRAGMA application_id)
_BUSY_SECONDS = 5.0  # someone with the sqlite3 shell may lock the file for a moment

# `events` is the log that watches read; its last version is the store's resourceVersion. `compacted` has, for each
# kind, the version up to which events were removed from the log. `terms` is the index of labels and owners.
_SCHEMA = f"""
CREATE TABLE objects (
    uid TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    UNIQUE (kind, namespace, name)
);
CREATE TABLE terms (term TEXT NOT NULL, uid TEXT NOT NULL, PRIMARY KEY (term, uid)) WITHOUT ROWID;
CREATE INDEX terms_of_object ON terms (uid);
CREATE TABLE events (version INTEGER PRIMARY KEY, kind TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX events_of_kind ON events (kind, version);
CREATE TABLE compacted (kind TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = 1;
"""


def prepare(path: Path, steps: Sequence[Step] = migration.STEPS, *, only_user: bool = True) -> None:
    """Creates the database if there is none, checks it, and brings it to today's schema.

    Args:
        path: The database.
        steps: What leads from schema 1 to today's.
        only_user: Whether the caller holds the lock of the home. Without it, an earlier schema is refused, too:
            an earlier bkpool may be running.

    Raises:
        HostFault: `Unreadable` (not a database, damaged, of another program, or of another schema that cannot be
            used), `DiskFull`, `Permission`.
    """
    try:
        if not path.exists():
            _create(path, steps)
        with closing(connect(path)) as db:
            version = _check(path, db, newest := 1 + len(steps))
            if version == newest:
                return
            if not only_user:
                raise unreadable(
                    path,
                    f"was written by an earlier bkpool (schema {version}; bkpool {__version__} uses {newest})",
                    hint="`bkpool up` migrates it.",
                )
            migration.migrate(path, db, version, steps)
    except sqlite3.Error as error:
        raise fault(error, path) from None
    except OSError as error:
        if is_full(error):
            raise disk_full(path, quota=error.errno == errno.EDQUOT) from None
        raise HostFault(f"{path}: {error.strerror}", hint="Check the directory it is in.") from None


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection for one thread. Transactions are only those that are opened explicitly."""
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        db.execute("PRAGMA synchronous = FULL")
        # Only at some 32 MB of log must a writer copy it into the file itself (50 ms here). Mostly that is done in
        # pauses (thread.py).
        db.execute("PRAGMA wal_autocheckpoint = 8000")
        db.execute(f"PRAGMA query_only = {int(read_only)}")
    except sqlite3.Error:
        db.close()
        raise
    return db


def fault(error: sqlite3.Error, path: Path) -> BkpoolError:
    """The error for the user that stands for one of SQLite (https://www.sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _PERHAPS_FULL and (full := fault_if_full(path, _PAGE)):
        return full
    match code:
        case sqlite3.SQLITE_FULL:
            return disk_full(path)
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return unreadable(path, f"is not a database or is damaged ({error})", hint=_RESTORE.format(path=path))
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Unavailable(f"{path} is locked by another program", hint="Close the program that has it open.")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_READONLY:
            return HostFault(
                f"{path}: {error}",
                hint="Give your user read and write access to it and its directory.",
                code="Permission",
            )
        case _:
            return HostFault(f"{path}: {error}", hint="Check the disk it is on.")


_PERHAPS_FULL = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
"""So SQLite reports that there is no room for one of the files beside the database."""
_PAGE = 64 * 1024  # bytes: the largest piece that one of these files grows by
_RESTORE = "Restore {path} from a backup, or, to start without the leases in it: bkpool down, then move it away."


def _create(path: Path, steps: Sequence[Step]) -> None:
    """Creates the file under another name and renames it, so that a crash never leaves an incomplete one."""
    if path.with_name(f"{path.name}-wal").exists():
        raise unreadable(path, "is missing, although its log (-wal) exists", hint=_RESTORE.format(path=f"{path}*"))
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    with closing(sqlite3.connect(draft, isolation_level=None)) as db:
        db.executescript(f"PRAGMA synchronous = FULL; BEGIN;{_SCHEMA}COMMIT; PRAGMA journal_mode = WAL;")
        for step in steps:
            step(db)
        db.execute(f"PRAGMA user_version = {1 + len(steps)}")
    draft.rename(path)
    sync_directory(path.parent)


def _check(path: Path, db: sqlite3.Connection, newest: int) -> int:
    """The schema of the database, which is intact. Raises HostFault (`Unreadable`) otherwise."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise unreadable(path, "is not a database of bkpool", hint=_RESTORE.format(path=path))
    if version > newest:
        copy = migration.copy_of(path, newest)
        back = f" Or go back to {copy}, from before the upgrade: see Upgrade in docs/usage.md." * copy.exists()
        raise unreadable(
            path,
            f"was written by a newer bkpool (schema {version}; bkpool {__version__} knows {newest})",
            hint=f"Use that version of bkpool.{back}",
        )
    (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if result != "ok":
        raise unreadable(path, f"is damaged ({result})", hint=_RESTORE.format(path=path))
    names = "SELECT rowid, CAST(kind AS BLOB), CAST(namespace AS BLOB), CAST(name AS BLOB), "
    types = "typeof(kind) || typeof(namespace) || typeof(name) FROM objects"
    for rowid, *columns, found in db.execute(names + types):
        if found != "text" * 3 or not all(_is_name(column) for column in columns):
            what = f"is damaged (row {rowid} of its objects has no name, so nothing can be kept apart from it)"
            raise unreadable(path, what, hint=_RESTORE.format(path=path))
    return int(version)


def _is_name(column: bytes) -> bool:
    """Whether a column is text of a length that can be said to somebody."""
    try:
        return 0 < len(column.decode()) <= _LONGEST_NAME
    except UnicodeError:
        return False


_LONGEST_NAME = 253  # as in Kubernetes; the names that bkpool gives are shorter
