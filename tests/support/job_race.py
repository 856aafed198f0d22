"""Replicas that race for the lease of one job, with watches that are late, lists in between, and kills at any moment.

The store is a real one; each replica has a connection of its own to it, which can be killed or delayed. There is no
controller: workers are always ready, and the race itself takes ended leases off them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch

from bkpool.allocation import AllocationRequest, Allocator, LeaseService, job_leases
from bkpool.allocation.orders import Offer
from bkpool.core.errors import BkpoolError, Conflict, Gone, NotFound
from bkpool.core.names import LABEL_REQUEST, Key, Slot
from bkpool.core.observation import SeenCache
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata, Resource
from bkpool.core.worker import EndReason, Phase, Worker, new_worker
from bkpool.identity import Identity
from bkpool.pki.authority import Authority
from bkpool.store import Listing, Store, WatchEvent
from bkpool.store.mirror import Mirror
from support.world import TAKEN

ANN = Identity("ann")
WORKERS = 6
_LATE = 0.05
"""Seconds after which a replica asks the store, because its watch says nothing."""


def _now() -> datetime:
    return datetime.now(UTC)


class NoCaches:
    """Caches that end with their worker."""

    def owners(self) -> Mapping[Slot, str | None]:
        return {}

    def cache(self, _slot: Slot) -> SeenCache | None:
        return None

    def on_change(self, _callback: Callable[[Slot], None]) -> Callable[[], None]:
        return lambda: None


class Connection:
    """One replica's connection to the store.

    Args:
        store: The store.
        dice: Decides what happens.
    """

    def __init__(self, store: Store, dice: random.Random) -> None:
        self._store = store
        self._dice = dice
        self.calls_left: float = float("inf")
        """Calls until the replica is killed."""
        self.killed = asyncio.Event()
        self.flowing = asyncio.Event()
        self.flowing.set()
        """Cleared while its watches say nothing."""
        self.silent_calls = 0
        """Calls until they go on."""
        self.relist = False
        """Its next event of a watch is lost, so it must list."""
        self.calls: list[str] = []

    def scopes(self, kind: type[Resource]) -> tuple[str | None, ...]:
        return self._store.scopes(kind)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **given: Any) -> Any:
            return await self._carried_out(name, lambda: getattr(self._store, name)(*args, **given))

        return call

    async def list(self, kind: Any, **narrowed: Any) -> Listing[Any]:
        found: Listing[Any] = await self._carried_out("list", lambda: self._store.list(kind, **narrowed))
        return found

    async def watch(self, kind: Any, since: str, **narrowed: Any) -> AsyncGenerator[WatchEvent[Any], None]:
        async with aclosing(self._store.watch(kind, since, **narrowed)) as events:
            async for event in events:
                await self.stop_if_killed()
                await self.flowing.wait()
                for _ in range(self._dice.choice((0, 0, 1, 3, 20))):
                    await asyncio.sleep(0)
                if self.relist:
                    self.relist = False
                    raise Gone("the history is lost")
                yield event

    async def _carried_out(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """A replica that is killed during a call has sent it, or has not. It never sees the answer."""
        await self.stop_if_killed()
        self.calls.append(name)
        self.silent_calls -= 1
        if not self.silent_calls:
            self.flowing.set()
        self.calls_left -= 1
        if self.calls_left < 0:
            self.killed.set()
            if self._dice.random() < 0.5:
                with suppress(BkpoolError):
                    await work()
        await self.stop_if_killed()
        try:
            found = await work()
        except Exception:
            await self.stop_if_killed()
            raise
        await self.stop_if_killed()
        return found

    async def stop_if_killed(self) -> None:
        """A killed replica does nothing more."""
        if self.killed.is_set():
            await asyncio.Event().wait()


class RacingReplica:
    """One replica of the API.

    Args:
        store: The store.
        authority: Signs certificates.
        dice: Decides what happens.
    """

    def __init__(self, store: Store, authority: Authority, dice: random.Random) -> None:
        self.connection = Connection(store, dice)
        connection: Any = self.connection

        async def pause(_seconds: float) -> None:
            await self.connection.stop_if_killed()
            await asyncio.sleep(0)

        async def long_pause(seconds: float) -> None:
            if seconds > 1:
                await asyncio.Event().wait()  # nothing in a race takes so long
            await pause(seconds)

        self.mirror = Mirror(connection, pause=pause)
        leases = LeaseService(store=connection, mirror=self.mirror, now=_now)
        self.leases = leases
        self.allocator = Allocator(
            store=connection,
            mirror=self.mirror,
            leases=leases,
            authority=authority,
            token_key=b"k" * 32,
            caches=NoCaches(),
            now=_now,
            pause=long_pause,
        )
        self.name: str = self.allocator._replica
        self.following = asyncio.create_task(self.mirror.run())
        self.left: list[asyncio.Task[Any]] = []

    def ask(self, pool: Key, job: str) -> AbstractAsyncContextManager[Offer]:
        """Asks for a lease of this job."""
        return self.allocator.offer(ANN, AllocationRequest(pool, timedelta(seconds=60), job_id=job))

    async def end(self) -> None:
        """Ends it, in order or, if it was killed, as it is."""
        if not self.connection.killed.is_set():
            await self.allocator.close()
        self.connection.killed.set()
        allocator, deliveries = self.allocator, self.allocator._deliveries
        left: list[asyncio.Future[Any] | None] = [self.following, *self.left]
        while tasks := [task for task in left if task is not None]:
            while not all(task.done() for task in tasks):  # what a killed one cleans up stops at its next call
                for task in tasks:
                    task.cancel()
                await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)
            claims, ending = allocator._claimer._left, allocator._abandoner._ending
            left = [*claims, *ending.values(), deliveries._marking, deliveries._renewing]
            deliveries._marking = deliveries._renewing = None
            claims.clear()
            ending.clear()


class JobRace:
    """A pool, two replicas, and what their callers got.

    Args:
        store: The store; it has no objects of the pool yet.
        seed: Of the dice.
        pool: The pool's name.
    """

    def __init__(self, store: Store, seed: int, pool: Key) -> None:
        self.store = store
        self.dice = random.Random(seed)
        self.pool = pool
        self.authority = Authority.create(_now())
        self.replicas: list[RacingReplica] = []
        self._killed: list[RacingReplica] = []
        self.dead: set[str] = set()
        self.kills = 0
        self.joined = 0
        """Answers with a lease that another replica had claimed, or another request."""
        self._given: list[Worker] = []

    async def run(self, rounds: int) -> None:
        """Runs so many rounds, each with another job."""
        async with self.running():
            for number in range(rounds):
                await self.round(f"job-{number}")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Makes the pool and two replicas."""
        await self._make_pool()
        try:
            with patch.object(job_leases, "LONGEST_DELAY", _LATE):
                self.replicas = [self._replica() for _ in range(2)]
                await asyncio.gather(*(replica.mirror.ready.wait() for replica in self.replicas))
                yield
        finally:
            await self._end_replicas()

    async def known_to(
        self, replica: RacingReplica, leased: Worker, is_known: Callable[[], bool] | None = None
    ) -> None:
        """Waits until a replica has seen the lease of this worker, or until this is so."""

        def seen() -> bool:
            known = replica.mirror.workers.get(leased.key)
            return known is not None and known.lease is not None and known.lease.id == leased.held_lease.id

        changed = asyncio.Event()
        unsubscribe = replica.mirror.subscribe(lambda _change: changed.set())
        while not (is_known or seen)():
            changed.clear()
            await changed.wait()
        unsubscribe()

    async def quiet(self, replica: RacingReplica) -> None:
        """Waits until a replica has ended the leases that it gave up."""
        allocator = replica.allocator
        while True:
            left: set[asyncio.Future[Any]] = {*allocator._claimer._left, *allocator._abandoner._ending.values()}
            if not left:
                return
            await asyncio.wait(left)

    async def free_worker(self) -> Worker:
        """A worker without a lease."""
        found = await self.store.list(Worker, namespace=self.pool.namespace)
        return next(worker for worker in found.items if worker.lease is None)

    async def round(self, job: str) -> None:
        """One job is asked for at both replicas at once. At the end it has one lease, which its caller has."""
        self._given = []
        for replica in self.replicas:
            if self.dice.random() < 0.3:
                replica.connection.calls_left = self.dice.randrange(8)
            if self.dice.random() < 0.15:
                replica.connection.flowing.clear()
                replica.connection.silent_calls = self.dice.randrange(2, 20)
            replica.connection.relist = self.dice.random() < 0.2
        cleaning = asyncio.create_task(self._end_leases_of_the_dead())
        asks = [self.dice.randrange(2) for _ in range(self.dice.choice((1, 2, 3)))]
        try:
            async with asyncio.TaskGroup() as clients:
                for place in (0, 1, *asks):
                    clients.create_task(self._client(job, place))
        finally:
            for replica in self.replicas:
                replica.connection.flowing.set()
            cleaning.cancel()
            await asyncio.gather(cleaning, return_exceptions=True)
        await self._end_leases_once()
        await self._check_and_clear(job)

    async def _client(self, job: str, place: int) -> None:
        """Asks until it has an answer, at another replica when one was killed."""
        for attempt in itertools.count(place):
            place = attempt % 2
            replica = self.replicas[place]
            asking = asyncio.create_task(self._ask(replica, job))
            killed = asyncio.create_task(replica.connection.killed.wait())
            await asyncio.wait({asking, killed}, return_when=asyncio.FIRST_COMPLETED)
            killed.cancel()
            if asking.done():
                asking.result()
                return
            replica.left.append(asking)
            await self._replace_killed(replica)

    async def _replace_killed(self, replica: RacingReplica) -> None:
        """Starts another replica instead of a killed one."""
        if replica in self.replicas:
            self.kills += 1
            self.dead.add(replica.name)
            self.replicas[self.replicas.index(replica)] = self._replica()
            self._killed.append(replica)
            await replica.end()

    async def _ask(self, replica: RacingReplica, job: str) -> None:
        await replica.mirror.ready.wait()
        async with replica.ask(self.pool, job) as offer:
            await replica.connection.stop_if_killed()
            worker = offer.grant.worker
            self.joined += worker.held_lease.undelivered is None or any(w.key == worker.key for w in self._given)
            self._given.append(worker)
            offer.answered(TAKEN)
        for one in self._given:
            assert one.held_lease.id == worker.held_lease.id or not await self._is_live(one), (
                f"{job}: callers have {one.key} and {worker.key}"
            )

    async def _is_live(self, given: Worker) -> bool:
        now = await self.store.get(Worker, *given.key)
        return now.lease is not None and now.lease.id == given.held_lease.id and now.lease.ended(_now()) is None

    async def _end_leases_of_the_dead(self) -> None:
        """What the controller does after two minutes."""
        while True:
            await self._end_leases_once()
            for _ in range(10):
                await asyncio.sleep(0)

    async def _end_leases_once(self) -> None:
        """Callers use what they have, so it does not end, although their replica was killed before it noted that.

        A lease that has ended is taken off its worker, so that there are always free ones.
        """
        for worker in (await self.store.list(Worker, namespace=self.pool.namespace)).items:
            undelivered = worker.undelivered
            if any(worker.lease and one.held_lease.id == worker.lease.id for one in self._given):
                continue
            if worker.lease is not None and worker.lease.ended_at is not None:
                await self._take_lease_off(worker)
            elif undelivered is not None and undelivered.replica in self.dead and worker.held_lease.ended_at is None:
                ended = worker.held_lease.but(ended_at=_now(), end_reason=EndReason.ABANDONED)
                with suppress(Conflict, NotFound):
                    await self.store.replace(worker.with_lease(ended))

    async def _check_and_clear(self, job: str) -> None:
        """The callers have one live lease. Everything else ends by itself; then all leases are taken off."""
        live = [one for one in self._given if await self._is_live(one)]
        assert len({one.held_lease.id for one in live}) == 1, f"{job}: {len(live)} of {len(self._given)} are live"
        for replica in tuple(self.replicas):
            replica.connection.calls_left = float("inf")
            if replica.connection.killed.is_set():
                await self._replace_killed(replica)
            else:
                await self.quiet(replica)
        await self._end_leases_once()
        workers = (await self.store.list(Worker, namespace=self.pool.namespace)).items
        left = [one for one in workers if one.lease and one.lease.ended_at is None]
        assert [one.held_lease.id for one in left] == [live[0].held_lease.id], f"{job}: others are left"
        for worker in workers:
            if worker.lease is not None:
                await self._take_lease_off(worker)

    async def _take_lease_off(self, worker: Worker) -> None:
        lease_id = worker.held_lease.id
        while worker.lease is not None and worker.lease.id == lease_id:
            labels = {name: value for name, value in worker.metadata.labels.items() if name != LABEL_REQUEST}
            try:
                await self.store.replace(worker.but(metadata=worker.metadata.but(labels=labels)).with_lease(None))
            except Conflict:  # it is being noted that its caller has it
                worker = await self.store.get(Worker, *worker.key)
            else:
                return

    async def _make_pool(self) -> None:
        spec = PoolSpec.model_validate(
            {"scaling": {"max": WORKERS}, "auth": {"limits": {"identity": {"leases": 100, "waiters": 100}}}}
        )
        metadata = Metadata(name=self.pool.name, namespace=self.pool.namespace)
        pool = await self.store.create(Pool(metadata=metadata, spec=spec))
        for number in range(WORKERS):
            worker = await self.store.create(new_worker(Slot(*self.pool, number), pool, None, {}))
            await self.store.replace_status(
                worker.with_status(phase=Phase.IDLE, endpoint=f"unix:///{number}", ephemeral_cache=True)
            )

    def _replica(self) -> RacingReplica:
        return RacingReplica(self.store, self.authority, self.dice)

    async def _end_replicas(self) -> None:
        for replica in (*self.replicas, *self._killed):  # of a killed one what was asked after its end is left
            await replica.end()
