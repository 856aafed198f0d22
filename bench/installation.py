"""An installation in this process, without HTTP, buildkitd and a gateway's port: what bench/scale.py measures.

The store, its mirror, the controller, the allocator and the feed of the gateway's lease table are the real ones. Only
the workers are not (bench/memory_workers.py). It measures nothing by itself, but counts looks and tables.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

from bench.memory_workers import MemoryWorkers
from bkpool.allocation import AllocationRequest, Allocator, CallerLimits, Delivery, LeaseService
from bkpool.controller import Controller
from bkpool.controller.metrics import ControllerMetrics
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.names import Slot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.pool_status import PoolStatusInputs
from bkpool.core.resource import Metadata
from bkpool.core.tokens import derive, digest
from bkpool.core.worker import REMEMBERED_LEASES, EndedLease, EndReason, Lease, Phase, Worker, new_worker
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.gateway.session.capacity import Capacity
from bkpool.gateway.session.lease_registration import CallbackLeaseRegistry
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.gateway.session.shard_leases import ShardLeases
from bkpool.identity import Identity
from bkpool.pki.authority import Authority
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from bkpool.telemetry.registry import new_registry

_CALLER = Identity("ann", tenant_name="all")
_TOKEN_KEY = b"k" * 32
_WAIT = timedelta(minutes=1)
_LONG = timedelta(hours=6)
_AT_ONCE = 50
"""Workers that are made at once."""
_RESTS_WITHIN = 900.0
"""Seconds until an installation has taken note of all that was made."""


@dataclass(frozen=True, slots=True)
class Filling:
    """So many pools that are alike, and the number of workers of each of them."""

    pools: int
    each: int
    leased: bool = False
    """Whether all these workers are leased from the beginning."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `POOLSxEACH`.

        Raises:
            ValueError: It is not of this form.
        """
        pools, _, each = text.partition("x")
        return cls(int(pools), int(each))

    def __str__(self) -> str:
        return f"{self.pools}x{self.each}"


class Looks(ControllerMetrics):
    """Times the looks of a controller: one begins when the controller reads `clock`, and ends when it is counted."""

    def __init__(self) -> None:
        super().__init__(new_registry())
        self.took: list[float] = []
        self.slept = 0.0
        """For how many seconds the machine has slept, as the controller's clock tells."""
        self._began = 0.0

    def clock(self) -> float:
        """Monotonic time."""
        self._began = time.perf_counter()
        return time.monotonic() - self.slept

    def decided(self, pools: int) -> None:
        """Notes how long the look took that ends now."""
        super().decided(pools)
        self.took.append(time.perf_counter() - self._began)


class Tables:
    """The gateway's table of leases as one loop of it has it, without connections. It counts what it gets."""

    def __init__(self) -> None:
        no_registry = cast("CallbackLeaseRegistry", None)  # only connections use it
        limits = GatewayLimits()
        self._leases = ShardLeases(asyncio.get_running_loop(), no_registry, now, limits, Capacity(limits))
        self.count = 0
        self.workers = 0
        """Of how many workers it has got news, counting each time."""
        self.came = asyncio.Event()

    def update(self, news: Any) -> None:
        """Takes over what a gateway gets when leases have changed."""
        self._leases.update(news)
        self.count += 1
        self.workers += len(news.workers)
        self.came.set()

    def follow(self, mirror: Mirror) -> Callable[[], None]:
        """Follows the leases until the returned function is called. Nothing else here knows how a gateway does it."""
        return TableFeeder(mirror).start(self.update)


def caller(number: int) -> Identity:
    """One of many callers. They use the same caches."""
    return Identity(f"caller-{number}", tenant_name="all")


class _Taken:
    """The receipt of an answer that its caller has."""

    def delivery(self) -> Delivery:
        return Delivery.TAKEN


@dataclass(slots=True)
class Installation:
    """What runs, and what it counts."""

    store: SqliteStore
    mirror: Mirror
    allocator: Allocator
    leases: LeaseService
    pools: list[Pool]
    idle_pools: list[Pool]
    """Those whose workers were idle in the beginning."""
    leased_pools: list[Pool]
    """The others."""
    workers: MemoryWorkers
    looks: Looks = field(default_factory=Looks)
    tables: Tables = field(default_factory=Tables)

    async def lease(self, who: Identity = _CALLER, pool: Pool | None = None) -> float:
        """Leases a worker of the pool (None: of any with idle ones), and releases it.

        Returns:
            The seconds until the caller had the lease.
        """
        request = AllocationRequest((pool or random.choice(self.idle_pools)).key, _WAIT)  # noqa: S311 - no secret
        begin = time.perf_counter()
        async with self.allocator.offer(who, request) as offer:
            offer.answered(_Taken())
        took = time.perf_counter() - begin
        await self.leases.release(offer.grant.token)
        return took

    async def at_rest(self) -> None:
        """Waits until the status of each pool is right, and the controller looks at nothing more."""
        async with asyncio.timeout(_RESTS_WITHIN):
            looks = -1
            while looks != len(self.looks.took) or not all(map(self._is_noted, self.pools)):
                looks = len(self.looks.took)
                await asyncio.sleep(0.1)

    def _is_noted(self, pool: Pool) -> bool:
        counts, status = self.mirror.index_of(pool.key).counts, self.mirror.pools[pool.key].status
        return (counts.idle, counts.allocated) == (status.idle, status.allocated)

    @asynccontextmanager
    async def another_replica(self) -> AsyncIterator[None]:
        """A second controller and a second table, on a mirror of their own. They have looked at everything."""
        mirror = Mirror(self.store)
        other = replace(self, mirror=mirror, looks=Looks(), tables=Tables())
        async with AsyncExitStack() as stack:
            await _run_replica(stack, other)
            yield


@asynccontextmanager
async def installation(*fillings: Filling) -> AsyncIterator[Installation]:
    """An installation with these pools and workers, which runs and is at rest."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(TemporaryDirectory(prefix="bkpool-bench-"))
        store = await SqliteStore.open(Path(directory) / "state.db", now=now)
        stack.push_async_callback(store.close)
        workers, mirror = MemoryWorkers(), Mirror(store, configs=True)
        wanted = [filling for filling in fillings for _ in range(filling.pools)]
        pools = [await _filled_pool(store, workers, number, filling) for number, filling in enumerate(wanted)]
        idle = [pool for pool, filling in zip(pools, wanted, strict=True) if not filling.leased]
        leased = [pool for pool, filling in zip(pools, wanted, strict=True) if filling.leased]
        leases = LeaseService(store=store, mirror=mirror, now=now)
        made = Installation(
            store, mirror, _allocator(store, mirror, leases, workers), leases, pools, idle, leased, workers
        )
        await _run_replica(stack, made)
        stack.push_async_callback(made.allocator.close)
        yield made


async def _run_replica(stack: AsyncExitStack, made: Installation) -> None:
    """Runs mirror, controller and table until the stack is closed. They have looked at everything."""
    _run(stack, made.mirror.run())
    await made.mirror.ready.wait()
    _run(stack, _controller(made).run())
    stack.callback(made.tables.follow(made.mirror))
    await made.at_rest()


def after_one_more_lease(worker: Worker, token: str) -> Worker:
    """The next version of a worker, which remembers one more lease that has ended."""
    version = str(int(worker.metadata.resource_version or 0) + 1)
    ended = (*worker.ended_leases, _ended(token))[-REMEMBERED_LEASES:]
    return worker.but(metadata=worker.metadata.but(resource_version=version), spec=worker.spec.but(ended=ended))


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


def _run(stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Runs this until the stack is closed."""
    task = asyncio.create_task(work)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)


async def _filled_pool(store: SqliteStore, workers: MemoryWorkers, number: int, filling: Filling) -> Pool:
    name, count = f"p{number}", filling.each
    spec = PoolSpec.model_validate({"scaling": {"min": count, "max": count}})
    pool = await store.create(Pool(metadata=Metadata(name=name), spec=spec))
    owner = cache_owner_digest(spec.reuse, _CALLER.tenant, pool.uid, "")

    async def fill(number: int) -> None:
        slot = Slot(pool.key.namespace, name, number)
        lease = _lease(slot, owner) if filling.leased else None
        worker = new_worker(slot, pool, lease, {})
        past = tuple(_ended(f"{slot.worker}-{number}") for number in range(REMEMBERED_LEASES))
        worker = await store.create(worker.but(spec=worker.spec.but(ended=past)))
        worker = worker.with_status(
            phase=Phase.ALLOCATED if lease else Phase.IDLE,
            endpoint=workers.put(slot, worker.uid, owner),
            cache_owner=owner,
            ready_at=now(),
            last_activity_at=now(),
        )
        await store.replace_status(worker)

    for begin in range(0, count, _AT_ONCE):
        await asyncio.gather(*map(fill, range(begin, min(count, begin + _AT_ONCE))))
    return pool


def _ended(token: str) -> EndedLease:
    return EndedLease(token_sha256=digest(token), ended_at=now(), reason=EndReason.RELEASED)


def token_of(slot: Slot) -> str:
    """The token of the lease that a worker has from the beginning."""
    return derive(_TOKEN_KEY, "", str(slot.worker))


def _lease(slot: Slot, owner: str) -> Lease:
    begin = now()
    return Lease(
        id=str(slot.worker),
        token_sha256=digest(token_of(slot)),
        requested_by=_CALLER.name,
        owner=owner,
        allocated_at=begin,
        expires_at=begin + _LONG,
        not_after=begin + _LONG,
    )


def _allocator(store: SqliteStore, mirror: Mirror, leases: LeaseService, workers: MemoryWorkers) -> Allocator:
    return Allocator(
        store=store,
        mirror=mirror,
        leases=leases,
        authority=Authority.create(now()),
        token_key=_TOKEN_KEY,
        caches=workers,
        answers=workers.answers,
        now=now,
        limits=CallerLimits(time.monotonic),
    )


def _controller(made: Installation) -> Controller:
    return Controller(
        store=made.store,
        mirror=made.mirror,
        daemons=made.workers,
        caches=made.workers,
        now=now,
        status_inputs=lambda _pool: PoolStatusInputs("tcp://localhost:1235"),
        recorder=LogRecorder(),
        metrics=made.looks,
        seconds=made.looks.clock,
    )
