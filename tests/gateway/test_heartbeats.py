"""One heartbeat renews the registrations of all leases of a gateway, and is relied on no longer than is safe."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.core import tokens
from bkpool.core.errors import Gone, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key
from bkpool.core.worker import EndReason
from bkpool.gateway.control.heartbeat_writer import HeartbeatWriter
from bkpool.gateway.session.lease_heartbeat import LeaseHeartbeat, next_beat
from bkpool.gateway.session.lease_table import WorkerLeases
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.store.sqlite import SqliteStore
from support.loops import SkewedLoop
from support.recording_registry import RecordingRegistry

REFUSED = Unavailable("this gateway's heartbeat is refused")


def calls(world):
    return [what for what, _ in world.registry.calls]


async def use(world, name="a"):
    """Opens a connection with a lease of this name."""
    streams = await world.connect(world.lease(name))
    await streams.echo(b"x")
    return streams


async def leave(world, *streams):
    for one in streams:
        one.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 0)


async def beats(world, *seconds):
    """Lets time pass in these steps, and waits for a heartbeat after each."""
    for step in seconds:
        before = len(world.registry.beats)
        await world.advance(step)
        await world.registry.wait_for_beats(before + 1)
        await world.settle()


async def test_one_heartbeat_names_all_leases_in_use_whenever_they_were_registered(world):
    for name in ("a", "b", "c"):
        await use(world, name)
        await world.advance(5)
    await use(world, "a")
    await beats(world, 5)
    assert world.registry.beats == [{"allocation-a": 2, "allocation-b": 1, "allocation-c": 1}]


async def test_while_heartbeats_are_written_nothing_else_renews_a_lease_and_it_is_dialled_from_memory(world):
    await use(world)
    await beats(world, *[20] * 10)
    await use(world)
    assert calls(world) == ["register"]


async def test_where_heartbeats_are_refused_each_lease_is_renewed_on_its_worker(world):
    world.registry.beat_error = REFUSED
    await use(world)
    for count in (1, 2, 3):
        await world.advance(30)
        await world.registry.wait_for("renew", count)
        await world.settle()
    await use(world)
    assert set(calls(world)) == {"register", "renew"}
    assert calls(world).count("register") == 1


async def test_a_heartbeat_is_tried_again_soon_and_then_the_next_one_comes_in_time(world):
    await use(world)
    world.registry.beat_error = REFUSED
    await beats(world, 20)
    world.registry.beat_error = None
    await beats(world, 5, 15)
    assert len(world.registry.beats) == 3
    assert calls(world) == ["register"]


async def test_an_answer_that_comes_too_late_is_not_relied_on(new_world):
    """The controller may have taken the lease off its worker before the heartbeat was written."""
    world = await new_world(renew_interval=1000.0)
    await use(world)
    world.registry.may_answer.clear()
    await world.advance(20)
    await world.advance(31)  # it is 51 s since the registration
    world.registry.may_answer.set()
    await world.registry.wait_for_beats(1)
    await world.settle()
    await use(world)
    assert calls(world) == ["register", "register"]


async def test_an_answer_in_time_counts_from_when_the_heartbeat_was_put_together(new_world):
    world = await new_world(renew_interval=1000.0)
    await use(world)
    world.registry.may_answer.clear()
    await world.advance(20)
    await world.advance(29)
    world.registry.may_answer.set()
    await world.registry.wait_for_beats(1)
    await world.settle()
    world.registry.error = Unavailable("the store is away")
    await world.advance(20)  # 49 s since it was put together
    await use(world)
    await world.advance(2)
    code, _ = await (await world.connect(world.lease())).call()
    assert code == 9, "it is not registered any more"


async def test_after_a_gap_each_lease_is_renewed_on_its_worker_before_anything_else_is_dialled(world):
    """The gateway was frozen, or cut off. Its established connection is cut if another lease holds the worker."""
    first = await use(world)
    world.registry.error = Unavailable("the store is away")
    await world.advance(60)
    world.registry.error = None
    await world.advance(5)
    await world.registry.wait_for_beats(2)
    await world.settle()
    assert "renew" in calls(world)
    world.registry.error = Gone("another lease holds the worker", hint="")
    await world.advance(60)
    assert await first.read_to_end() == b""


async def test_a_lease_without_connections_is_named_as_long_as_it_is_relied_on_and_no_longer(world):
    """A reader may have missed the heartbeat that renewed it last."""
    await use(world, "kept")
    first = await use(world)
    await beats(world, 20)
    first.writer.close()
    await world.wait_until(lambda: world.metric("active_connections") == 1)
    await beats(world, 20, 20)
    assert [beat.get("allocation-a") for beat in world.registry.beats] == [1, 0, 0]
    await beats(world, 20)  # 60 s since the last one with connections
    assert world.registry.beats[-1] == {"allocation-kept": 1}
    await use(world)
    assert world.registry.calls.count(("register", "allocation-a")) == 2


async def test_when_no_lease_is_left_the_gateway_says_so_once_and_beats_no_more(world):
    streams = await use(world)
    await beats(world, 20)
    await leave(world, streams)
    world.end_lease("a", EndReason.RELEASED)
    await world.registry.wait_for("withdraw")
    await beats(world, 20)
    await world.advance(20)
    await world.advance(20)
    assert world.registry.beats == [{"allocation-a": 1}, {}]
    await use(world, "b")
    await beats(world, 20)
    assert world.registry.beats[-1] == {"allocation-b": 1}


async def test_a_lease_that_is_registered_late_is_named_too(world):
    """At the moment of a heartbeat, its registration was on its way to the store."""
    await world.advance(15)
    world.registry.may_answer.clear()
    streams = await world.connect(world.lease())
    await world.wait_until(lambda: world.registry.connections == [1])
    await world.advance(5)
    world.registry.may_answer.set()
    await streams.echo(b"x")
    await beats(world, 20)
    assert world.registry.beats == [{"allocation-a": 1}]


@pytest.mark.parametrize("revoked", [False, True])
async def test_connections_are_cut_as_soon_as_the_table_says_that_the_lease_has_left_its_worker(world, revoked):
    """It leaves only when nobody is registered, so this gateway has lost its registration."""
    streams = await use(world)
    world.end_lease("a", EndReason.REVOKED if revoked else EndReason.RELEASED)
    assert await streams.read_to_end() == b""


async def test_a_worker_that_only_vanishes_from_view_costs_no_connection(world):
    """Somebody has removed its label. It still has the lease, so one renewal by its name says that all is well."""
    streams = await use(world)
    token = world.lease()
    world.forget_lease("a")
    await world.registry.wait_for("renew")
    await world.settle()
    await streams.echo(b"still here")
    code, message = await (await world.connect(token)).call()
    assert (code, "no lease has the token" in message) == (16, True), "the table does not have it"
    world.lease()
    await use(world)
    assert calls(world) == ["register", "renew"]


async def test_a_worker_that_is_gone_from_view_and_from_the_store_is_cut(world):
    streams = await use(world)
    world.registry.error = Gone("the worker was deleted", hint="")
    world.forget_lease("a")
    assert await streams.read_to_end() == b""
    assert calls(world)[:2] == ["register", "renew"]


async def test_a_worker_that_is_gone_from_view_while_the_store_is_away_is_asked_for_until_it_answers(world):
    streams = await use(world)
    world.registry.error = Unavailable("the store is away")
    world.forget_lease("a")
    await world.registry.wait_for("renew")
    await world.settle()
    await streams.echo(b"still here")
    world.registry.error = Gone("the worker was deleted", hint="")
    await world.advance(5)
    assert await streams.read_to_end() == b""


async def test_a_request_that_runs_when_the_worker_vanishes_does_not_answer_for_it(new_world):
    world = await new_world(renew_interval=5.0)
    streams = await use(world)
    world.registry.may_answer.clear()
    await world.advance(5)
    await world.wait_until(lambda: len(world.registry.connections) == 2)
    world.forget_lease("a")
    await world.settle()
    world.registry.may_answer.set()
    await world.registry.wait_for("renew", 2)
    await world.settle()
    await streams.echo(b"still here")


async def test_another_lease_on_the_worker_cuts_at_once(world):
    """The earlier one is not remembered there any more."""
    streams = await use(world)
    world.lease("b", worker=Key("default", "p-worker-0"))
    world.registry.may_answer.clear()
    world.send_worker(Key("default", "p-worker-0"), WorkerLeases(world._routes[tokens.digest(world.token("b"))]))
    assert await streams.read_to_end() == b""


class Answers:
    """A registry whose heartbeat is answered when the test says so."""

    def __init__(self):
        self.on_done = None

    def beat(self, _leases, on_done):
        self.on_done = on_done


class Named:
    def connections_for_heartbeat(self):
        return 1

    def renewed_by_heartbeat(self, _asked_at, _asked_at_wall):
        pass


@pytest.mark.parametrize("error", [None, REFUSED])
async def test_a_heartbeat_that_is_answered_after_the_end_is_the_last_one(error):
    """The loop closes. A timer would be left in it."""
    loop, registry = SkewedLoop(), Answers()
    heartbeat = LeaseHeartbeat(loop, registry, GatewayLimits(), lambda: [("lease", Named())], lambda: 0.0)
    try:
        heartbeat.start()
        (timer,) = loop._scheduled
        timer.cancel()
        heartbeat._beat()
        heartbeat.stop()
        registry.on_done(error)
        heartbeat.start()
        assert [one for one in loop._scheduled if not one.cancelled()] == []
    finally:
        loop.close()


def test_loops_beat_at_the_same_moments():
    limits = GatewayLimits(heartbeat_phase=3.0)
    assert [next_beat(now, limits) for now in (0.0, 2.9, 3.0, 22.9, 23.0, 1e6)] == [3, 3, 23, 23, 43, 1000003]


class StoredBeats(RecordingRegistry):
    """A recording registry whose heartbeats are written to a store."""

    def __init__(self, writer):
        super().__init__()
        self._writer = writer

    async def beat(self, loop, leases):
        await self._writer.write(loop, leases)
        await super().beat(loop, leases)


async def test_all_loops_of_a_gateway_share_one_write(new_world, tmp_path, now, monkeypatch):
    store = await SqliteStore.open(tmp_path / "state.db")
    written, may_write = [], asyncio.Event()
    replace_status = store.replace_status

    async def counted(obj):
        written.append(dict(obj.status.leases))
        return await replace_status(obj)

    monkeypatch.setattr(store, "replace_status", counted)
    await store.create(GatewayHeartbeat.model_validate({"metadata": {"name": "g"}}))

    async def gather(_seconds):
        await may_write.wait()

    writer = HeartbeatWriter(store, Key("default", "g"), lambda: now, pause=gather)
    try:
        registry = StoredBeats(writer)
        world = await new_world(registry=registry, threads=4)
        world.registry = registry
        names = [f"n{number}" for number in range(12)]
        for name in names:
            await use(world, name)
        await world.advance(20)
        await world.wait_until(lambda: len(writer._leases) > 1)
        await world.settle()
        may_write.set()
        loops = len(writer._leases)
        await registry.wait_for_beats(loops)
        assert loops > 1
        assert written == [{f"allocation-{name}": 1 for name in names}] or len(written) < loops
        assert sorted(written[-1]) == sorted(f"allocation-{name}" for name in names)
    finally:
        may_write.set()
        await world.gateway.close()
        await store.close()
