"""The heartbeat of a gateway over a real store, and over one that refuses it."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from bkpool.core.errors import Conflict, Forbidden, NotFound, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import LABEL_POOL, Key
from bkpool.gateway.control.heartbeat_writer import HeartbeatWriter, heartbeat_name
from bkpool.store.sqlite import SqliteStore

KEY, POOL = Key("team", "g"), Key("team", "p")


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


class Counted:
    """The real store. It counts requests, and may refuse them."""

    def __init__(self, store):
        self._store = store
        self.requests = []
        self.error = None
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def get(self, kind, namespace, name):
        self._note("get")
        return await self._store.get(kind, namespace, name)

    async def create(self, obj):
        self._note("create")
        return await self._store.create(obj)

    async def replace_status(self, obj):
        self._note("put")
        await self.may_write.wait()
        return await self._store.replace_status(obj)

    def _note(self, what):
        self.requests.append(what)
        if self.error is not None:
            raise self.error


@pytest.fixture
def counted(store):
    return Counted(store)


class Time:
    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def writer(counted, now, time):
    async def pause(_seconds):
        await asyncio.sleep(0)

    return HeartbeatWriter(
        counted, KEY, lambda: now + timedelta(seconds=time.seconds), pool=POOL, seconds=time, pause=pause
    )


async def leases(store):
    return (await store.get(GatewayHeartbeat, *KEY)).status.leases


async def test_the_object_is_made_once_and_then_each_heartbeat_is_one_write(store, writer, counted, time, now):
    await writer.write("loop", {"a": 1})
    made = await store.get(GatewayHeartbeat, *KEY)
    assert (made.status.leases, made.status.renewed_at) == ({"a": 1}, now)
    assert made.metadata.labels[LABEL_POOL] == "p"
    assert (made.spec.pool_ref.namespace, made.spec.pool_ref.name) == POOL
    counted.requests.clear()
    time.seconds = 20
    await writer.write("loop", {"a": 2, "b": 1})
    assert counted.requests == ["put"]
    found = await store.get(GatewayHeartbeat, *KEY)
    assert (found.status.leases, found.status.renewed_at) == ({"a": 2, "b": 1}, now + timedelta(seconds=20))


async def test_what_the_loops_name_at_one_moment_is_one_write(store, writer, counted):
    await asyncio.gather(*(writer.write(number, {f"lease-{number}": 1}) for number in range(4)))
    assert counted.requests == ["get", "create"]
    assert await leases(store) == {f"lease-{number}": 1 for number in range(4)}


async def test_what_another_loop_has_named_last_is_kept(store, writer):
    await writer.write("one", {"a": 1})
    await writer.write("two", {"b": 1})
    assert await leases(store) == {"a": 1, "b": 1}
    await writer.write("one", {})
    assert await leases(store) == {"b": 1}


async def test_who_comes_during_a_write_waits_for_the_next_one(store, writer, counted):
    await writer.write("one", {"a": 1})
    counted.may_write.clear()
    first = asyncio.create_task(writer.write("one", {"a": 2}))
    while counted.requests[-1] != "put":  # noqa: ASYNC110 - the next iteration of the loop may have written it
        await asyncio.sleep(0)
    second = asyncio.create_task(writer.write("two", {"b": 1}))
    await asyncio.sleep(0)
    counted.may_write.set()
    await first
    assert not second.done()
    await second
    assert await leases(store) == {"a": 2, "b": 1}


async def test_one_who_gives_up_does_not_end_the_write_for_the_others(store, writer, counted):
    await writer.write("one", {"a": 1})
    counted.may_write.clear()
    impatient = asyncio.create_task(writer.write("one", {"a": 2}))
    patient = asyncio.create_task(writer.write("two", {"b": 1}))
    await asyncio.sleep(0)
    impatient.cancel()
    counted.may_write.set()
    await patient
    assert await leases(store) == {"a": 2, "b": 1}


async def test_an_object_that_was_deleted_or_changed_is_written_all_the_same(store, writer):
    await writer.write("loop", {"a": 1})
    await store.delete(GatewayHeartbeat, *KEY)
    await writer.write("loop", {"a": 2})
    assert await leases(store) == {"a": 2}
    found = await store.get(GatewayHeartbeat, *KEY)
    await store.replace(found.but(metadata=found.metadata.but(annotations={"by": "somebody"})))
    await writer.write("loop", {"a": 3})
    assert await leases(store) == {"a": 3}


@pytest.mark.parametrize("error", [Forbidden("no right", hint=""), NotFound("no such kind")])
async def test_where_it_is_refused_it_is_tried_again_after_a_minute(store, writer, counted, time, error):
    counted.error = error
    with pytest.raises(Unavailable, match="is refused"):
        await writer.write("loop", {"a": 1})
    counted.error, asked = None, len(counted.requests)
    time.seconds = 59
    with pytest.raises(Unavailable):
        await writer.write("loop", {"a": 1})
    assert len(counted.requests) == asked
    time.seconds = 60
    await writer.write("loop", {"a": 1})
    assert await leases(store) == {"a": 1}


async def test_a_store_that_is_away_is_asked_again_at_once(store, writer, counted):
    counted.error = Unavailable("away")
    with pytest.raises(Unavailable, match="away"):
        await writer.write("loop", {"a": 1})
    counted.error = None
    await writer.write("loop", {"a": 1})
    assert await leases(store) == {"a": 1}


async def test_endless_conflicts_are_an_error(writer, counted):
    counted.error = Conflict("another was faster")
    with pytest.raises(Unavailable, match="changes too often"):
        await writer.write("loop", {"a": 1})


async def test_nothing_is_written_while_nobody_is_known_to_follow_it(store, now):
    counted, follows = Counted(store), []
    writer = HeartbeatWriter(counted, KEY, lambda: now, allowed=lambda: bool(follows))
    with pytest.raises(Unavailable, match="nobody follows"):
        await writer.write("loop", {"a": 1})
    assert counted.requests == []
    follows.append(True)
    await writer.write("loop", {"a": 1})
    assert await leases(store) == {"a": 1}


def test_the_heartbeat_has_the_name_of_its_gateway_where_that_can_be_one():
    assert heartbeat_name("p-gateway-5d-x2") == "p-gateway-5d-x2"
    names = {heartbeat_name(host) for host in ("Host.Example", "host.example", "h" * 64)}
    assert len(names) == 3
    assert {name[:8] for name in names} == {"gateway-"}
