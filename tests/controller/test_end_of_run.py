"""A controller that has ended is not called any more, and the same runtime can be given to the next one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bkpool.controller import Controller
from bkpool.core.names import Slot
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.subscribers import Subscribers
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror, MirrorChange
from bkpool.workers import Caches, Daemons
from bkpool.workers.pods.runtime import PodRuntime
from bkpool.workers.processes.runtime import ProcessRuntime
from bkpool.workers.processes.sandbox import Binaries
from support.no_store import NoStore
from support.world import POOL, MemoryWorkers

SLOT = Slot(*POOL, 0)


@dataclass
class Workers:
    """Daemons and caches, and the subscribers that both report changes to."""

    daemons: Daemons
    caches: Caches
    subscribers: Subscribers[[Slot]]


def in_memory(_home: Path) -> Workers:
    workers = MemoryWorkers()
    return Workers(workers, workers, workers.subscribers)


def processes(home: Path) -> Workers:
    runtime = ProcessRuntime(home, Binaries(Path("buildkitd"), Path("runc")))
    return Workers(runtime.daemons, runtime.caches, runtime._table.subscribers)


def pods(_home: Path) -> Workers:
    authorities = PoolAuthorities(ClusterSecrets.create(datetime.now(UTC)).backend)
    api: Any = None  # nothing asks the cluster before adopt()
    runtime = PodRuntime(api, authorities=authorities)
    return Workers(runtime.daemons, runtime.caches, runtime._slots.subscribers)


class CountingController(Controller):
    calls = 0

    def _wake_up(self) -> None:
        self.calls += 1
        super()._wake_up()


@asynccontextmanager
async def running(mirror: Mirror, workers: Workers) -> AsyncIterator[CountingController]:
    store: Any = None  # there is no pool, so nothing is read or written
    controller = CountingController(
        store=store,
        mirror=mirror,
        daemons=workers.daemons,
        caches=workers.caches,
        now=lambda: datetime.now(UTC),
        status_inputs=lambda _pool: PoolStatusInputs(""),
        recorder=LogRecorder(),
    )
    before = len(workers.subscribers)
    run = asyncio.create_task(controller.run())
    try:
        async with asyncio.timeout(60):
            while len(workers.subscribers) < before + 2:  # noqa: ASYNC110 - a subscription sets no event
                await asyncio.sleep(0)
        yield controller
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)


@pytest.mark.parametrize("make", [in_memory, processes, pods])
async def test_a_controller_that_has_ended_leaves_no_subscription(
    make: Callable[[Path], Workers], tmp_path: Path
) -> None:
    store: Any = NoStore()
    mirror, workers = Mirror(store), make(tmp_path)
    mirror.ready.set()
    ended: list[CountingController] = []
    for _ in range(2):
        async with running(mirror, workers) as controller:
            before = controller.calls
            workers.subscribers.notify(SLOT)
            mirror._subscribers.notify(MirrorChange(POOL))
            assert controller.calls == before + 3, "called by its daemons, its caches and the mirror"
        ended.append(controller)
        assert len(workers.subscribers) == len(mirror._subscribers) == 0
    calls = [controller.calls for controller in ended]
    workers.subscribers.notify(SLOT)
    assert [controller.calls for controller in ended] == calls


@pytest.mark.parametrize("make", [in_memory, processes, pods])
def test_daemons_and_caches_end_each_subscription_alone(make: Callable[[Path], Workers], tmp_path: Path) -> None:
    workers, called = make(tmp_path), []
    end_daemons = workers.daemons.on_change(lambda _slot: called.append("daemons"))
    end_caches = workers.caches.on_change(lambda _slot: called.append("caches"))
    workers.subscribers.notify(SLOT)
    end_daemons()
    workers.subscribers.notify(SLOT)
    end_caches()
    workers.subscribers.notify(SLOT)
    assert called == ["daemons", "caches", "caches"]
