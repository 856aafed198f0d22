"""What the controller writes for a lease, and what is left when it is killed between two writes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bkpool.controller.lease_ends import LeaseEnds
from bkpool.core.errors import Unavailable
from bkpool.core.names import LABEL_REQUEST
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.actions import FinishLease
from bkpool.core.reconcile.decide import decide
from bkpool.core.reconcile.later_writes import DEFAULT_PAUSES
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, Phase, Worker
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.objects import NOW, lease, pool, seen, snapshot, worker
from support.world import MemoryWorkers, running_world


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path, pauses=DEFAULT_PAUSES) as world:
        yield world


def count_writes(store, monkeypatch):
    """A list that gets the name of each write of a worker."""
    made = []

    def counted(name, write):
        async def write_and_count(one):
            if isinstance(one, Worker):
                made.append(name)
            return await write(one)

        return write_and_count

    for name in ("replace", "replace_status"):
        monkeypatch.setattr(store, name, counted(name, getattr(store, name)))
    return made


async def ready_pool(world, **spec):
    await world.pool(scaling={"min": 1, "max": 1}, **spec)
    await world.until(lambda: [w for w in world.replicas[0].mirror.workers.values() if w.phase is Phase.IDLE])
    await world.asleep()


async def used_once(world):
    """Gives the cache its owner: the first lease of a worker needs more writes."""
    api = world.replicas[0]
    grant = await api.allocate()
    await world.until(lambda: api.mirror.workers[grant.worker.key].routable_endpoint)
    await api.leases.release(grant.token)
    await world.until(lambda: not world.held())
    world.clock.advance(seconds=2)
    await world.asleep()


async def test_a_short_lease_costs_the_controller_one_write(world, monkeypatch):
    await ready_pool(world)
    await used_once(world)
    writes, api = count_writes(world.store, monkeypatch), world.replicas[0]
    grant = await api.allocate()
    await api.leases.release(grant.token)
    await world.until(lambda: not world.held())
    await world.asleep()
    claim, delivered, release, finish = ["replace"] * 4
    assert writes == [claim, delivered, release, finish]
    (worker,) = (await world.workers()).values()
    assert (worker.phase, worker.allocation_count, worker.last_activity_at) == (Phase.IDLE, 2, world.clock())
    assert [past.reason for past in worker.ended_leases] == [EndReason.RELEASED] * 2
    assert worker.status.ended == ()


async def test_a_longer_lease_is_written_in_the_status_too_and_so_is_its_end(world, monkeypatch):
    await ready_pool(world)
    await used_once(world)
    writes, api = count_writes(world.store, monkeypatch), world.replicas[0]
    grant = await api.allocate()
    await world.asleep()
    world.clock.advance(seconds=1)
    await world.until(lambda: api.mirror.workers[grant.worker.key].status.phase is Phase.ALLOCATED)
    await api.leases.release(grant.token)
    await world.until(lambda: not world.held())
    await world.asleep()
    world.clock.advance(seconds=1)
    await world.until(lambda: api.mirror.workers[grant.worker.key].status.phase is Phase.IDLE)
    await world.asleep()
    assert writes.count("replace_status") == 2
    assert api.mirror.workers[grant.worker.key].status.allocation_count == 2


async def test_a_worker_is_leased_again_before_its_end_is_in_the_status(world):
    await ready_pool(world)
    await used_once(world)
    api = world.replicas[0]
    first = await api.allocate()
    await world.asleep()
    world.clock.advance(seconds=1)
    await world.until(lambda: api.mirror.workers[first.worker.key].status.phase is Phase.ALLOCATED)
    await api.leases.release(first.token)
    await world.until(lambda: not world.held())
    second = await api.allocate()
    assert second.worker.key == first.worker.key
    assert second.worker.status.phase is Phase.ALLOCATED, "of the lease before"


async def test_a_pools_status_is_written_at_most_once_a_second(world, monkeypatch):
    await ready_pool(world)
    await used_once(world)
    written = []
    write = world.store.replace_status

    async def noted(one):
        if isinstance(one, Pool):
            written.append((one.status.allocated, world.clock.seconds()))
        return await write(one)

    monkeypatch.setattr(world.store, "replace_status", noted)
    world.clock.advance(seconds=1)
    await world.asleep()
    written.clear()
    world.clock.advance(seconds=1)
    api = world.replicas[0]
    began = world.clock.seconds()
    world.clock.moved = world.controller.check_clock
    for _ in range(3):
        grant = await api.allocate()
        await world.asleep()
        await api.leases.release(grant.token)
        await world.until(lambda: not world.held())
        await world.asleep()
    assert written == [(1, began)], "the first change is written at once"
    world.clock.advance(seconds=1)
    await world.until(lambda: written[-1] == (0, began + 1))
    await world.asleep()
    assert len(written) == 2


async def test_each_lease_has_one_event_when_it_is_made_and_one_when_it_has_ended(world, monkeypatch):
    reasons = []
    monkeypatch.setattr(LogRecorder, "record", lambda _self, _about, reason, *_, **__: reasons.append(reason))
    await ready_pool(world)
    api = world.replicas[0]
    reasons.clear()
    for _ in range(2):
        grant = await api.allocate()
        await world.until(lambda grant=grant: api.mirror.workers[grant.worker.key].routable_endpoint)
        await world.asleep()
        await api.leases.release(grant.token)
        await world.until(lambda: not world.held())
    await world.asleep()
    assert reasons == ["Allocated", "Released"] * 2


class KilledStore(SqliteStore):
    """Is killed after so many writes; None: it is not. It may forget what an older definition of a worker forgets."""

    writes_left: int | None = None
    old_definition = False

    async def replace(self, obj):
        self._count()
        if self.old_definition:
            fields = {"ended": (), "last_activity_at": None, "allocation_count": 0}
            obj = obj.but(spec=obj.spec.but(**fields))
        return await super().replace(obj)

    async def replace_status(self, obj):
        self._count()
        return await super().replace_status(obj)

    def _count(self):
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Unavailable("killed")
            self.writes_left -= 1


@pytest.fixture
async def store(tmp_path):
    store = await KilledStore.open(tmp_path / "state.db")
    yield store
    await store.close()


async def stored(store, over, **status):
    """A worker in the store whose lease has ended."""
    await store.create(Pool(metadata=Metadata(name="p"), spec=PoolSpec()))
    made = worker(0, over)
    fresh = made.but(metadata=Metadata(name=made.key.name, labels={LABEL_REQUEST: "key"}))
    created = await store.create(fresh.with_lease(over))
    return await store.replace_status(created.with_status(cache_owner="owner-a", **status))


async def finish(store, observed):
    """One round of the controller for the only worker."""
    (one,) = (await store.list(Worker)).items
    (action,) = decide(snapshot(pool(), one, observed=observed(one)), NOW).actions
    assert isinstance(action, FinishLease)
    await LeaseEnds(store, Mirror(store), MemoryWorkers(), LogRecorder(), lambda: NOW).finish(action, pool())


@pytest.mark.parametrize("writes", [0, 1, 2])
async def test_the_reason_and_the_log_of_a_lost_lease_survive_a_kill_at_each_write(store, writes):
    lost = lease(ended_at=NOW, end_reason=EndReason.LOST, end_message="buildkitd was killed")
    failing = {"phase": Phase.PROVISIONING, "failures": 5, "failed_at": NOW, "endpoint": None}
    before = await stored(store, lost, message="buildkitd was killed", log_tail="the log", **failing)
    store.writes_left = writes
    with pytest.raises(Unavailable):
        await finish(store, lambda _one: {})
    (one,) = (await store.list(Worker)).items
    assert one.lease is not None, "it leaves the worker in the last write"
    assert one.lease_end_message == before.lease_end_message
    store.writes_left = None
    await finish(store, lambda _one: {})
    (one,) = (await store.list(Worker)).items
    assert (one.lease, one.metadata.finalizers, one.metadata.labels) == (None, (), {})
    assert [past.message_with_log for past in one.ended_leases] == [before.lease_end_message]
    assert one.status.ended == (), "nothing was dropped"
    assert (one.phase, one.status.message_with_log, one.allocation_count) == (Phase.FAILED, "buildkitd was killed", 1)


async def test_the_owner_of_the_cache_is_stored_before_the_lease_leaves(store):
    over = lease(ended_at=NOW, end_reason=EndReason.RELEASED)
    await stored(store, over, phase=Phase.IDLE, endpoint="unix:///0")

    def observed(one):
        return {0: replace(seen(0, "owner-b"), worker_uid=one.uid)}

    store.writes_left = 1
    with pytest.raises(Unavailable):
        await finish(store, observed)
    (one,) = (await store.list(Worker)).items
    assert (one.status.cache_owner, one.lease) == ("owner-b", over)
    store.writes_left = 1
    await finish(store, observed)
    (one,) = (await store.list(Worker)).items
    assert one.lease is None, "one write is enough now"


async def test_a_definition_of_an_earlier_version_forgets_no_lease(store):
    over = lease(ended_at=NOW, end_reason=EndReason.RELEASED, end_message="why")
    await stored(store, over, phase=Phase.ALLOCATED, endpoint="unix:///0")
    store.old_definition = True
    await finish(store, lambda one: {0: replace(seen(0, "owner-a"), worker_uid=one.uid)})
    (one,) = (await store.list(Worker)).items
    assert (one.lease, one.spec.ended) == (None, ())
    assert [past.message for past in one.ended_leases] == ["why"]
    assert (one.last_activity_at, one.allocation_count) == (NOW, 1)
