"""The controller beside gateways that renew their registrations by a heartbeat (rule 10, docs/rules.md#r10)."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from bkpool.controller.expired_registrations import check_expired, judged_heartbeats
from bkpool.core.errors import Conflict
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import FinishLease, RemoveWorker, ReplaceDaemon, StopDaemon
from bkpool.core.reconcile.slot_step import Moment, next_step
from bkpool.core.registrations import REGISTRATION_LIFE, SeenRegistrations
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, GatewayRegistration, Worker
from bkpool.store.heartbeats import Heartbeats
from bkpool.store.sqlite import SqliteStore
from support.objects import NOW, lease, worker
from support.world import POOL, running_world

BEAT = Key("default", "g")
LIFE = REGISTRATION_LIFE.total_seconds()


@pytest.fixture
async def world(tmp_path):
    async with running_world(tmp_path) as world:
        yield world


def told(at: datetime, **leases: int) -> HeartbeatStatus:
    return HeartbeatStatus(renewed_at=at, leases=leases)


async def registered(world, connections=1, *, release=True) -> Worker:
    """A lease with the registration of a gateway, which has a heartbeat, too."""
    await world.pool(scaling={"min": 1, "max": 1})
    grant = await world.replicas[0].allocate()
    await world.asleep()
    stored = await world.store.get(Worker, *grant.worker.key)
    entry = GatewayRegistration(
        gateway="g",
        lease_id=stored.held_lease.id,
        renewed_at=world.clock(),
        connections=connections,
        heartbeat=str(BEAT),
    )
    await world.store.replace_status(stored.with_status(gateways=(entry,)))
    await world.until(lambda: world.held() and world.held()[0].status.gateways)
    if release:
        await world.replicas[0].leases.release(grant.token)
    return stored


async def pass_time(world, seconds: float) -> None:
    world.clock.moved = world.controller.check_clock
    world.clock.advance(seconds=seconds)
    await world.asleep()


async def test_a_heartbeat_keeps_an_ended_lease_on_its_worker(world):
    held = await registered(world)
    await world.asleep()
    beat = await world.store.create(GatewayHeartbeat(metadata=Metadata(name="g")))
    for _ in range(9):
        await pass_time(world, 20)
        status = told(world.clock(), **{held.held_lease.id: 1})
        beat = await world.store.replace_status(beat.but(status=status))
        mirror = world.replicas[0].mirror
        await world.until(lambda now=beat: mirror.heartbeats.known.get(BEAT) == now)  # noqa: B023
        await world.asleep()
        assert world.held(), "its gateway lives"
    await pass_time(world, LIFE + 1)
    await world.until(lambda: not world.held())


async def test_a_heartbeat_that_was_missed_is_found_before_the_lease_leaves_its_worker(world, monkeypatch):
    """The watch of heartbeats hangs. Nothing of the worker itself has changed."""
    monkeypatch.setattr(world.replicas[0].mirror.heartbeats._copy, "_take", lambda *_: None)
    held = await registered(world)
    await world.asleep()
    status = told(world.clock(), **{held.held_lease.id: 1})
    await world.store.create(GatewayHeartbeat(metadata=Metadata(name="g"), status=status))
    monkeypatch.undo()
    await pass_time(world, LIFE + 1)
    assert world.held()
    await pass_time(world, LIFE + 1)
    await world.until(lambda: not world.held())


async def test_the_connections_of_a_pool_follow_heartbeats(world):
    held = await registered(world, connections=2)

    def shown():
        return world.replicas[0].mirror.pools[POOL].status.connections

    await world.until(lambda: shown() == 2)
    status = told(world.clock() + timedelta(seconds=20), **{held.held_lease.id: 7})
    beat = await world.store.create(GatewayHeartbeat(metadata=Metadata(name="g"), status=status))
    await world.until(lambda: shown() == 7)
    await world.store.replace_status(beat.but(status=told(world.clock() + timedelta(seconds=40))))
    await world.until(lambda: shown() == 0)


async def test_connections_count_again_when_a_gateway_says_the_same_number_after_a_long_silence(world):
    held = await registered(world, release=False)
    status = told(world.clock() + timedelta(seconds=1), **{held.held_lease.id: 1})
    beat = await world.store.create(GatewayHeartbeat(metadata=Metadata(name="g"), status=status))

    def shown():
        return world.replicas[0].mirror.pools[POOL].status.connections

    await world.until(lambda: shown() == 1)
    for _ in range(3):
        await pass_time(world, LIFE)
    await world.until(lambda: shown() == 0)
    status = told(world.clock() + timedelta(seconds=1), **{held.held_lease.id: 1})
    await world.store.replace_status(beat.but(status=status))
    await world.until(lambda: shown() == 1)


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
def missed(store):
    """A copy that has missed the heartbeat of a gateway."""

    async def make():
        await store.create(GatewayHeartbeat(metadata=Metadata(name="g")))
        return Heartbeats(store)

    return make


class Reader:
    """Registrations that are judged by a copy of the heartbeats, as the controller does."""

    def __init__(self, heartbeats, *workers):
        self.seen, self.heartbeats = SeenRegistrations(), heartbeats
        for one in workers:
            self.seen.look(one.key, one, 0.0)
        heartbeats.subscribe(self.take)

    def take(self, key):
        self.seen.look_at_heartbeat(key, self.heartbeats.known.get(key), 0.0)

    async def check(self, planned):
        await check_expired(judged_heartbeats(planned, self.seen), self.heartbeats)


def entry(**changes):
    return GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW, heartbeat=str(BEAT)).but(**changes)


def action(kind, *gateways, reason=EndReason.RELEASED):
    held = worker(0, lease(ended_at=NOW, end_reason=reason), gateways=gateways)
    if kind is FinishLease:
        found = next_step(held.with_status(gateways=()), None, Pool(metadata=Metadata(name="p")), Moment(NOW)).action
        assert isinstance(found, FinishLease)
        return FinishLease(held, *[getattr(found, name) for name in found.__dataclass_fields__ if name != "worker"])
    return ReplaceDaemon(held, "it hangs") if kind is ReplaceDaemon else kind(held)


ENDED = action(FinishLease).ended


@pytest.mark.parametrize("kind", [FinishLease, StopDaemon, ReplaceDaemon])
async def test_what_ends_connections_is_decided_again_after_a_missed_heartbeat(missed, kind):
    heartbeats = await missed()
    planned, reader = action(kind, entry()), Reader(heartbeats)
    for _ in range(2):
        judged = judged_heartbeats(planned, SeenRegistrations())
        with pytest.raises(Conflict, match="the heartbeat of gateway default/g has changed"):
            await check_expired(judged, heartbeats)
    await reader.check(planned)


@pytest.mark.parametrize(
    "harmless",
    [
        action(RemoveWorker, entry()),
        action(StopDaemon),
        action(StopDaemon, entry(lease_id="earlier")),
        action(StopDaemon, entry(heartbeat="")),
        action(StopDaemon, entry(), reason=EndReason.REVOKED),
    ],
    ids=["it stops nothing", "nobody is registered", "for an earlier lease", "no heartbeat", "revoked"],
)
async def test_nothing_else_asks_the_store(missed, harmless):
    heartbeats = await missed()
    await Reader(heartbeats).check(harmless)
    assert not heartbeats.known


async def test_a_revoked_lease_leaves_its_worker_only_after_the_question(missed):
    with pytest.raises(Conflict):
        await Reader(await missed()).check(action(FinishLease, entry(), reason=EndReason.REVOKED))


class Slow:
    """A store in which a question for some heartbeats is answered late."""

    def __init__(self, store, late):
        self._store, self._late, self.asked = store, late, []
        self.may_answer = asyncio.Event()

    async def get(self, kind, namespace, name):
        found = await self._store.get(kind, namespace, name)
        self.asked.append(name)
        if self.asked.count(name) > 1 and name == self._late:
            await self.may_answer.wait()
        return found

    def __getattr__(self, name):
        return getattr(self._store, name)


async def test_a_copy_that_another_worker_has_corrected_confirms_nothing(store):
    """The watch hangs. Gateway a is dead and b lives; two workers have entries of both, and end in one round."""
    slow = Slow(store, late="a")
    heartbeats = Heartbeats(slow)
    made = {name: await store.create(GatewayHeartbeat(metadata=Metadata(name=name))) for name in ("a", "b")}
    for found in made.values():
        await heartbeats.is_still(found.key, None)
    slow.asked.clear()
    both = [entry(gateway=name, heartbeat=f"default/{name}") for name in ("a", "b")]
    actions = [FinishLease(worker(slot, lease(ended_at=NOW), gateways=both), ENDED) for slot in (0, 1)]
    reader = Reader(heartbeats)
    for found in made.values():
        reader.take(found.key)
    await store.replace_status(made["b"].but(status=told(NOW, lease=1)))
    judged = [judged_heartbeats(one, reader.seen) for one in actions]
    first, second = (asyncio.create_task(check_expired(one, heartbeats)) for one in judged)
    with pytest.raises(Conflict):
        await first
    assert heartbeats.known[Key("default", "b")].status.leases, "the copy is right by now"
    slow.may_answer.set()
    with pytest.raises(Conflict):
        await second


async def test_all_leases_of_a_live_gateway_keep_their_workers_when_one_check_finds_out(world, monkeypatch):
    """Two workers are planned in one round. The heartbeat was missed; the check of one corrects the copy for both."""
    await world.pool(scaling={"min": 3, "max": 3})
    grants = [await world.replicas[0].allocate() for _ in range(2)]
    await world.asleep()
    for grant in grants:
        stored = await world.store.get(Worker, *grant.worker.key)
        entries = tuple(
            GatewayRegistration(
                gateway=name,
                lease_id=stored.held_lease.id,
                renewed_at=world.clock(),
                connections=1,
                heartbeat=f"default/{name}",
            )
            for name in ("a", "b")
        )
        await world.store.replace_status(stored.with_status(gateways=entries))
    await world.until(lambda: [len(one.status.gateways) for one in world.held()] == [2, 2])
    for name in ("a", "b"):
        await world.store.create(GatewayHeartbeat(metadata=Metadata(name=name)))
    await world.until(lambda: len(world.replicas[0].mirror.heartbeats.known) == 2)
    await world.asleep()
    ids = {one.held_lease.id: 1 for one in world.held()}
    monkeypatch.setattr(world.replicas[0].mirror.heartbeats._copy, "_take", lambda *_: None)
    live = await world.store.get(GatewayHeartbeat, "default", "b")
    for grant in grants:
        await world.replicas[0].leases.release(grant.token)
    await world.asleep()
    await world.store.replace_status(live.but(status=told(world.clock(), **ids)))
    monkeypatch.undo()
    await pass_time(world, LIFE + 1)
    assert len(world.held()) == 2, "b lives"
    await pass_time(world, LIFE + 1)
    await world.until(lambda: not world.held())


async def test_a_heartbeat_that_was_written_and_deleted_unseen_counts_as_seen_when_it_is_missed(world):
    """The watch hangs. The gateway relies on what it has written."""
    await registered(world)
    await world.asleep()
    await pass_time(world, LIFE + 1)
    assert world.held(), "there may have been a heartbeat"
    await pass_time(world, LIFE - 2)
    assert world.held()
    await pass_time(world, 3)
    await world.until(lambda: not world.held())
