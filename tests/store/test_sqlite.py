"""What only the SQLite store has: a durable file, a writer that commits in groups, a log of limited length."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import aclosing, closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bkpool.core.errors import EXIT, Conflict, DiskFull, Gone, HostFault, Unavailable
from bkpool.core.pool import Pool, Scaling
from bkpool.core.resource import Metadata
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import PoolRef, Worker, WorkerSpec
from bkpool.store import database
from bkpool.store.sqlite import SqliteStore
from bkpool.store.tables import Tables
from bkpool.store.thread import MOST_TOGETHER


def a_pool(name: str = "p") -> Pool:
    return Pool(metadata=Metadata(name=name))


def a_worker(pool: str, number: int) -> Worker:
    return Worker(metadata=Metadata(name=f"{pool}-worker-{number}"), spec=WorkerSpec(pool_ref=PoolRef(name=pool)))


def scaled(pool: Pool, maximum: int) -> Pool:
    return pool.but(spec=pool.spec.but(scaling=Scaling(max=maximum)))


async def make(path, *names: str) -> None:
    store = await SqliteStore.open(path)
    for name in names:
        await store.create(a_pool(name))
    await store.close()


def alter(path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(sql, values)


# --- group commit ---------------------------------------------------------------------------------------------------


class Held:
    """Keeps the writer busy, so that further commands queue up."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._entered, self._release = asyncio.Event(), threading.Event()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()

        def hold(_tables) -> None:
            loop.call_soon_threadsafe(self._entered.set)
            assert self._release.wait(60)

        self._task = asyncio.create_task(self._store._writer.run(hold))
        await self._entered.wait()

    async def __aexit__(self, *_) -> None:
        self._release.set()
        await self._task


async def queued(*coroutines) -> list[asyncio.Task]:
    """Tasks that have all put their command into the writer's queue."""
    tasks = [asyncio.create_task(c) for c in coroutines]
    await asyncio.sleep(0)
    return tasks


async def test_commands_that_queue_up_during_a_commit_share_the_next_one(store):
    commits: list[str] = []
    store._writer._db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    async with Held(store):
        tasks = await queued(*(store.create(a_pool(f"p{n}")) for n in range(20)))
    await asyncio.gather(*tasks)

    assert len(commits) == 2, "one commit that was running, and one for the twenty"


async def test_a_pool_does_not_wait_until_all_writes_of_another_are_done(store):
    """All leases of a pool end at once: that is a thousand writes, and a lease of another pool is one."""
    done: list[str] = []

    async def create(pool: str, number: int) -> None:
        done.append((await store.create(a_worker(pool, number))).key.name)

    async with Held(store):
        many = await queued(*(create("many", n) for n in range(500)))
        few = await queued(create("few", 0), create("few", 1))
    await asyncio.gather(*few)
    assert len(done) <= MOST_TOGETHER
    await asyncio.gather(*many)
    assert [name for name in done if name.startswith("many")] == [f"many-worker-{n}" for n in range(500)]


async def test_closing_finishes_more_commands_than_one_transaction_has(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    async with Held(store):
        tasks = await queued(*(store.create(a_pool(f"p{n}")) for n in range(3 * MOST_TOGETHER)))
        closing = asyncio.create_task(store.close())
    await asyncio.gather(closing, *tasks)


async def test_a_failed_command_is_undone_without_the_others_of_its_commit(store):
    await store.create(a_pool("taken"))

    async with Held(store):
        tasks = await queued(*(store.create(a_pool(name)) for name in ("a", "taken", "b")))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(o) for o in outcomes] == [Pool, Conflict, Pool]
    assert [p.key.name for p in (await store.list(Pool)).items] == ["a", "b", "taken"]


async def test_a_bug_in_a_command_undoes_its_writes(store):
    def broken(tables) -> None:
        tables.create(a_pool("half"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store._writer.run(broken)
    assert (await store.list(Pool)).items == ()


async def test_a_command_that_fails_half_way_is_undone_without_the_others_of_its_commit(store):
    before = await store.create(a_pool("before"))

    def broken(tables) -> None:
        tables.create(a_pool("half"))
        tables.replace(scaled(before, 5))
        raise ZeroDivisionError

    async with Held(store):
        tasks = await queued(store.create(a_pool("a")), store._writer.run(broken), store.replace(scaled(before, 7)))
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(o) for o in outcomes] == [Pool, ZeroDivisionError, Pool]
    listed = await store.list(Pool)
    assert {p.key.name: p.spec.scaling.max for p in listed.items} == {
        "a": Pool(metadata=Metadata(name="x")).spec.scaling.max,
        "before": 7,
    }
    versions = [int(o.metadata.resource_version) for o in (before, outcomes[0], outcomes[2])]
    assert versions == list(range(versions[0], versions[0] + 3)), "a version that was undone is given again"
    assert listed.resource_version == str(versions[-1])


async def test_a_claim_is_few_statements_because_each_may_wait_for_other_threads(store):
    made = await store.create(a_pool())
    statements: list[str] = []
    store._writer._db.set_trace_callback(statements.append)
    await store.replace(scaled(made, 7))
    assert [sql.split()[0] for sql in statements] == ["BEGIN", "SELECT", "SELECT", "INSERT", "UPDATE", "COMMIT"]


async def test_a_cancelled_caller_does_not_affect_others(store):
    async with Held(store):
        (gone,) = await queued(store.create(a_pool("gone")))
        gone.cancel()
        tasks = await queued(store.create(a_pool("stays")))
    async with asyncio.timeout(60):
        assert (await tasks[0]).key.name == "stays"


async def test_a_full_disk_fails_the_write_and_later_writes_succeed_when_there_is_space(store):
    await store.create(a_pool())
    await store._writer.run(lambda tables: tables._db.execute("PRAGMA max_page_count = 1").fetchall())
    big = a_pool("big").but(metadata=Metadata(name="big", annotations={"a": "x" * 100_000}))

    async with Held(store):
        tasks = await queued(store.create(a_pool("small")), store.create(big))
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, DiskFull)
        assert (outcome.code, outcome.exit_code, outcome.status) == ("DiskFull", 73, 507)
        assert "state.db" in outcome.message

    assert [p.key.name for p in (await store.list(Pool)).items] == ["p"]
    await store._writer.run(lambda tables: tables._db.execute("PRAGMA max_page_count = 1000000").fetchall())
    await store.create(big)


async def test_a_file_locked_by_another_program_is_unavailable(store, tmp_path):
    await store._writer.run(lambda tables: tables._db.execute("PRAGMA busy_timeout = 1").fetchall())
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked"):
            await store.create(a_pool())
        other.execute("ROLLBACK")
    await store.create(a_pool())


# --- the file -------------------------------------------------------------------------------------------------------


async def test_after_a_restart_all_objects_exist_and_versions_continue(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    made = await store.create(a_pool())
    since = (await store.list(Pool)).resource_version
    changed = await store.replace(scaled(made, 3))
    await store.close()

    again = await SqliteStore.open(tmp_path / "state.db")
    assert await again.get(Pool, "default", "p") == changed
    async with aclosing(again.watch(Pool, since)) as watch:
        assert (await anext(watch)).object == changed
    await again.delete(Pool, "default", "p")
    later = await again.create(a_pool())
    assert int(later.metadata.resource_version) == int(changed.metadata.resource_version) + 2
    await again.close()


async def test_creation_times_are_whole_seconds_of_the_given_clock(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db", now=lambda: datetime(2030, 1, 2, 3, 4, 5, 999, tzinfo=UTC))
    made = await store.create(a_pool())
    await store.close()
    assert made.metadata.creation_timestamp == datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


async def test_the_file_is_private(tmp_path):
    before = os.umask(0)
    try:
        store = await SqliteStore.open(tmp_path / "state.db")
        await store.create(a_pool())
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        await store.close()
    finally:
        os.umask(before)
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}


WRITER = """
import asyncio, sys
from pathlib import Path
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.store.sqlite import SqliteStore

async def main():
    store = await SqliteStore.open(Path(sys.argv[1]))
    async def write(lane):
        for n in range(1_000_000):
            await store.create(Pool(metadata=Metadata(name=f"p-{lane}-{n}")))
            print(f"p-{lane}-{n}", flush=True)
    await asyncio.gather(*(write(lane) for lane in range(8)))

asyncio.run(main())
"""


def killed_while_writing(path) -> list[str]:
    """The names of the objects whose creation was acknowledged before the writer was killed."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        acknowledged = [writer.stdout.readline().strip() for _ in range(200)]
        writer.send_signal(signal.SIGKILL)
        return acknowledged + writer.stdout.read().split("\n")[:-1]


@pytest.mark.slow
async def test_kill_9_loses_no_acknowledged_write(tmp_path):
    path = tmp_path / "state.db"
    acknowledged = killed_while_writing(path)

    store = await SqliteStore.open(path)
    kept = {p.key.name for p in (await store.list(Pool)).items}
    assert set(acknowledged) <= kept
    await store.create(a_pool("after"))
    await store.close()


async def test_a_crash_while_the_file_is_created_leaves_none_and_the_next_start_creates_it(tmp_path):
    path = tmp_path / "state.db"
    (tmp_path / "state.db.new").write_bytes(b"half of a database")
    await make(path, "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.db"]


def damaged(data: bytes) -> bytes:
    """A database in which all pages after the first are damaged."""
    return data[:4096] + b"\x5a" * (len(data) - 4096)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(b"not a database, for sure" * 100), "not a database"),
        (lambda path: path.write_bytes(b""), "not a database of bkpool"),
        (lambda path: path.write_bytes(damaged(path.read_bytes())), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged"),
        (lambda path: alter(path, "PRAGMA application_id = 7"), "not a database of bkpool"),
        (
            lambda path: alter(path, "PRAGMA user_version = 999"),
            r"newer bkpool \(schema 999; bkpool \S+ knows 1\)",
        ),
        (
            lambda path: alter(path, "UPDATE objects SET name = CAST(x'ff' AS TEXT)"),
            "row 1 of its objects has no name",
        ),
        (lambda path: alter(path, "UPDATE objects SET namespace = x'70'"), "row 1 of its objects has no name"),
        (lambda path: alter(path, "UPDATE objects SET kind = ''"), "row 1 of its objects has no name"),
        (lambda path: path.rename(path.with_name("state.db-wal")), "is missing, although its log"),
    ],
)
async def test_an_unreadable_file_is_an_error_and_is_never_replaced(tmp_path, spoil, says):
    path = tmp_path / "state.db"
    await make(path, "p")
    spoil(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    with pytest.raises(HostFault, match=says) as refused:
        await SqliteStore.open(path)

    assert (refused.value.code, refused.value.exit_code) == ("Unreadable", EXIT["Unreadable"])
    assert str(path) in refused.value.message
    assert refused.value.hint
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert path.exists() == ("state.db" in before)


async def test_the_error_names_a_missing_directory(tmp_path):
    with pytest.raises(HostFault, match="nowhere"):
        await SqliteStore.open(tmp_path / "nowhere" / "state.db")


async def test_an_error_of_the_disk_names_the_file():
    class Broken(sqlite3.OperationalError):
        sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    fault = database.fault(Broken("disk I/O error"), Path("/x/state.db"))
    assert isinstance(fault, HostFault)
    assert fault.message == "/x/state.db: disk I/O error"


# --- objects of a future version ------------------------------------------------------------------------------------


async def test_an_object_of_a_newer_version_is_told_apart_and_delays_no_other(tmp_path):
    path = tmp_path / "state.db"
    await make(path, "future", "present")
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for table in ("objects", "events"):
            ((data,),) = db.execute(f"SELECT data FROM {table} WHERE data LIKE '%\"future\"%'").fetchall()
            doc = json.loads(data)
            doc["spec"]["scaling"]["max"] = {"by": "moonlight"}
            db.execute(f"UPDATE {table} SET data = ? WHERE data = ?", [json.dumps(doc), data])

    store = await SqliteStore.open(path)
    listing = await store.list(Pool)
    assert [p.key.name for p in listing.items] == ["present"]
    assert [found.key.name for found in listing.unreadable] == ["future"]
    async with aclosing(store.watch(Pool, "0")) as watch:
        found, present = (await anext(watch)).object, (await anext(watch)).object
    assert isinstance(found, Unreadable)
    assert present.key.name == "present"

    with pytest.raises(HostFault, match=r"BuildKitPool default/future cannot be read: spec\.scaling\.max") as refused:
        await store.get(Pool, "default", "future")
    assert refused.value.code == "Unreadable"
    with pytest.raises(Conflict):
        await store.create(a_pool("future"))

    await store.patch_status(found, {"phase": "Degraded"})
    with pytest.raises(Conflict, match="has changed since it was read"):
        await store.patch_status(found, {"phase": "Ready"})
    [marked] = (await store.list(Pool)).unreadable
    assert (marked.status["phase"], marked.document["spec"]) == ("Degraded", found.document["spec"])

    await store.delete(Pool, "default", "future")
    await store.create(a_pool("future"))
    await store.close()


# --- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def forgetful(tmp_path):
    store = await SqliteStore.open(tmp_path / "forgetful.db", history=10)
    yield store
    await store.close()


async def test_a_watch_from_a_compacted_version_raises_gone_and_a_new_list_helps(forgetful):
    made = await forgetful.create(a_pool())
    since = made.metadata.resource_version
    for number in range(20, 31):
        made = await forgetful.replace(scaled(made, number))

    with pytest.raises(Gone, match="BuildKitPool since version 1"):
        await anext(forgetful.watch(Pool, since))
    async with aclosing(forgetful.watch(Pool, str(int(since) + 1))) as watch:
        assert (await anext(watch)).object.spec.scaling.max == 21, "the last ten are still in the log"
    async with aclosing(forgetful.watch(Pool, (await forgetful.list(Pool)).resource_version)) as watch:
        await forgetful.replace(scaled(made, 99))
        assert (await anext(watch)).object.spec.scaling.max == 99


async def test_a_long_log_loses_its_oldest_events_many_at_once(tmp_path):
    store = await SqliteStore.open(tmp_path / "long.db", history=128)
    made, removals = await store.create(a_pool()), list[str]()
    store._writer._db.set_trace_callback(lambda sql: removals.append(sql) if sql.startswith("DELETE") else None)
    for number in range(200):
        made = await store.replace(scaled(made, 20 + number))
    (count,) = await store._reader.run(lambda tables: tables._db.execute("SELECT COUNT(*) FROM events").fetchone())
    await store.close()
    assert 128 <= count <= 128 + 128 // 64
    assert 1 < len(removals) <= (201 - 128) // 2


async def test_a_watch_that_falls_too_far_behind_raises_gone(forgetful):
    made = await forgetful.create(a_pool())
    async with aclosing(forgetful.watch(Pool, "0")) as watch:
        await anext(watch)
        for number in range(20, 40):
            made = await forgetful.replace(scaled(made, number))
        with pytest.raises(Gone):
            await anext(watch)


async def test_a_kind_without_changes_does_not_expire_because_another_changes_often(forgetful):
    made = await forgetful.create(a_pool())
    worker_since = (await forgetful.list(Worker)).resource_version
    for number in range(20, 60):
        made = await forgetful.replace(scaled(made, number))

    async with aclosing(forgetful.watch(Worker, worker_since)) as watch:
        waiting = asyncio.ensure_future(anext(watch))
        await forgetful.list(Worker)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_watch_from_a_version_that_was_rolled_back_raises_gone(store):
    with pytest.raises(Gone):
        async with asyncio.timeout(60):
            await anext(store.watch(Pool, "12345"))


async def test_a_long_replay_in_pages_is_complete(store):
    await asyncio.gather(*(store.create(a_pool(f"p{n}")) for n in range(600)))
    async with asyncio.timeout(60), aclosing(store.watch(Pool, "0")) as watch:
        names = [(await anext(watch)).object.key.name for _ in range(600)]
    assert len(set(names)) == 600


async def test_after_close_calls_and_open_watches_raise_unavailable(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    watch = store.watch(Pool, "0")
    waiting = asyncio.ensure_future(anext(watch))
    await store.list(Pool)
    await store.close()
    await store.close()

    with pytest.raises(Unavailable):
        async with asyncio.timeout(60):
            await waiting
    with pytest.raises(Unavailable):
        await store.create(a_pool())
    assert not [t for t in threading.enumerate() if t.name.startswith("store")]


# --- a thread that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, sqlite3.OperationalError])
async def test_whatever_fails_in_a_transaction_every_command_is_answered_and_the_next_one_works(
    store, monkeypatch, error
):
    def fail(*_):
        raise error("a test")

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "compact", fail)
        async with asyncio.timeout(60):
            results = await asyncio.gather(*(store.create(a_pool(f"p{n}")) for n in range(3)), return_exceptions=True)
    assert {type(result) for result in results} == {HostFault if issubclass(error, sqlite3.Error) else error}
    await store.create(a_pool("p0"))
    assert [pool.metadata.name for pool in (await store.list(Pool)).items] == ["p0"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_when_its_thread_has_ended_all_commands_that_wait_and_all_later_ones_fail_at_once(store, monkeypatch):
    def fail(*_):
        raise SystemExit  # as nothing in there catches it

    monkeypatch.setattr(Tables, "compact", fail)
    async with asyncio.timeout(60):
        writes = (store.create(a_pool(f"p{n}")) for n in range(2 * MOST_TOGETHER))
        errors = await asyncio.gather(*writes, return_exceptions=True)
        assert {type(error) for error in errors} == {Unavailable}
        with pytest.raises(Unavailable, match="the store has ended"):
            await store.create(a_pool())
        assert not (await store.list(Pool)).items  # reads go on
