"""The store on a real file system that is full: writes fail with a sentence, reads go on, and room heals it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from bkpool.core.errors import DiskFull
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.small_disk import fill, make_room, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        yield disk


def a_pool(name, size=0):
    return Pool(metadata=Metadata(name=name, annotations={"x": "x" * size}))


async def fail_to_write(store):
    """Writes until the last of the room that the store has taken before is used up."""
    for number in range(1000):
        try:
            await store.create(a_pool(f"big-{number}", 20_000))
        except DiskFull as error:
            return error
    raise AssertionError("there is still room")


async def test_writes_fail_and_reads_and_watches_go_on_and_it_heals_with_room(disk):
    store = await SqliteStore.open(disk / "state.db")
    async with asyncio.timeout(60), aclosing(store.watch(Pool, "0")) as watch:
        await store.create(a_pool("before"))
        fill(disk)
        error = await fail_to_write(store)
        assert error.message == f"{disk}/state.db cannot be written: the file system {disk} is full"
        assert (await store.get(Pool, "default", "before")).key.name == "before"
        failures = await asyncio.gather(
            *(store.create(a_pool(f"p{n}", 20_000)) for n in range(5)), return_exceptions=True
        )
        assert {type(failure) for failure in failures} == {DiskFull}
        make_room(disk)
        await store.create(a_pool("after"))
        names = []
        while "after" not in names:
            names.append((await anext(watch)).object.key.name)
        assert "p0" not in names
    await store.close()


async def test_a_store_that_is_opened_on_a_full_disk_says_so_and_opens_with_room(disk):
    store = await SqliteStore.open(disk / "state.db")
    await store.create(a_pool("before"))
    await store.close()
    fill(disk)
    with pytest.raises(DiskFull, match=f"the file system {disk} is full"):
        await SqliteStore.open(disk / "state.db")
    with pytest.raises(DiskFull, match=f"the file system {disk} is full"):
        await SqliteStore.open(disk / "other.db")
    make_room(disk)
    for name in ("state.db", "other.db"):
        store = await SqliteStore.open(disk / name)
        assert len((await store.list(Pool)).items) == (name == "state.db")
        await store.close()


async def test_the_copy_in_memory_goes_on_when_it_cannot_read_for_a_while(disk, monkeypatch):
    """SQLite needs room for reading in rare cases only, so its error is made here."""
    store = await SqliteStore.open(disk / "state.db")
    pauses = []

    async def pause(seconds):
        pauses.append(seconds)
        monkeypatch.undo()

    async def fail(*_, **__):
        raise DiskFull("the file system is full")

    monkeypatch.setattr(store, "list", fail)
    mirror = Mirror(store, pause=pause)
    following = asyncio.create_task(mirror.run())
    async with asyncio.timeout(60):
        await mirror.ready.wait()
    assert pauses
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert not (await store.list(Worker)).items
    await store.close()
