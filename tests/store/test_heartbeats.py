"""The copy of the gateways' heartbeats against a real store, and against a cluster that does not have them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from bkpool.core.errors import Forbidden, NotFound, Unavailable
from bkpool.core.gateway_heartbeat import ABSENT, GatewayHeartbeat, HeartbeatStatus, HeartbeatVersion
from bkpool.core.names import Key
from bkpool.core.resource import Metadata
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.store.heartbeats import Heartbeats
from bkpool.store.mirror import Mirror

NOW = datetime(2026, 5, 1, tzinfo=UTC)
KEY = Key("default", "g")


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
        assert {key.name: found.status.leases for key, found in heartbeats.known.items()} == {"old": {"lease": 1}}
        assert heartbeats.followed_in("default")
        new = await store.create(gateway())
        await store.replace_status(new.but(status=beat(20, other=2)))
        await until(heartbeats, lambda: KEY in heartbeats.known and heartbeats.known[KEY].status.leases)
        assert heartbeats.known[KEY].status == beat(20, other=2)
        await store.delete(GatewayHeartbeat, *KEY)
        await until(heartbeats, lambda: KEY not in heartbeats.known)


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
        assert heartbeats.known == {}
        wire.refusal = None
        await store.create(gateway())
        may_ask.set()
        await until(heartbeats, lambda: KEY in heartbeats.known)
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


async def test_what_was_judged_is_compared_with_the_store_and_the_copy_is_corrected(store):
    """Its watch hangs: it only has what it is told here."""
    heartbeats, changes = Heartbeats(store), []
    heartbeats.subscribe(changes.append)
    assert not await heartbeats.is_still(KEY, None), "it may have been written and deleted unseen"
    assert changes == [KEY], "whoever judges counts from now"
    assert await heartbeats.is_still(KEY, ABSENT)
    made = await store.create(gateway())
    first = HeartbeatVersion.of(made)
    assert not await heartbeats.is_still(KEY, ABSENT)
    assert not await heartbeats.is_still(KEY, ABSENT), "the copy is right by now, but what was judged is not"
    assert await heartbeats.is_still(KEY, first)
    await store.replace_status(made.but(status=beat(20, lease=1)))
    assert not await heartbeats.is_still(KEY, first)
    assert not await heartbeats.is_still(KEY, first)
    assert heartbeats.known[KEY].status.leases == {"lease": 1}
    await store.delete(GatewayHeartbeat, *KEY)
    assert not await heartbeats.is_still(KEY, ABSENT), "there was one since"
    assert heartbeats.known == {}
    assert await heartbeats.is_still(KEY, ABSENT)
    assert changes == [KEY] * 4


async def test_one_that_cannot_be_read_counts_as_none(store):
    """A gateway that cannot read its own writes nothing over it."""
    made = await store.create(gateway())
    async with running(Heartbeats(Unreadables(store))) as heartbeats:
        assert heartbeats.known.keys() == {KEY}
        assert not await heartbeats.is_still(KEY, HeartbeatVersion.of(made))
        assert heartbeats.known == {}
        assert await heartbeats.is_still(KEY, ABSENT)


class Unreadables:
    """A store whose objects cannot be read one by one."""

    def __init__(self, store) -> None:
        self._store = store

    async def get(self, kind, namespace, name):
        raise UnreadableObject(Unreadable(kind, Key(namespace, name), "it is broken", {}))

    def __getattr__(self, name):
        return getattr(self._store, name)


async def test_a_question_that_is_forbidden_is_an_answer_only_after_nobody_may_write_any_more(store):
    """Until the controller has taken the right away, gateways may write what it cannot see."""
    wire, clock = Refusing(store), [0.0]
    wire.refusal = Forbidden("no right", hint="")

    async def never(_seconds):
        await asyncio.Event().wait()

    async with running(Heartbeats(wire, pause=never, seconds=lambda: clock[0])) as heartbeats:
        for clock[0] in (0.0, 119.0):
            with pytest.raises(Unavailable, match="cannot be read: no right"):
                await heartbeats.is_still(KEY, None)
        clock[0] = 120.0
        assert await heartbeats.is_still(KEY, None)
    followed = Heartbeats(store)
    followed._store = wire
    with pytest.raises(Unavailable):
        await followed.is_still(KEY, None)


class Weak:
    """A store that refuses as it is told to, and whose watches end as they are told to."""

    def __init__(self, store) -> None:
        self._store = store
        self.refusals: list[Exception | None] = []
        self.ends = asyncio.Event()
        self.watches = 0

    async def list(self, kind, **narrowed):
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        return await self._store.list(kind, **narrowed)

    async def watch(self, _kind, _since, **_narrowed):
        self.watches += 1
        await self.ends.wait()
        self.ends.clear()
        raise Unavailable("the watch has ended")
        yield

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.mark.parametrize("refusal", [Forbidden("no right", hint=""), NotFound("no such kind")])
@pytest.mark.parametrize(("seconds", "told"), [([0, 19], []), ([0, 20], [False, True])])
async def test_only_a_refusal_that_lasts_changes_what_is_followed(store, refusal, seconds, told):
    """An API server that has just restarted refuses for a moment."""
    wire, clock, pauses, found = Weak(store), [0.0], [], []

    async def pause(asked):
        pauses.append(asked)
        clock[0] = 100.0 + seconds[min(len(pauses), len(seconds)) - 1]

    heartbeats = Heartbeats(wire, pause=pause, jitter=lambda: 1.0, seconds=lambda: clock[0])
    async with running(heartbeats):
        assert heartbeats.followed_in("default")
        heartbeats.on_followed(lambda: found.append(heartbeats.followed_in("default")))
        wire.refusals = [refusal] * len(seconds)
        wire.ends.set()
        async with asyncio.timeout(60):
            while wire.watches < 2:  # noqa: ASYNC110 - the fake store tells nobody
                await asyncio.sleep(0)
        assert found == told
        assert heartbeats.followed_in("default")


async def test_while_it_is_not_known_whether_a_refusal_lasts_the_store_is_asked_soon_again(store):
    wire, clock, pauses = Weak(store), [0.0], []
    over = asyncio.Event()

    async def pause(asked):
        pauses.append(asked)
        if len(pauses) == 12:
            over.set()
            await asyncio.Event().wait()
        clock[0] += asked

    heartbeats = Heartbeats(wire, pause=pause, jitter=lambda: 1.0, seconds=lambda: clock[0])
    async with running(heartbeats):
        wire.refusals = [Forbidden("no right", hint="")] * 20
        wire.ends.set()
        async with asyncio.timeout(60):
            await over.wait()
    followed = [one for one, at in zip(pauses, accumulated(pauses), strict=True) if at < 20]
    assert max(followed) <= 5
    assert max(pauses) > 5, "afterwards there is no hurry"


def accumulated(pauses):
    return [sum(pauses[:count]) for count in range(len(pauses))]


async def test_a_store_that_does_not_answer_confirms_nothing(store):
    wire = Refusing(store)
    wire.refusal = Unavailable("away")
    with pytest.raises(Unavailable):
        await Heartbeats(wire).is_still(KEY, ABSENT)


async def test_it_is_said_that_the_store_does_not_answer(store):
    wire, asked = Refusing(store), asyncio.Event()
    wire.refusal = Unavailable("the server is weak")

    async def pause(_seconds):
        asked.set()
        await asyncio.Event().wait()

    with capture_logs() as logs:
        task = asyncio.create_task(Heartbeats(wire, pause=pause).run())
        async with asyncio.timeout(60):
            await asked.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [(line["event"], line["reason"]) for line in logs] == [("heartbeats.interrupted", "the server is weak")]
