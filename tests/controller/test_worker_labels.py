"""The label by which gateways follow workers: every worker has it before a gateway relies on it, and keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bkpool.controller.worker_labels import WorkerLabels
from bkpool.core.errors import InvalidInput, Unavailable
from bkpool.core.names import LABEL_POOL, LABEL_REQUEST, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.unreadable import spoil


@pytest.fixture
async def store(tmp_path) -> AsyncIterator[Store]:
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


class Refusing:
    """A store that refuses the first writes with these errors."""

    def __init__(self, store, *errors: Exception) -> None:
        self._store = store
        self.errors = list(errors)
        self.writes = 0

    async def replace(self, obj):
        self.writes += 1
        if self.errors:
            raise self.errors.pop(0)
        return await self._store.replace(obj)

    def __getattr__(self, name):
        return getattr(self._store, name)


async def workers_in(store, count: int = 3, *, labelled: int = 0) -> list[Worker]:
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    made = []
    for number in range(count):
        worker = new_worker(Slot("default", "p", number), pool, None, {LABEL_REQUEST: f"r{number}"})
        if number >= labelled:
            worker = without_label(worker)
        made.append(await store.create(worker))
    return made


def without_label(worker: Worker) -> Worker:
    labels = {name: value for name, value in worker.metadata.labels.items() if name != LABEL_POOL}
    return worker.but(metadata=worker.metadata.but(labels=labels))


@asynccontextmanager
async def running(store, **options):
    mirror = Mirror(store)
    labels = WorkerLabels(store, mirror, **options)
    tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(labels.run())]
    try:
        async with asyncio.timeout(60):
            yield labels, mirror
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_every_worker_has_the_label_before_a_gateway_relies_on_it(store):
    await workers_in(store, labelled=1)
    wire = Refusing(store)

    async with running(wire) as (labels, _):
        await labels.complete.wait()

    stored = (await store.list(Worker)).items
    assert {worker.metadata.labels[LABEL_POOL] for worker in stored} == {"p"}
    assert {worker.metadata.labels[LABEL_REQUEST] for worker in stored} == {"r0", "r1", "r2"}, "nothing else changes"
    assert wire.writes == 2


async def test_a_label_that_somebody_removes_comes_back(store):
    (worker,) = await workers_in(store, 1, labelled=1)
    async with running(store) as (labels, mirror):
        await labels.complete.wait()
        changed = asyncio.Event()
        mirror.subscribe(lambda _change: changed.set())
        await store.replace(without_label(worker))
        while LABEL_POOL not in (await store.get(Worker, *worker.key)).metadata.labels:
            await changed.wait()
            changed.clear()


async def test_while_the_store_is_away_nothing_is_complete(store):
    await workers_in(store, 2)
    paused = []

    async def pause(seconds: float) -> None:
        paused.append(labels.complete.is_set())

    wire = Refusing(store, Unavailable("away"), Unavailable("away"))
    async with running(wire, pause=pause) as (labels, _):
        await labels.complete.wait()
    assert paused == [False, False]
    assert all(LABEL_POOL in worker.metadata.labels for worker in (await store.list(Worker)).items)


async def test_a_worker_that_the_store_refuses_holds_up_no_other(store):
    await workers_in(store, 3)
    wire = Refusing(store, InvalidInput("the schema refuses it"))
    async with running(wire) as (labels, _):
        await labels.complete.wait()
    assert sum(LABEL_POOL in worker.metadata.labels for worker in (await store.list(Worker)).items) == 2


async def test_a_worker_that_cannot_be_read_is_left_alone(store, tmp_path):
    (worker,) = await workers_in(store, 1)
    spoil(tmp_path / "state.db", worker.key.name, lambda doc: doc["spec"].update(allocation=7))
    wire = Refusing(store)
    async with running(wire) as (labels, _):
        await labels.complete.wait()
    assert wire.writes == 0
