"""A cache of the whole pool: the next caller reads no build argument, command or log of the one before."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import aclosing

import pytest

from bkpool.buildkit import BuildEventType, connect
from bkpool.buildkit.stubs import control_pb2 as pb
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.errors import Unavailable, WorkerFailed
from bkpool.core.names import Slot
from bkpool.core.pool import Cache, Reuse
from bkpool.workers import DaemonState, history
from support.objects import pool as a_pool
from support.stub_control import StubControl, serve

pytestmark = pytest.mark.slow

SLOT = Slot("default", "default", 0)
POOL = a_pool(cache=Cache(reuse=Reuse.POOL))
SHARED = cache_owner_digest(Reuse.POOL, "ann", POOL.uid, "")
KEPT = cache_owner_digest(Reuse.POOL, "ann", POOL.uid, "", keep_history=True)
SECRET = "of-ann-7d1c"


async def no_report(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture
def build(buildctl, tmp_path):
    """Returns a function that makes a build with a secret in a build argument."""

    def make(endpoint: str) -> None:
        (tmp_path / "Dockerfile").write_text("FROM scratch\nARG KEY\nCOPY Dockerfile /$KEY\n")
        where = [f"--local={name}={tmp_path}" for name in ("context", "dockerfile")]
        command = [
            buildctl,
            f"--addr={endpoint}",
            "build",
            "--frontend=dockerfile.v0",
            f"--opt=build-arg:KEY={SECRET}",
        ]
        subprocess.run([*command, *where], check=True, capture_output=True)

    return make


@pytest.fixture
def histories(buildctl):
    """Returns a function that lists what a caller can read of the history."""

    def read(endpoint: str) -> str:
        command = [buildctl, f"--addr={endpoint}", "debug", "histories", "--format={{json .}}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return read


async def references(endpoint: str) -> list[str]:
    async with connect(endpoint) as client, aclosing(client.history(early_exit=True)) as events:
        return [event.record.ref async for event in events]


async def test_a_cleared_history_is_empty_and_the_daemon_runs_on(runtime, build, histories):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", SHARED, POOL, no_report)
    await asyncio.to_thread(build, endpoint)
    assert SECRET in await asyncio.to_thread(histories, endpoint)
    await runtime.daemons.clear_history(SLOT)
    assert await references(endpoint) == []
    assert runtime.daemons.observe()[SLOT].state is DaemonState.READY
    assert runtime.caches.owners() == {SLOT: SHARED}


async def test_a_start_on_the_cache_of_the_pool_begins_with_an_empty_history(runtime, build, histories):
    """Whoever has read one build makes buildkitd only hide it, and a restart shows it again."""
    endpoint = await runtime.daemons.start(SLOT, "uid-1", SHARED, POOL, no_report)
    await asyncio.to_thread(build, endpoint)
    (ref,) = await references(endpoint)
    async with connect(endpoint) as client, aclosing(client.history(ref=ref)) as events:
        assert (await anext(events)).record.ref == ref
    await runtime.daemons.clear_history(SLOT)
    assert SECRET not in await asyncio.to_thread(histories, endpoint)
    await runtime.daemons.stop(SLOT)
    endpoint = await runtime.daemons.start(SLOT, "uid-2", None, POOL, no_report)
    assert SECRET not in await asyncio.to_thread(histories, endpoint)
    assert await references(endpoint) == []


async def test_a_history_that_is_kept_stays_over_a_restart(runtime, build, histories):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", KEPT, POOL, no_report)
    await asyncio.to_thread(build, endpoint)
    await runtime.daemons.stop(SLOT)
    endpoint = await runtime.daemons.start(SLOT, "uid-1", KEPT, POOL, no_report)
    assert SECRET in await asyncio.to_thread(histories, endpoint)
    endpoint = await runtime.daemons.start(SLOT, "uid-1", SHARED, POOL, no_report)
    assert await references(endpoint) == [], "it is not kept any more, so the cache was wiped"


async def test_a_daemon_whose_history_cannot_be_cleared_is_ended(runtime, monkeypatch):
    await runtime.daemons.start(SLOT, "uid-1", SHARED, POOL, no_report)

    async def refuse(client: object) -> None:
        raise Unavailable("no answer")

    monkeypatch.setattr(history, "clear", refuse)
    await runtime.daemons.clear_history(SLOT)
    assert runtime.daemons.observe() == {}
    assert runtime.caches.owners() == {SLOT: SHARED}
    with pytest.raises(WorkerFailed, match="could not be cleared, so the cache was wiped: no answer"):
        await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)
    assert runtime.daemons.observe() == {}
    assert runtime.caches.owners() == {}
    await runtime.daemons.clear_history(SLOT)  # there is no daemon, so there is nothing to do
    await runtime.daemons.start(SLOT, "uid-1", None, POOL, no_report)


async def test_builds_that_still_run_are_waited_for(tmp_path):
    """The stub answers the first call as while a build runs, and the later ones as after its end."""
    started = pb.BuildHistoryEvent(type=pb.STARTED, record=pb.BuildHistoryRecord(Ref="a"))
    complete = pb.BuildHistoryEvent(type=pb.COMPLETE, record=pb.BuildHistoryRecord(Ref="a"))
    lists = [[started], [started, complete], [complete], []]

    class Running(StubControl):
        async def ListenBuildHistory(self, stream):  # noqa: N802 - BuildKit's name
            self.events = lists.pop(0)
            await super().ListenBuildHistory(stream)

    control = Running()
    async with serve(control, path=str(tmp_path / "s")), connect(f"unix://{tmp_path / 's'}") as client:
        await history.clear(client)
    early = [request.EarlyExit for request in control.requests if isinstance(request, pb.BuildHistoryRequest)]
    assert early == [True, False, True, True]
    deleted = [request for request in control.requests if isinstance(request, pb.UpdateBuildHistoryRequest)]
    assert deleted == [pb.UpdateBuildHistoryRequest(Ref="a", Delete=True)]
    assert BuildEventType.COMPLETE == pb.COMPLETE


async def test_a_build_that_does_not_end_is_no_empty_history(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "CLEAR_TIMEOUT", 0.05)
    control = StubControl(events=[pb.BuildHistoryEvent(type=pb.STARTED, record=pb.BuildHistoryRecord(Ref="a"))])
    async with serve(control, path=str(tmp_path / "s")), connect(f"unix://{tmp_path / 's'}") as client:
        with pytest.raises(Unavailable, match="the build history was not empty after"):
            await history.clear(client)
