"""A database of an earlier schema: copied, then migrated in one transaction, or left as it was.

The steps are made up, because there is one schema so far. The file, the disk that fills and the kill are real.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from bkpool.core.errors import EXIT, HostFault
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.store import database
from bkpool.store.sqlite import SqliteStore
from support.captured_logs import capture_logs


def adds_a_table(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE notes (note TEXT NOT NULL)")


def rewrites_each_row(db: sqlite3.Connection) -> None:
    for uid, data in db.execute("SELECT uid, data FROM objects").fetchall():
        db.execute("UPDATE objects SET data = ? WHERE uid = ?", [data + " " * 2000, uid])
        db.execute("INSERT INTO notes VALUES (?)", [uid])


STEPS = (adds_a_table, rewrites_each_row)


async def made(path: Path, pools: int = 20) -> bytes:
    """A database of schema 1; returns its content."""
    store = await SqliteStore.open(path)
    for number in range(pools):
        await store.create(Pool(metadata=Metadata(name=f"p{number}")))
    await store.close()
    return content(path)


def content(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as db:
        return "\n".join(db.iterdump()).encode()


def schema(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        return version


def files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}


async def test_an_older_file_is_copied_and_migrated(tmp_path):
    path, copy = tmp_path / "state.db", tmp_path / "state.db.schema-1"
    before = await made(path)

    with capture_logs() as logs:
        database.prepare(path, STEPS)
        database.prepare(path, STEPS)

    assert (schema(path), schema(copy)) == (3, 1)
    assert content(copy) == before
    assert files(tmp_path) == {"state.db": 0o600, "state.db.schema-1": 0o600}
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT COUNT(*) FROM notes").fetchone() == (20,)
    assert [(line["event"], line["from_schema"], line["to_schema"]) for line in logs] == [("store.migrated", 1, 3)]


async def test_a_file_in_between_gets_the_steps_that_it_has_not_seen(tmp_path):
    path = tmp_path / "state.db"
    await made(path)
    database.prepare(path, STEPS[:1])
    database.prepare(path, STEPS)
    assert schema(path) == 3
    assert [schema(tmp_path / f"state.db.schema-{n}") for n in (1, 2)] == [1, 2]


async def test_a_new_file_has_the_newest_schema_and_no_copy(tmp_path):
    path = tmp_path / "state.db"
    database.prepare(path, STEPS)
    assert schema(path) == 3
    assert files(tmp_path) == {"state.db": 0o600}


async def test_after_a_downgrade_the_message_names_both_versions_and_the_copy(tmp_path):
    path = tmp_path / "state.db"
    before = await made(path)
    database.prepare(path, STEPS)
    with pytest.raises(HostFault) as refused:
        await SqliteStore.open(path)
    assert str(path) in refused.value.message
    assert "newer bkpool (schema 3; bkpool 0.1.0 knows 1)" in refused.value.message
    assert f"{path}.schema-1" in refused.value.hint
    assert (refused.value.code, refused.value.exit_code) == ("Unreadable", EXIT["Unreadable"])

    (tmp_path / "state.db.schema-1").rename(path)  # as the guide says
    assert content(path) == before
    await (await SqliteStore.open(path)).close()


async def test_without_the_lock_of_the_home_nothing_is_migrated(tmp_path):
    path = tmp_path / "state.db"
    before = await made(path)
    with pytest.raises(HostFault, match=r"earlier bkpool \(schema 1; bkpool 0.1.0 uses 3\)"):
        database.prepare(path, STEPS, only_user=False)
    assert content(path) == before
    assert files(tmp_path) == {"state.db": 0o600}


async def test_a_step_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "state.db"
    before = await made(path)

    def fails(_db: sqlite3.Connection) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        database.prepare(path, (*STEPS, fails))
    assert (schema(path), content(path)) == (1, before)
    database.prepare(path, STEPS)
    assert schema(path) == 3


@contextmanager
def small_disk(directory: Path, size: int):
    """A file system of this size. Only root can make one."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def fault_of(path: Path) -> HostFault | None:
    try:
        database.prepare(path, STEPS)
    except HostFault as error:
        return error
    return None


async def test_a_disk_that_is_full_at_any_moment_changes_nothing(tmp_path):
    source = tmp_path / "source.db"
    before = await made(source)
    size, outcomes = 1 << 20, set()
    with small_disk(tmp_path / "small", size):
        path, copy = tmp_path / "small" / "state.db", tmp_path / "small" / "state.db.schema-1"
        filler = tmp_path / "small" / "filler"
        for free in range(0, 600 * 1024, 24 * 1024):
            for left in (tmp_path / "small").iterdir():
                left.unlink()
            path.write_bytes(source.read_bytes())
            path.chmod(0o600)
            used = sum(one.stat().st_blocks * 512 for one in (tmp_path / "small").iterdir())
            filler.write_bytes(b"x" * max(0, size - used - free))
            error = fault_of(path)
            filler.unlink()
            if error is None:
                outcomes.add("migrated")
                assert schema(path) == 3
            else:
                outcomes.add("copied" if copy.exists() else "not copied")
                assert (error.code, error.exit_code) == ("DiskFull", 73), error.message
                assert (schema(path), content(path)) == (1, before)
            assert not copy.exists() or content(copy) == before, "a copy is complete or not there"
            assert not copy.with_name(f"{copy.name}.new").exists()
    assert outcomes == {"not copied", "copied", "migrated"}


KILLED = """
import os, signal, sys
from pathlib import Path
from bkpool.store import database
from store.test_migration import STEPS
def dies(db): os.kill(os.getpid(), signal.SIGKILL)
database.prepare(Path(sys.argv[1]), (*STEPS, dies))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_changes_nothing(tmp_path):
    path = tmp_path / "state.db"
    before = asyncio.run(made(path))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert content(tmp_path / "state.db.schema-1") == before
    assert (schema(path), content(path)) == (1, before)
    database.prepare(path, STEPS)
    assert schema(path) == 3
