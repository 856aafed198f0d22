"""The heartbeats of gateways that are gone are deleted; those of the others stay."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from bkpool.controller.dead_gateways import DeadGateways
from bkpool.core.errors import Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.resource import Metadata
from bkpool.store.heartbeats import Heartbeats
from bkpool.store.sqlite import SqliteStore

NOW = datetime(2026, 5, 1, tzinfo=UTC)


class Time:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def heartbeats(store):
    return Heartbeats(store)


async def names(store):
    return [key.name for key in (await store.list(GatewayHeartbeat)).keys]


async def look_for(dead, time, heartbeats, store, minutes, *living):
    """Looks once a minute, while these gateways live."""
    for minute in range(minutes):
        for name in living:
            found = await store.get(GatewayHeartbeat, "default", name)
            status = HeartbeatStatus(renewed_at=NOW + timedelta(minutes=minute, seconds=time.seconds))
            await store.replace_status(found.but(status=status))
        for key in (await store.list(GatewayHeartbeat)).keys:
            await heartbeats.is_still(key, None)
        await dead.look()
        time.seconds += 60


async def test_only_what_has_not_changed_for_ten_minutes_is_deleted(store, time, heartbeats):
    for name in ("dead", "alive"):
        await store.create(GatewayHeartbeat(metadata=Metadata(name=name)))
    dead = DeadGateways(store, heartbeats, seconds=time)
    await look_for(dead, time, heartbeats, store, 10, "alive")
    assert await names(store) == ["alive", "dead"]
    await look_for(dead, time, heartbeats, store, 2, "alive")
    assert await names(store) == ["alive"]


async def test_one_that_lives_unseen_is_not_deleted(store, time, heartbeats):
    """The watch hangs, so the copy is old."""
    made = await store.create(GatewayHeartbeat(metadata=Metadata(name="g")))
    await heartbeats.is_still(made.key, None)
    dead = DeadGateways(store, heartbeats, seconds=time)
    await dead.look()
    await store.replace_status(made.but(status=HeartbeatStatus(renewed_at=NOW)))
    time.seconds = 3600
    await dead.look()
    assert await names(store) == ["g"]


async def test_a_store_that_is_away_ends_nothing(store, time, heartbeats, monkeypatch):
    made = await store.create(GatewayHeartbeat(metadata=Metadata(name="g")))
    await heartbeats.is_still(made.key, None)
    dead = DeadGateways(store, heartbeats, seconds=time)
    await dead.look()
    time.seconds = 3600

    async def away(*_args, **_more):
        raise Unavailable("away")

    with monkeypatch.context() as cut:
        cut.setattr(store, "delete", away)
        await dead.look()
    assert await names(store) == ["g"]
    await dead.look()
    assert await names(store) == []
