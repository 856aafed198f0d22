"""Objects that this version cannot read: they are named, nothing of theirs is touched, and nothing else is delayed.

The store, the copy of it and the controller are real. Daemons are in memory, so that a test sees each start and stop.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from bkpool.allocation import LeaseSelector
from bkpool.allocation.pool_removal import PoolRemover
from bkpool.allocation.revocation import Revoker
from bkpool.controller.unreadable_objects import UnreadableObjects
from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.errors import EXIT, HostFault, InvalidInput, NoCapacity, Unavailable
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker
from bkpool.identity import Identity
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.captured_logs import capture_logs
from support.unreadable import garble, spoil, stored_bytes
from support.world import ANN, BOB, POOL, WAIT, MemoryWorkers, World, running_world

FIRST, SECOND = Slot("default", "p", 0), Slot("default", "p", 1)


def hibernates(doc) -> None:
    """As a newer version might write it."""
    doc["status"]["phase"] = "Hibernating"


async def wake(world: World) -> None:
    """Writes something, so that the watches look at the file."""
    await world.store.delete(Pool, *(await world.store.create(Pool(metadata=Metadata(name="other")))).key)
    worker = (await world.store.list(Worker)).items
    if worker:
        await world.store.replace_status(worker[0].with_status(last_activity_at=world.clock()))


def decisions(world: World) -> float:
    return world.registry.get_sample_value("buildkit_controller_decisions_total") or 0.0


def idle(world: World) -> list[Worker]:
    return [w for w in world.replicas[0].mirror.workers.values() if w.status.phase is Phase.IDLE]


def condition(world: World) -> str:
    """What the pool says of objects that cannot be read."""
    pool = world.replicas[0].mirror.pools.get(POOL)
    found = pool.status.conditions if pool else ()
    return next((one.message for one in found if one.type == "Unreadable"), "")


@asynccontextmanager
async def after_a_downgrade(tmp_path, **spec):
    """A pool whose first worker is leased and in a phase of a newer version, when the appliance starts again."""
    runtime = MemoryWorkers()
    async with running_world(tmp_path, runtime=runtime) as world:
        await world.pool(**spec)
        grant = await world.replicas[0].allocate()
        await world.until(lambda: world.held() and world.held()[0].status.phase is Phase.ALLOCATED)
    spoil(tmp_path / "state.db", "p-worker-0", hibernates)
    with capture_logs() as logs:
        async with running_world(tmp_path, runtime=runtime) as world:
            world.logs = logs  # type: ignore[attr-defined]
            await world.until(lambda: condition(world))
            yield world, grant


async def test_a_worker_in_an_unknown_phase_goes_on_and_blocks_nothing(tmp_path):
    async with after_a_downgrade(tmp_path, scaling={"min": 1, "max": 3}) as (world, _):
        daemon = world.runtime.daemons[FIRST]
        await world.until(
            lambda: any(w.status.phase is Phase.IDLE for w in world.replicas[0].mirror.workers.values())
        )
        grant = await world.replicas[0].allocate(BOB)

        assert grant.worker.slot == SECOND, "the pool goes on in the slots beside it"
        assert world.runtime.daemons[FIRST] is daemon, "the daemon of a worker that cannot be read is no stray"
        pool = world.replicas[0].mirror.pools[POOL]
        assert pool.status.phase == "Degraded"
        assert condition(world).startswith(
            "BuildKitWorker default/p-worker-0 cannot be read: status.phase: must be 'Pending', 'Provisioning'"
        )
        told = [line["event"] for line in world.logs if "p-worker-0" in str(line) and line["log_level"] == "warning"]
        assert told == ["store.object_unreadable", "object.event"]


async def test_it_costs_nothing_while_it_cannot_be_read(tmp_path):
    async with after_a_downgrade(tmp_path, scaling={"min": 1, "max": 1}) as (world, _):
        await world.replicas[0].mirror.ready.wait()
        before = -1
        async with asyncio.timeout(WAIT):  # until everything that follows from the start has been decided
            while before != (before := decisions(world)):
                with pytest.raises(NoCapacity):
                    await world.replicas[0].allocate(BOB, wait=0.05)
        with pytest.raises(NoCapacity, match="1 of them cannot be used: BuildKitWorker default/p-worker-0 cannot be"):
            await world.replicas[0].allocate(BOB, wait=0.2)
        assert decisions(world) == before, "before, it decided many thousand times a second"
        assert [line for line in world.logs if line["event"] == "action.failed"] == []


async def test_it_goes_on_by_itself_when_it_can_be_read_again(tmp_path):
    async with after_a_downgrade(tmp_path, scaling={"max": 2}) as (world, grant):
        replica = world.replicas[0]
        with pytest.raises(HostFault, match="p-worker-0 cannot be read") as refused:
            await replica.leases.release(grant.token)
        assert (refused.value.exit_code, refused.value.status) == (EXIT["Unreadable"], 503)

        spoil(tmp_path / "state.db", "p-worker-0", lambda doc: doc["status"].update(phase="Allocated"))
        await replica.allocate(BOB)  # writes a worker
        await world.until(lambda: not condition(world))
        assert replica.mirror.pools[POOL].status.phase == "Ready"
        await replica.leases.release(grant.token)
        await world.until(lambda: replica.mirror.workers[FIRST.worker].lease is None)
        assert [line["event"] for line in world.logs if line["event"] == "store.object_readable"] != []


async def test_the_worker_is_named_when_its_lease_is_to_be_changed_by_another_name(tmp_path):
    async with after_a_downgrade(tmp_path, scaling={"max": 2}) as (world, grant):
        replica = world.replicas[0]
        revoker = Revoker(store=world.store, mirror=replica.mirror, leases=replica.leases)
        admin = (Identity("admin", admin=True),)
        other = await replica.allocate(ANN)
        lease = grant.worker.held_lease
        for selector in (LeaseSelector(lease_id=lease.id), LeaseSelector(worker=FIRST.worker)):
            with pytest.raises(HostFault, match="p-worker-0 cannot be read"):
                await revoker.revoke(selector, admin)
        done = await revoker.revoke(LeaseSelector(pool=POOL), admin)
        assert [worker.key for worker in done.revoked] == [other.worker.key]
        assert [found.key for found in done.unreadable] == [FIRST.worker], "not silently left out"
        done = await revoker.revoke(LeaseSelector(pool=POOL), (BOB,))
        assert (done.revoked, done.unreadable) == ((), ()), "others learn nothing of it"


async def test_a_worker_that_becomes_unreadable_while_the_appliance_runs_keeps_its_daemon(tmp_path):
    async with running_world(tmp_path) as world:
        await world.pool(scaling={"min": 2, "max": 2})
        await world.until(lambda: len(world.runtime.daemons) == 2)
        await world.until(
            lambda: all(w.status.phase is Phase.IDLE for w in world.replicas[0].mirror.workers.values())
        )
        daemon = world.runtime.daemons[FIRST]
        spoil(tmp_path / "state.db", "p-worker-0", lambda doc: doc["spec"].update(poolRef={"name": 7}))
        await wake(world)
        await world.until(lambda: condition(world))
        assert "spec.poolRef.name: must be text" in condition(world)
        assert world.runtime.daemons[FIRST] is daemon

        await world.store.delete(Worker, *FIRST.worker)  # as the message says
        await world.until(lambda: not condition(world))
        await world.until(lambda: len(world.replicas[0].mirror.workers) == 2)


async def test_rows_that_are_not_even_json_are_out_of_use_and_all_else_goes_on(tmp_path):
    runtime, path = MemoryWorkers(), tmp_path / "state.db"
    async with running_world(tmp_path, runtime=runtime) as world:
        await world.pool(scaling={"min": 1, "max": 2})
        await world.pool("q")
        await world.replicas[0].allocate()
        await world.until(lambda: world.held() and world.held()[0].status.phase is Phase.ALLOCATED)
        daemon = runtime.daemons[FIRST]
    garble(path, "p-worker-0", b"{half")
    garble(path, "q", b"[7]")
    async with running_world(tmp_path, runtime=runtime) as world:
        replica = world.replicas[0]
        await world.until(lambda: condition(world) and replica.mirror.unreadable_pools)
        assert "p-worker-0 cannot be read: what is stored in state.db is not JSON" in condition(world)
        assert (await replica.allocate(BOB)).worker.slot == SECOND, "the pool goes on in the slot beside it"
        assert runtime.daemons[FIRST] is daemon, "and its daemon is no stray"

        (key,) = replica.mirror.unreadable_pools
        revoker = Revoker(store=world.store, mirror=replica.mirror, leases=replica.leases)
        remover = PoolRemover(
            store=world.store, mirror=replica.mirror, revoker=revoker, now=world.clock, only_files=True
        )
        await remover.remove(key, (Identity("admin", admin=True),), at_once=True)
        await world.until(lambda: key not in {*replica.mirror.unreadable_pools, *replica.mirror.pools})
        await world.store.delete(Worker, *FIRST.worker)
        await world.until(lambda: not condition(world))


async def test_a_pool_that_cannot_be_read_blocks_no_other_and_its_leases_end(tmp_path):
    async with running_world(tmp_path) as world:
        replica = world.replicas[0]
        await world.pool(scaling={"max": 2})
        grant, _ = await replica.allocate(), await replica.allocate(BOB)
        spoil(tmp_path / "state.db", "p", lambda doc: doc["spec"]["scaling"].update(max="many"))
        await world.pool("q")
        await world.until(lambda: POOL in replica.mirror.unreadable_pools)

        with pytest.raises(HostFault, match=r"BuildKitPool default/p cannot be read: spec\.scaling\.max: must be a"):
            await replica.allocate()
        with capture_logs() as logs:
            await replica.leases.revoke(grant.worker, "by the admin")
            await world.until(lambda: replica.mirror.workers[grant.worker.key].lease is None)
        assert grant.worker.slot in world.runtime.stopped_at_once, "a revoked lease stops its builds all the same"
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == []
        assert len(world.held()) == 1, "and the other lease goes on"
        before = decisions(world)
        for _ in range(100):  # enough for many rounds, if one led to the next
            await world.store.list(Pool)
        assert decisions(world) - before <= 4, "two pools, and what was still under way"


@pytest.mark.parametrize(
    "change",
    [
        lambda doc: doc["spec"]["scaling"].update(max="many"),
        lambda doc: doc["metadata"].update(name="p" * 58),  # as a version before this one accepted it
    ],
    ids=["spec", "name"],
)
async def test_a_pool_that_cannot_be_read_can_be_deleted(tmp_path, change):
    async with running_world(tmp_path) as world:
        replica = world.replicas[0]
        await world.pool()
        spoil(tmp_path / "state.db", "p", change)
        await wake(world)
        await world.until(lambda: replica.mirror.unreadable_pools)
        (key,) = replica.mirror.unreadable_pools
        revoker = Revoker(store=world.store, mirror=replica.mirror, leases=replica.leases)
        remover = PoolRemover(
            store=world.store, mirror=replica.mirror, revoker=revoker, now=world.clock, only_files=True
        )
        await remover.remove(key, (Identity("admin", admin=True),), at_once=True)
        await world.until(lambda: key not in {*replica.mirror.unreadable_pools, *replica.mirror.pools})


async def test_a_pool_whose_name_is_of_no_use_is_deleted_at_once_also_where_the_copy_is_late(tmp_path):
    async with running_world(tmp_path) as world:
        await world.pool()
        spoil(tmp_path / "state.db", "p", lambda doc: doc["metadata"].update(name="p" * 58))
        late = Mirror(world.store)
        following = asyncio.create_task(late.run())
        await late.ready.wait()
        following.cancel()
        (key,) = late.unreadable_pools
        revoker = Revoker(store=world.store, mirror=late, leases=world.replicas[0].leases)
        remover = PoolRemover(store=world.store, mirror=late, revoker=revoker, now=world.clock, only_files=True)
        removed = await remover.remove(key, (Identity("admin", admin=True),), at_once=True)
        assert (removed.pool.key, removed.leases, removed.what_happens) == (key, 0, "")
        assert key in late.unreadable_pools
        assert (await world.store.list(Pool)).unreadable == ()


# --- pools and issuers say it themselves ----------------------------------------------------------------------------


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []

    def record(self, about, reason, message, *, warning=False) -> None:
        assert warning
        self.seen.append((about.KIND, about.uid, reason))


@asynccontextmanager
async def telling(store, recorder):
    mirror = Mirror(store, configs=True)
    telling = UnreadableObjects(store, mirror, recorder, lambda: datetime.now(UTC))
    tasks = [asyncio.create_task(work) for work in (mirror.run(), telling.run())]
    try:
        yield mirror
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_pools_and_issuers_say_once_that_they_cannot_be_read(tmp_path):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    issuer = OIDCConfigSpec(issuer="https://issuer.example.com", audience="a")
    config = await store.create(OIDCConfig(metadata=Metadata(name="c"), spec=issuer))
    long = "p" * 58  # as a version before this one accepted it
    spoil(path, "p", lambda doc: doc["metadata"].update(name=long))
    spoil(path, "c", lambda doc: doc["spec"].update(enabled="perhaps"))
    recorder = Events()

    def noted(mirror: Mirror) -> bool:
        return all(
            found.noted(datetime.now(UTC)) is None
            for found in (*mirror.unreadable_pools.values(), *mirror.unreadable_configs.values())
        )

    for _ in range(2):  # the second time as the next controller
        async with telling(store, recorder) as mirror, asyncio.timeout(60):
            await mirror.ready.wait()
            while not noted(mirror):
                await store.list(Pool)
    assert sorted(recorder.seen) == [
        ("BuildKitOIDCConfig", config.uid, "Unreadable"),
        ("BuildKitPool", pool.uid, "Unreadable"),
    ]
    [found] = (await store.list(Pool)).unreadable
    assert found.key == Key("default", long)
    assert found.status["phase"] == "Degraded"
    [stored] = found.status["conditions"]
    assert stored["message"].startswith(
        f"BuildKitPool default/{long} cannot be read: metadata.name: '{long}' has 58 "
    )
    assert "may have 54" in stored["message"]
    await store.close()


async def test_while_the_store_cannot_be_written_it_is_tried_again_and_a_refusal_is_logged_once(tmp_path):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    await store.create(Pool(metadata=Metadata(name="p"), spec=PoolSpec()))
    spoil(path, "p", lambda doc: doc["spec"]["scaling"].update(max="many"))
    errors = [Unavailable("away"), InvalidInput("no")]
    pauses, done, recorder = [], asyncio.Event(), Events()

    class Refusing:
        def __getattr__(self, name):
            return getattr(store, name)

        async def patch_status(self, _found, _fields) -> None:
            error = errors.pop(0)
            if not errors:
                done.set()
            raise error

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    mirror = Mirror(store, configs=True)
    work = UnreadableObjects(Refusing(), mirror, recorder, lambda: datetime.now(UTC), pause=pause)
    with capture_logs() as logs:
        tasks = [asyncio.create_task(one) for one in (mirror.run(), work.run())]
        async with asyncio.timeout(60):
            await done.wait()
            while not recorder.seen:
                await store.list(Pool)
            spoil(path, "p", lambda doc: doc["metadata"]["labels"].update(n="1"))
            await store.create(Pool(metadata=Metadata(name="q")))
            while Key("default", "q") not in mirror.pools:
                await store.list(Pool)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert pauses == [2.0]
    assert [line["reason"] for line in logs if line["event"] == "store.condition_not_written"] == ["away", "no"]
    assert len(recorder.seen) == 1
    await store.close()


async def test_a_pool_whose_row_is_no_document_is_told_of_once_and_stays_as_it_is(tmp_path):
    path = tmp_path / "state.db"
    store = await SqliteStore.open(path)
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    garble(path, "p", b"{half")
    recorder = Events()
    async with telling(store, recorder) as mirror, asyncio.timeout(10):
        await mirror.ready.wait()
        while not recorder.seen:
            await store.list(Pool)
        await store.create(Pool(metadata=Metadata(name="q")))
        while Key("default", "q") not in mirror.pools:
            await store.list(Pool)
    assert recorder.seen == [("BuildKitPool", pool.uid, "Unreadable")]
    assert stored_bytes(path, "p") == b"{half", "nobody overwrites what somebody may want to correct"
    await store.close()
