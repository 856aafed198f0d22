"""The controller beside gateways that renew their registrations by a heartbeat (rule 10, docs/rules.md#r10)."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from bkpool.controller.expired_registrations import check_expired, judged
from bkpool.core.errors import Conflict
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.reconcile.actions import FinishLease, RemoveWorker, ReplaceDaemon, StopDaemon
from bkpool.core.reconcile.slot_step import Moment, next_step
from bkpool.core.registrations import REGISTRATION_LIFE
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


async def checked(one, heartbeats) -> None:
    await check_expired(judged(one, heartbeats), heartbeats)


def told(at: datetime, **leases: int) -> HeartbeatStatus:
    return HeartbeatStatus(renewed_at=at, leases=leases)


async def registered(world, connections=1) -> Worker:
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
        await world.until(lambda now=beat: mirror.heartbeats.gateways.get(BEAT) == now)  # noqa: B023
        await world.asleep()
        assert world.held(), "its gateway lives"
    await pass_time(world, LIFE + 1)
    await world.until(lambda: not world.held())


async def test_a_heartbeat_that_was_missed_is_found_before_the_lease_leaves_its_worker(world, monkeypatch):
    """The watch of heartbeats hangs. Nothing of the worker itself has changed."""
    monkeypatch.setattr(Heartbeats, "_take", lambda *_: None)
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


def entry(**changes):
    return GatewayRegistration(gateway="g", lease_id="lease", renewed_at=NOW, heartbeat=str(BEAT)).but(**changes)


def action(kind, *gateways, reason=EndReason.RELEASED):
    held = worker(0, lease(ended_at=NOW, end_reason=reason), gateways=gateways)
    if kind is FinishLease:
        found = next_step(held.with_status(gateways=()), None, Pool(metadata=Metadata(name="p")), Moment(NOW)).action
        assert isinstance(found, FinishLease)
        return FinishLease(held, *[getattr(found, name) for name in found.__dataclass_fields__ if name != "worker"])
    return ReplaceDaemon(held, "it hangs") if kind is ReplaceDaemon else kind(held)


@pytest.mark.parametrize("kind", [FinishLease, StopDaemon, ReplaceDaemon])
async def test_what_ends_connections_is_decided_again_after_a_missed_heartbeat(missed, kind):
    heartbeats = await missed()
    with pytest.raises(Conflict, match="the heartbeat of gateway default/g has changed"):
        await checked(action(kind, entry()), heartbeats)
    await checked(action(kind, entry()), heartbeats)


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
    await checked(harmless, heartbeats)
    assert not heartbeats.gateways


async def test_a_revoked_lease_leaves_its_worker_only_after_the_question(missed):
    with pytest.raises(Conflict):
        await checked(action(FinishLease, entry(), reason=EndReason.REVOKED), await missed())


async def test_the_question_of_one_lease_answers_for_no_other_that_was_judged_before(missed):
    """Both were decided by the old heartbeat. The first one corrects the copy before the second one asks."""
    heartbeats = await missed()
    first, second = [judged(action(FinishLease, entry()), heartbeats) for _ in range(2)]
    for known in (first, second):
        with pytest.raises(Conflict):
            await check_expired(known, heartbeats)
