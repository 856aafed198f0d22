"""A small world for the tests of leases: a real store, a real mirror, the real controller, and no daemons.

Only the workers are not real: `MemoryWorkers` implements Daemons and Caches in memory, and a test can make it fail.
Real workers have other tests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bkpool.allocation import AllocationRequest, Allocator, CallerLimits, Delivery, Grant, LeaseService, deliveries
from bkpool.controller import Controller
from bkpool.controller.metrics import ControllerMetrics
from bkpool.core.errors import Conflict, WorkerFailed
from bkpool.core.ignored import ignored_fields
from bkpool.core.names import Key, Slot
from bkpool.core.observation import MOST_STARTS, DaemonState, Observation, SeenCache, Silence, WorkerCapacity
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.later_writes import WritePauses
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.resource import Metadata
from bkpool.core.subscribers import Subscribers
from bkpool.core.worker import Worker
from bkpool.identity import Identity
from bkpool.pki.authority import Authority
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.telemetry.registry import new_registry
from bkpool.workers.config import not_taken
from bkpool.workers.daemons import ReportWaiting
from bkpool.workers.ignored_fields import IGNORED_BY_PROCESSES

ANN, BOB = Identity("ann"), Identity("bob")
POOL = Key("default", "p")
TOKEN_KEY = b"k" * 32
AT_ONCE = WritePauses(timedelta(0), timedelta(0), timedelta(0))
"""The controller writes everything at once: the clock of a test need not go on for that."""
WAIT = 60.0
"""Seconds that a caller waits for a worker, and a test for a condition: only a fault takes so long."""


class Taken:
    """The receipt of an answer that its caller has."""

    def delivery(self) -> Delivery:
        return Delivery.TAKEN


TAKEN = Taken()


class MemoryWorkers:
    """Implements Daemons and Caches in memory, without any process."""

    def __init__(self) -> None:
        self.daemons: dict[Slot, Observation] = {}
        self.cache_owners: dict[Slot, str | None] = {}
        self.failure: str | None = None
        self.log_tail = ""
        self.may_start = asyncio.Event()
        self.may_start.set()  # while it is cleared, starts do not end
        self.wiped: list[Slot] = []
        self.stopped_at_once: list[Slot] = []
        self.asked: list[Slot] = []
        """Slots whose daemon was asked whether it answers."""
        self.hung: set[Slot] = set()
        self.cleared: list[Slot] = []
        """Slots whose build history was cleared at the end of a lease."""
        self.subscribers: Subscribers[[Slot]] = Subscribers()

    def observe(self) -> dict[Slot, Observation]:
        return dict(self.daemons)

    def owners(self) -> dict[Slot, str | None]:
        return dict(self.cache_owners)

    def seen(self, slot: Slot) -> Observation | None:
        return self.daemons.get(slot)

    def cache(self, slot: Slot) -> SeenCache | None:
        return SeenCache(self.cache_owners[slot]) if slot in self.cache_owners else None

    def on_change(self, callback: Callable[[Slot], None]) -> Callable[[], None]:
        return self.subscribers.add(callback)

    def changed(self, slot: Slot) -> None:
        self.subscribers.notify(slot)

    capacity: WorkerCapacity | None = None
    starts_at_once = MOST_STARTS
    ignored_spec_fields = IGNORED_BY_PROCESSES

    def ignored_config(self, spec: PoolSpec) -> list[str]:
        return not_taken(spec)

    async def start(
        self, slot: Slot, worker_uid: str, owner: str | None, pool: Pool, report_waiting: ReportWaiting
    ) -> str:
        await self.may_start.wait()
        if self.failure is not None:
            raise WorkerFailed(self.failure, log_tail=self.log_tail)
        held = self.cache_owners.get(slot)
        if owner is not None and held not in {None, owner}:
            self.wiped.append(slot)
        self.cache_owners[slot] = held if owner is None else owner
        endpoint = f"unix:///{slot.number}"
        self.daemons[slot] = Observation(worker_uid, DaemonState.READY, endpoint, self.cache_owners[slot])
        self.changed(slot)
        return endpoint

    async def watch_health(self) -> None:
        await asyncio.Event().wait()

    async def answers(self, slot: Slot, worker_uid: str, *, fresh: bool = True) -> bool:
        self.asked.append(slot)
        seen = self.daemons.get(slot)
        up = seen is not None and seen.worker_uid == worker_uid and seen.state is DaemonState.READY
        return up and slot not in self.hung

    def hang(self, slot: Slot, seconds: float = 1.0, lost: str = "") -> None:
        """The daemon does not answer any more, and probes have seen that for this long."""
        self.hung.add(slot)
        self.daemons[slot] = replace(self.daemons[slot], silence=Silence(timedelta(seconds=seconds), lost))
        self.changed(slot)

    def go_on(self, slot: Slot) -> None:
        """The daemon answers again, and a probe has seen that."""
        self.hung.discard(slot)
        self.daemons[slot] = replace(self.daemons[slot], silence=None)
        self.changed(slot)

    async def own(self, slot: Slot, owner: str) -> None:
        if self.cache_owners.get(slot) not in {None, owner}:
            raise Conflict("another's")
        self.cache_owners[slot] = owner
        was = self.daemons[slot]
        self.daemons[slot] = Observation(was.worker_uid, was.state, was.endpoint, owner)
        self.changed(slot)

    async def follow(self, pool: Pool) -> None:
        pass

    async def protect(self, slot: Slot, *, held: bool) -> None:
        pass

    async def clear_history(self, slot: Slot) -> None:
        self.cleared.append(slot)

    async def stop(self, slot: Slot, *, at_once: bool = False) -> None:
        if at_once:
            self.stopped_at_once.append(slot)
        self.daemons.pop(slot, None)
        self.hung.discard(slot)
        self.changed(slot)

    async def wipe(self, slot: Slot) -> None:
        self.wiped.append(slot)
        self.cache_owners.pop(slot, None)
        await self.stop(slot)

    async def close(self, *, stop_workers: bool) -> None:
        pass

    def die(self, slot: Slot, message: str = "killed by signal 9") -> None:
        was = self.daemons[slot]
        self.daemons[slot] = Observation(was.worker_uid, DaemonState.EXITED, "", was.cache_owner, message)
        self.changed(slot)


class World:
    """One store, one controller, and any number of API replicas."""

    controller: Controller

    def __init__(self, store: SqliteStore, clock: Clock, runtime: MemoryWorkers | None = None) -> None:
        self.store = store
        self.clock = clock
        self.runtime = runtime or MemoryWorkers()
        self.authority = Authority.create(datetime.now(UTC))
        self.replicas: list[Replica] = []
        self.controller: Controller
        self.registry = new_registry()
        self.waiting: Subscribers[[]] = Subscribers()
        self.moment = 0.0
        """Seconds from an answer to its mark."""

    async def pool(self, name: str = "p", **spec: Any) -> Pool:
        pool = await self.store.create(Pool(metadata=Metadata(name=name), spec=PoolSpec.model_validate(spec)))
        await self.until(lambda: all(pool.key in replica.mirror.pools for replica in self.replicas))
        return pool

    async def change_spec(self, **spec: Any) -> None:
        """Gives the pool p another spec, and waits until each replica knows it."""
        wanted = PoolSpec.model_validate(spec)
        while True:
            pool = await self.store.get(Pool, *POOL)
            with suppress(Conflict):  # the controller writes its status
                await self.store.replace(pool.but(spec=wanted))
                break
        await self.until(lambda: all(one.mirror.pools[POOL].spec == wanted for one in self.replicas))

    async def workers(self) -> dict[str, Worker]:
        return {worker.key.name: worker for worker in (await self.store.list(Worker)).items}

    async def until(self, condition: Callable[[], Any]) -> None:
        """Waits until the condition is true. It is checked after every change."""
        changed = asyncio.Event()
        unsubscribe = self.replicas[0].mirror.subscribe(lambda _pool: changed.set())
        try:
            async with asyncio.timeout(WAIT):
                while not condition():
                    changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await changed.wait()
        finally:
            unsubscribe()

    async def asleep(self) -> None:
        """Waits until the controller has written what it wanted to, and nothing wakes it any more."""
        quiet, controller = 0, self.controller
        while quiet < 20:
            pools = (await self.store.list(Pool)).items
            written = all(self.replicas[0].mirror.pools.get(pool.key) == pool for pool in pools)
            busy = controller._actions or controller._pool_work.tasks or controller._wake.is_set()
            quiet = quiet + 1 if written and not busy else 0

    def held(self) -> list[Worker]:
        return [w for w in self.replicas[0].mirror.workers.values() if w.lease]


class Replica:
    """One API replica that uses the world's store."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.mirror = Mirror(world.store, configs=True, heartbeats=True)
        self.leases = LeaseService(store=world.store, mirror=self.mirror, now=world.clock)
        self.allocator = Allocator(
            store=world.store,
            mirror=self.mirror,
            leases=self.leases,
            authority=world.authority,
            token_key=TOKEN_KEY,
            caches=world.runtime,
            answers=world.runtime.answers,
            now=world.clock,
            limits=CallerLimits(world.clock.seconds),
            on_waiting=world.waiting.notify,
            pause=self.pause,
        )

    async def pause(self, seconds: float) -> None:
        """Waits for the clock where production waits long, and for `World.moment` where it waits for a moment."""
        until = self.world.clock.seconds() + (seconds if seconds > 1 else 0)
        while self.world.clock.seconds() < until:
            await self.world.clock.moving.wait()
        await asyncio.sleep(self.world.moment)

    async def allocate(
        self, caller: Identity = ANN, *, wait: float = WAIT, marked: bool = True, **request: Any
    ) -> Grant:
        """Leases a worker. With `marked`, it is in the store that the caller has it, so nothing else writes that."""
        wanted = AllocationRequest(POOL, timedelta(seconds=wait), **request)
        async with self.allocator.offer(caller, wanted) as offer:
            offer.answered(TAKEN)
        worker = offer.grant.worker
        if marked:
            await self.world.until(lambda: not self.is_undelivered(worker))
        return offer.grant

    def is_undelivered(self, worker: Worker) -> bool:
        """Whether the lease that this worker had is still there, and nobody has it."""
        now = self.mirror.workers.get(worker.key)
        if now is None or now.lease is None or now.lease.id != worker.held_lease.id:
            return False
        return now.undelivered is not None


def skip_real_time(seconds: float = 2 * WAIT) -> None:
    """Lets every time-out of the running loop pass that has begun. Later ones last as long as ever."""
    loop = asyncio.get_running_loop()
    passed = loop.time
    loop.time = lambda: passed() + seconds  # type: ignore[method-assign]


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)
        self.slept = timedelta()
        self.moved: Callable[[], None] = lambda: None
        self.moving = asyncio.Event()
        """Set at each move; who waits for it gets a new one."""

    def __call__(self) -> datetime:
        return self.now

    def seconds(self) -> float:
        """Monotonic time, which stands still while the machine sleeps."""
        return (self.now - self.slept).timestamp()

    def sleep(self, **by: float) -> None:
        """Lets the machine sleep for this time. Nothing is called when it wakes up."""
        self.now += timedelta(**by)
        self.slept += timedelta(**by)

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)
        moving, self.moving = self.moving, asyncio.Event()
        moving.set()
        self.moved()


@asynccontextmanager
async def running_world(
    directory: Path, replicas: int = 1, runtime: MemoryWorkers | None = None, pauses: WritePauses = AT_ONCE
) -> AsyncIterator[World]:
    # A replica counts how often it has looked for what became of an answer, and here that takes no time at all.
    with patch.dict(deliveries._MAY_CHANGE_FOR, {Delivery.ON_ITS_WAY: math.inf}):
        async with _running_world(directory, replicas, runtime, pauses) as world:
            yield world


@asynccontextmanager
async def _running_world(
    directory: Path, replicas: int, runtime: MemoryWorkers | None, pauses: WritePauses
) -> AsyncIterator[World]:
    clock = Clock()
    store = await SqliteStore.open(directory / "state.db", now=clock)
    world = World(store, clock, runtime)
    world.replicas = [Replica(world) for _ in range(replicas)]
    mirrors = [replica.mirror for replica in world.replicas]
    world.controller = controller = Controller(
        store=store,
        mirror=mirrors[0],
        daemons=world.runtime,
        caches=world.runtime,
        now=clock,
        status_inputs=lambda pool: PoolStatusInputs(
            "tcp://localhost:1235", ignored_fields(pool.spec, world.runtime.ignored_spec_fields)
        ),
        recorder=LogRecorder(),
        metrics=ControllerMetrics(world.registry),
        seconds=clock.seconds,
        pauses=pauses,
    )
    world.controller = controller
    clock.moved = controller.look_again
    world.waiting.add(controller.check_clock)
    tasks = [asyncio.create_task(work) for work in (*(mirror.run() for mirror in mirrors), controller.run())]
    await asyncio.gather(*(mirror.ready.wait() for mirror in mirrors))
    try:
        yield world
    finally:
        for replica in world.replicas:
            await replica.allocator.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()
        for how in ended:  # a mirror or the controller has failed: in production the appliance ends with that
            if isinstance(how, Exception):
                raise how
