"""The copy of the gateways' heartbeats against a real store, and against a cluster that does not have them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import Forbidden, NotFound, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat, HeartbeatStatus
from bkpool.core.names import Key
from bkpool.core.resource import Metadata
from bkpool.store.heartbeats import Heartbeats
from bkpool.store.mirror import Mirror

NOW = datetime(2026, 5, 1, tzinfo=UTC)
KEY = Key("default", "g")


async def is_current(heartbeats):
    return await heartbeats.is_current(KEY, heartbeats.gateways.get(KEY))


def beat(seconds: int = 0, **leases: int) -> HeartbeatStatus:
    return HeartbeatStatus(renewed_at=NOW + timedelta(seconds=seconds), leases=leases)


def gateway(name: str = "g", **leases: int) -> GatewayHeartbeat:
    return GatewayHeartbeat(metadata=Metadata(name=name), status=beat(**leases))


class Refusing:
    """A store that may refuse, as an API server does without the definition or without the right."""

    def __init__(self, store) -> None:
        self._store = store
        self.refusal: Exception | None = None
        self.lists = 0

    async def list(self, kind, **narrowed):
        self.lists += 1
        self._refuse()
        return await self._store.list(kind, **narrowed)

    async def get(self, kind, namespace, name):
        self._refuse()
        return await self._store.get(kind, namespace, name)

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    def __getattr__(self, name):
        return getattr(self._store, name)


@asynccontextmanager
async def running(heartbeats):
    task = asyncio.create_task(heartbeats.run())
    try:
        async with asyncio.timeout(60):
            await heartbeats.answered.wait()
        yield heartbeats
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(heartbeats, condition):
    changed = asyncio.Event()
    unsubscribe = heartbeats.subscribe(lambda _key: changed.set())
    async with asyncio.timeout(60):
        while not condition():
            changed.clear()
            await changed.wait()
    unsubscribe()


async def test_it_has_what_was_there_and_follows_every_change(store):
    await store.create(gateway("old", lease=1))
    async with running(Heartbeats(store)) as heartbeats:
        assert {key.name: found.status.leases for key, found in heartbeats.gateways.items()} == {"old": {"lease": 1}}
        assert heartbeats.followed_in("default")
        new = await store.create(gateway())
        await store.replace_status(new.but(status=beat(20, other=2)))
        await until(heartbeats, lambda: KEY in heartbeats.gateways and heartbeats.gateways[KEY].status.leases)
        assert heartbeats.gateways[KEY].status == beat(20, other=2)
        await store.delete(GatewayHeartbeat, *KEY)
        await until(heartbeats, lambda: KEY not in heartbeats.gateways)


@pytest.mark.parametrize("refusal", [Forbidden("no right", hint=""), NotFound("no such kind")])
async def test_without_the_kind_the_mirror_works_and_when_it_is_there_it_is_followed(store, refusal):
    wire, may_ask = Refusing(store), asyncio.Event()
    wire.refusal = refusal

    async def pause(_seconds):
        await may_ask.wait()

    told = []
    heartbeats = Heartbeats(wire, pause=pause)
    heartbeats.on_followed(lambda: told.append(heartbeats.followed_in("default")))
    async with running(heartbeats):
        assert not heartbeats.followed_in("default")
        assert heartbeats.gateways == {}
        assert await is_current(heartbeats), "where nobody may read them no gateway may write them"
        wire.refusal = None
        await store.create(gateway())
        may_ask.set()
        await until(heartbeats, lambda: KEY in heartbeats.gateways)
    assert told == [True]


async def test_the_mirror_does_not_wait_for_a_kind_that_it_may_not_read(store):
    class OnlyHeartbeatsRefused(Refusing):
        async def list(self, kind, **narrowed):
            if kind is GatewayHeartbeat:
                raise Forbidden("no right", hint="")
            return await self._store.list(kind, **narrowed)

    mirror = Mirror(OnlyHeartbeatsRefused(store), heartbeats=True)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(60):
        await mirror.ready.wait()
        await mirror.heartbeats.answered.wait()
    assert mirror.trouble is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_mirror_that_does_not_follow_them_lets_nobody_wait(store):
    mirror = Mirror(store)
    assert mirror.heartbeats.answered.is_set()
    assert not mirror.heartbeats.followed_in("default")


async def test_the_copy_is_compared_with_the_store_and_corrected(store):
    """Its watch hangs: it only has what it is told here."""
    heartbeats, changes = Heartbeats(store), []
    heartbeats.subscribe(changes.append)
    assert await is_current(heartbeats), "there is none"
    made = await store.create(gateway())
    assert not await is_current(heartbeats)
    assert await is_current(heartbeats)
    await store.replace_status(made.but(status=beat(20, lease=1)))
    assert not await is_current(heartbeats)
    assert heartbeats.gateways[KEY].status.leases == {"lease": 1}
    await store.delete(GatewayHeartbeat, *KEY)
    assert not await is_current(heartbeats)
    assert heartbeats.gateways == {}
    assert await is_current(heartbeats)
    assert changes == [KEY] * 3


async def test_a_store_that_does_not_answer_confirms_nothing(store):
    wire = Refusing(store)
    wire.refusal = Unavailable("away")
    with pytest.raises(Unavailable):
        await is_current(Heartbeats(wire))
