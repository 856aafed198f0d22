"""Brings a database of an earlier version to today's schema, or leaves it exactly as it was.

A complete copy is made first, and stays. Then all steps run in one transaction. Nothing here knows what the rows mean
to the rest of bkpool: a step does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import structlog

from bkpool.home.disk import fault_if_full
from bkpool.home.files import sync_directory

log = structlog.get_logger(__name__)

Step = Callable[[sqlite3.Connection], None]
"""Changes tables and rows by single statements. It must neither commit nor call `executescript`, which commits."""

STEPS: tuple[Step, ...] = ()
"""The first leads from schema 1 to schema 2, and so on. To change the schema, add one at the end: a new database is
made with schema 1 and all steps, too."""


def copy_of(path: Path, version: int) -> Path:
    """Where the copy of a database with this schema is kept."""
    return path.with_name(f"{path.name}.schema-{version}")


def migrate(path: Path, db: sqlite3.Connection, version: int, steps: Sequence[Step]) -> None:
    """Copies the database and carries out the steps that it has not seen.

    Args:
        path: The database.
        db: A connection in autocommit mode. Nobody else writes.
        version: The schema of the database.
        steps: All steps, from schema 1 on.

    Raises:
        DiskFull: There is no room. The database is as it was.
        sqlite3.Error: It was not possible. The database is as it was.
        OSError: The copy cannot be made. The database is as it was.
    """
    newest, copy = 1 + len(steps), copy_of(path, version)
    _copy(db, copy)
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version - 1 :]:
            step(db)
        db.execute(f"PRAGMA user_version = {newest}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    log.info("store.migrated", path=str(path), from_schema=version, to_schema=newest, copy=str(copy))


def _copy(db: sqlite3.Connection, copy: Path) -> None:
    """Makes a copy that is complete or not there. An earlier one of the same schema is replaced."""
    draft = copy.with_name(f"{copy.name}.new")
    draft.unlink(missing_ok=True)
    try:
        draft.touch(mode=0o600)
        with closing(sqlite3.connect(draft, isolation_level=None)) as target:
            target.execute("PRAGMA synchronous = FULL")
            db.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # so that the copy is one file
        draft.rename(copy)
    except BaseException:
        full = fault_if_full(copy)  # asked before there is room again
        draft.unlink(missing_ok=True)
        if full:
            raise full from None
        raise
    sync_directory(copy.parent)
