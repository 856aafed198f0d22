"""A changed spec reaches workers that run: real buildkitd processes, a real store and the real controller."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bkpool.controller import Controller
from bkpool.core.errors import Conflict
from bkpool.core.observation import DaemonState
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries
from support.objects import lease

GC = {"cache": {"gc": {"keepStorage": "3GB"}}}


class Running:
    """A controller over real processes."""

    def __init__(self, home: Path, store: SqliteStore, runtime: ProcessRuntime, mirror: Mirror) -> None:
        self.home, self.store, self.runtime, self.mirror = home, store, runtime, mirror

    async def set_spec(self, **spec: object) -> None:
        while True:
            pool = await self.store.get(Pool, "default", "p")
            with suppress(Conflict):  # the controller writes its status
                await self.store.replace(pool.but(spec=PoolSpec.model_validate(spec)))
                return

    async def worker(self, condition) -> Worker:
        """Worker 0 once it meets the condition, at the latest after 30 s."""
        changed = asyncio.Event()
        with self.subscribed(changed):
            async with asyncio.timeout(60):
                while True:
                    changed.clear()
                    found = next(iter(self.mirror.workers.values()), None)
                    if found is not None and condition(found):
                        return found
                    await changed.wait()

    def subscribed(self, changed: asyncio.Event) -> ExitStack:
        stack = ExitStack()
        stack.callback(self.mirror.subscribe(lambda _pool: changed.set()))
        stack.callback(self.runtime.daemons.on_change(lambda _slot: changed.set()))
        return stack

    def config(self) -> dict[str, Any]:
        """The configuration of the last start of buildkitd."""
        return tomllib.loads((self.home / "slots/default/p/0/buildkitd.toml").read_text())

    def kept(self) -> object:
        """The largest size of the cache."""
        return self.config()["worker"]["oci"]["maxUsedSpace"]

    def is_ready(self, worker: Worker) -> bool:
        seen = self.runtime.daemons.observe().get(worker.slot)
        return worker.status.phase is Phase.IDLE and seen is not None and seen.state is DaemonState.READY


@pytest.fixture(scope="module")
def binaries(buildkitd: Path, runc: Path, rootlesskit: Path) -> Binaries:
    return Binaries(buildkitd, runc, rootlesskit)


@asynccontextmanager
async def running(directory: Path, binaries: Binaries) -> AsyncIterator[Running]:
    store = await SqliteStore.open(directory / "state.db")
    runtime = ProcessRuntime(directory / "home", binaries)
    mirror = Mirror(store)
    controller = Controller(
        store=store,
        mirror=mirror,
        daemons=runtime.daemons,
        caches=runtime.caches,
        now=lambda: datetime.now(UTC),
        status_inputs=lambda _pool: PoolStatusInputs("tcp://localhost:1235"),
        recorder=LogRecorder(),
    )
    await store.create(Pool(metadata=Metadata(name="p"), spec=PoolSpec.model_validate({"scaling": {"min": 1}})))
    await runtime.adopt()
    tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(controller.run())]
    try:
        yield Running(directory / "home", store, runtime, mirror)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runtime.purge()
        await runtime.close(stop_workers=True)
        await store.close()


async def test_a_changed_spec_reaches_an_idle_worker_at_once_and_a_leased_one_after_its_lease(tmp_path, binaries):
    async with running(tmp_path, binaries) as world:
        first = await world.worker(world.is_ready)
        usual = world.kept()

        await world.set_spec(scaling={"min": 1, "max": 7})
        await world.set_spec(scaling={"min": 1, "max": 7}, **GC)
        second = await world.worker(lambda w: world.is_ready(w) and w.status.spec_digest != first.status.spec_digest)
        assert world.kept() == "3GB"
        assert second.uid == first.uid, "the worker and its cache stay"

        now = datetime.now(UTC)
        held = await world.store.replace(second.with_lease(lease(now=now, owner="o")))
        await world.worker(lambda w: w.status.phase is Phase.ALLOCATED)
        await world.set_spec(scaling={"min": 1, "max": 7}, buildkitConfig="debug = true")
        await world.worker(lambda w: world.runtime.daemons.observe()[w.slot].outdated)
        current = await world.store.get(Worker, *held.key)
        assert (current.status.phase, world.kept()) == (Phase.ALLOCATED, "3GB"), "a lease keeps its daemon"
        await world.store.replace(current.with_lease(current.held_lease.but(ended_at=now)))
        after = await world.worker(lambda w: world.is_ready(w) and w.lease is None)
        assert (world.kept(), world.config()["debug"]) == (usual, True)
        assert after.status.cache_owner == "o", "its cache stays"


async def test_the_maximum_of_a_pool_replaces_nothing(tmp_path, binaries):
    async with running(tmp_path, binaries) as world:
        before = await world.worker(world.is_ready)
        process = (world.home / "slots/default/p/0/process.json").read_text()
        await world.set_spec(scaling={"min": 1, "max": 3}, auth={"limits": {"identity": {"leases": 1}}})
        await world.worker(lambda w: world.mirror.pools[w.pool].status.observed_generation == 2)
        await world.runtime.daemons.follow(world.mirror.pools[before.pool])
        seen = world.runtime.daemons.observe()[before.slot]
        assert (seen.outdated, seen.reaches_other) == (False, False)
        assert (world.home / "slots/default/p/0/process.json").read_text() == process
