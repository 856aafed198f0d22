"""Rows of state.db that hold no object: nothing else is kept from going on, and they can be replaced or deleted."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import aclosing, closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bkpool.appliance.seed import seed_objects
from bkpool.core.documents import Documents
from bkpool.core.errors import Conflict, Gone, InvalidInput, NotFound
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Worker, new_worker
from bkpool.store import rows
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore


def alter(path: Path, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(sql, values)


def row(path: Path, name: str) -> tuple:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        (found,) = db.execute("SELECT uid, CAST(data AS BLOB) FROM objects WHERE name = ?", [name]).fetchall()
    return found


def store_bytes(path: Path, data: bytes) -> None:
    alter(path, "UPDATE objects SET data = CAST(? AS TEXT) WHERE name = 'p'", data)


def store_blob(path: Path, data: bytes) -> None:
    alter(path, "UPDATE objects SET data = ? WHERE name = 'p'", data)


def change(path: Path, part: str, value: object) -> None:
    """Changes the metadata, or a part of the document itself."""
    _, data = row(path, "p")
    doc = json.loads(data)
    within = doc if part in doc else doc["metadata"]
    if value is ...:
        del within[part]
    else:
        within[part] = value
    store_bytes(path, json.dumps(doc).encode())


CONTENTS = {
    "half": (lambda path: store_bytes(path, b'{"kind": "Buil'), "is not JSON"),
    "empty": (lambda path: store_bytes(path, b""), "is not JSON"),
    "a-long-number": (lambda path: store_bytes(path, b'{"n": ' + b"9" * 10_000 + b"}"), "is not JSON"),
    "list": (lambda path: store_bytes(path, b"[]"), "is JSON, but a list where an object should be"),
    "number": (lambda path: store_bytes(path, b"7"), "is JSON, but a number where an object should be"),
    "text": (lambda path: store_bytes(path, b'"p"'), "is JSON, but a text where an object should be"),
    "null": (lambda path: store_bytes(path, b"null"), "is JSON, but nothing where an object should be"),
    "not-utf-8": (lambda path: store_bytes(path, b'{"kind": "\xff"}'), "is not UTF-8"),
    "a-blob": (lambda path: store_blob(path, b"\x00\xff\x00"), "is not UTF-8"),
    "half-a-character": (lambda path: change(path, "labels", {"\ud800": "x"}), "is not UTF-8"),
    "too-large": (
        lambda path: store_bytes(path, b" " * rows.LARGEST + b"{}"),
        r"has 16,777,218 bytes \(an object may have 16,777,216\)",
    ),
    "very-deep": (lambda path: store_bytes(path, b'{"a":' * 200_000), "is nested too deeply"),
    "deep": (lambda path: store_bytes(path, b'{"a":' * 300 + b"1" + b"}" * 300), "is nested too deeply"),
    "no-metadata": (lambda path: store_bytes(path, b'{"metadata": []}'), "has no metadata"),
    "other-name": (lambda path: change(path, "name", "q"), "names another object"),
    "other-kind": (lambda path: change(path, "kind", "BuildKitWorker"), "names another object"),
    "other-uid": (lambda path: change(path, "uid", "u"), "names another object, or another uid"),
    "no-uid": (
        lambda path: alter(path, "UPDATE objects SET uid = NULL WHERE name = 'p'"),
        "names another object, or another uid",
    ),
    "uid-not-text": (
        lambda path: alter(path, "UPDATE objects SET uid = x'ff' WHERE name = 'p'"),
        "names another object, or another uid",
    ),
    "version-number": (lambda path: change(path, "resourceVersion", 5), "has a metadata.resourceVersion that"),
    "version-absurd": (lambda path: change(path, "resourceVersion", "9" * 5000), "has a metadata.resourceVersion"),
    "generation": (lambda path: change(path, "generation", "1"), "has a metadata.generation that no bkpool writes"),
    "labels": (lambda path: change(path, "labels", {"a": 1}), "has a metadata.labels that"),
    "finalizers": (lambda path: change(path, "finalizers", "x"), "has a metadata.finalizers that"),
    "owners": (lambda path: change(path, "ownerReferences", [{}]), "has a metadata.ownerReferences that"),
    "spec": (lambda path: change(path, "spec", [1]), "has no spec or no status"),
    "status": (lambda path: change(path, "status", ...), "has no spec or no status"),
}


@pytest.fixture(params=CONTENTS.values(), ids=CONTENTS.keys())
async def broken(tmp_path, request):
    """A store in which the row of pool p is broken, and what is said of it."""
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    for name in ("p", "sound"):
        await store.create(Pool(metadata=Metadata(name=name)))
    await store.close()
    spoil, says = request.param
    spoil(path)
    store = await SqliteStore.open(path)
    yield path, store, says
    await store.close()


async def test_it_is_named_and_everything_else_goes_on(broken):
    path, store, says = broken
    before = row(path, "p")

    listing = await store.list(Pool)
    assert [pool.key.name for pool in listing.items] == ["sound"]
    [found] = listing.unreadable
    assert found.key == Key("default", "p")
    with pytest.raises(
        UnreadableObject, match=f"default/p cannot be read: what is stored in state.db {says}"
    ) as error:
        await store.get(Pool, "default", "p")
    error.value.message.encode()
    with pytest.raises(Conflict, match="exists already"):
        await store.create(Pool(metadata=Metadata(name="p")))
    with pytest.raises(UnreadableObject):
        await store.patch_status(found, {"phase": "Degraded"})
    mirror = Mirror(store)
    following = asyncio.create_task(mirror.run())
    async with asyncio.timeout(10):
        await mirror.ready.wait()
    following.cancel()
    assert (set(mirror.pools), set(mirror.unreadable_pools)) == ({("default", "sound")}, {("default", "p")})
    assert row(path, "p") == before, "it is as it was, for somebody who wants to correct it"


async def test_it_can_be_deleted_and_made_again(broken):
    _, store, _ = broken
    listing = await store.list(Pool)
    [found] = listing.unreadable
    await store.delete(Pool, "default", "p", uid=found.uid)
    async with aclosing(store.watch(Pool, listing.resource_version)) as watch:
        event = await anext(watch)
    assert (event.type, event.object.key) == ("DELETED", found.key)
    with pytest.raises(NotFound):
        await store.get(Pool, "default", "p")
    made = await store.create(Pool(metadata=Metadata(name="p")))
    assert await store.get(Pool, "default", "p") == made


async def test_a_file_that_names_it_makes_it_whole(broken):
    path, store, _ = broken
    wanted = Documents(pools=(Pool(metadata=Metadata(name="p", labels={"a": "b"})),))
    mirror = Mirror(store)
    following = asyncio.create_task(mirror.run())
    async with asyncio.timeout(10):
        await mirror.ready.wait()
        await seed_objects(store, wanted, only_source=True, now=datetime.now(UTC))
    async with asyncio.timeout(10):
        while mirror.unreadable_pools:
            await store.list(Pool)
    following.cancel()
    made = await store.get(Pool, "default", "p")
    assert mirror.pools[made.key] == made
    assert made.uid == row(path, "p")[0]
    assert (await store.list(Pool, labels={"a": "b"})).items == (made,)
    assert (await store.list(Pool)).unreadable == ()
    await store.replace_status(made)


async def test_a_worker_of_a_deleted_pool_goes_with_it(tmp_path):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    alter(path, "UPDATE objects SET data = '{half' WHERE kind = 'BuildKitWorker'")
    [found] = (await store.list(Worker)).unreadable
    assert (found.slot, found.uid, found.may_be_leased) == (worker.slot, worker.uid, True)
    assert [one.key for one in (await store.list(Worker, labels=worker.metadata.labels)).unreadable] == [worker.key]
    for write in (store.replace, store.replace_status):  # by those who have read it before
        with pytest.raises(Conflict):
            await write(worker)
    await store.delete(Pool, "default", "p")
    assert (await store.list(Worker)).keys == []
    await store.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("data", "{half"),
        ("data", "[]"),
        ("data", '{"metadata": {}}'),
        ("data", b"\xff"),
        ("type", "GREW"),
        ("data", '{"kind": "BuildKitPool", "metadata": {"resourceVersion": "2"}}'),
    ],
)
async def test_after_an_event_that_cannot_be_read_a_new_list_helps(tmp_path, column, value):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    for name in ("p", "q"):
        await store.create(Pool(metadata=Metadata(name=name)))
    alter(path, f"UPDATE events SET {column} = ? WHERE version = 2", value)
    with pytest.raises(Gone, match="change 2 of BuildKitPool in the log cannot be read"):
        await anext(store.watch(Pool, "1"))
    listing = await store.list(Pool)
    assert [pool.key.name for pool in listing.items] == ["p", "q"]
    async with aclosing(store.watch(Pool, listing.resource_version)) as watch:
        made = await store.create(Pool(metadata=Metadata(name="r")))
        assert (await anext(watch)).object == made
    await store.close()


async def test_an_object_that_could_not_be_read_again_is_not_written(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    large = Metadata(name="p", annotations={"a": "x" * rows.LARGEST})
    with pytest.raises(
        InvalidInput, match=r"BuildKitPool p has 16,77\d,\d+ bytes, and an object may have 16,777,216"
    ):
        await store.create(Pool(metadata=large))
    assert (await store.list(Pool)).keys == []
    await store.close()


async def test_a_copy_that_has_an_earlier_state_learns_of_it_by_reading_the_object(tmp_path):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    mirror = Mirror(store)
    following = asyncio.create_task(mirror.run())
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    async with asyncio.timeout(10):
        while pool.key not in mirror.pools:
            await store.list(Pool)
    store_bytes(path, b"{half")
    with pytest.raises(UnreadableObject) as error:
        await store.get(Pool, *pool.key)
    mirror.apply(error.value.found)
    assert (set(mirror.pools), set(mirror.unreadable_pools)) == (set(), {pool.key})
    following.cancel()
    await store.close()
