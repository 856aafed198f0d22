"""The reflector against a scripted API server: what it does when a list or a watch fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager

import pytest

from bkpool.core.errors import BkpoolError, Forbidden, Gone, Unavailable
from bkpool.core.names import Key
from bkpool.kube import KubeLimits, watching
from bkpool.kube.reflector import Change, KubeCollection, Reflector
from support.captured_logs import capture_logs

A, B = Key("ns", "a"), Key("ns", "b")
PODS = KubeCollection("v1", "pods", label_selector="x=y")


def doc(version: int, key: Key = A, **more: object):
    return {"metadata": {"namespace": key.namespace, "name": key.name, "resourceVersion": str(version), **more}}


def event(kind: str, version: int, key: Key = A, **more: object):
    return {"type": kind, "object": doc(version, key, **more)}


def bookmark(version: int):
    return {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}


class Script:
    """An API server with prepared answers: lists, and watches that end in good order or with an error.

    When the prepared watches are used up, a watch stays open and sends nothing.
    """

    def __init__(self, lists: Iterable[object], watches: Iterable[tuple[list[object], BkpoolError | None]]) -> None:
        self.lists, self.watches = list(lists), list(watches)
        self.asked: list[str] = []
        self.params: list[dict[str, str]] = []
        self.moved = asyncio.Event()
        self.limits = KubeLimits()

    @property
    def last(self) -> str:
        """What was asked last: the path of a list, or the version of a watch."""
        return self.asked[-1] if self.asked else ""

    async def list(self, path: str, **params: str):
        self.asked.append(path)
        self.params.append(params)
        self.moved.set()
        answer = self.lists.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def watch(self, path: str, since: str, **params: str) -> AsyncGenerator[object, None]:
        self.asked.append(since)
        self.params.append(params)
        self.moved.set()
        if not self.watches:
            await asyncio.Event().wait()
        events, error = self.watches.pop(0)
        for one in events:
            yield one
        if error:
            raise error

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.moved.clear()
                await self.moved.wait()


class Followed:
    """A reflector that runs, with what it reported and how long it paused."""

    def __init__(self, script: Script, collection: KubeCollection = PODS, **options) -> None:
        self.script = script
        self.changes: list[Change] = []
        self.pauses: list[float] = []
        options = {"jitter": lambda: 1.0, "pause": self.pause} | options
        self.reflector = Reflector(script, collection, self.note, **options)

    def note(self, change: Change) -> None:
        self.changes.append(change)
        self.script.moved.set()

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    @property
    def seen(self) -> list[tuple[str, int, bool]]:
        return [
            (change.key.name, int(change.doc["metadata"]["resourceVersion"]), change.deleted)
            for change in self.changes
        ]


@asynccontextmanager
async def followed(script: Script, **options):
    world = Followed(script, **options)
    task = asyncio.create_task(world.reflector.run())
    yield world
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_that_ended_normally_continues_and_a_failed_one_lists_again():
    script = Script(
        lists=[([doc(1)], "5"), Unavailable("away"), ([], "20")],
        watches=[([event("MODIFIED", 6)], None), ([event("MODIFIED", 7)], Gone("too old"))],
    )
    async with followed(script) as world:
        await script.until(lambda: script.last == "20")
    assert script.asked == ["/api/v1/pods", "5", "6", "/api/v1/pods", "/api/v1/pods", "20"]
    assert world.seen == [("a", 1, False), ("a", 6, False), ("a", 7, False), ("a", 7, True)]
    assert all(params.get("labelSelector") == "x=y" for params in script.params)


async def test_an_expired_watch_lists_again_and_reports_only_what_changed_meanwhile():
    script = Script(
        lists=[([doc(1), doc(2, B)], "5"), ([doc(1), doc(9, B)], "10")],
        watches=[([], Gone("the version is too old"))],
    )
    with capture_logs() as logs:
        async with followed(script) as world:
            await script.until(lambda: script.last == "10")
    assert world.seen == [("a", 1, False), ("b", 2, False), ("b", 9, False)]
    assert [line["event"] for line in logs] == ["reflector.interrupted", "reflector.resumed"]
    assert logs[0]["path"] == "/api/v1/pods"


async def test_a_bookmark_moves_the_point_where_the_next_watch_begins():
    script = Script([([], "5")], [([bookmark(40)], None)])
    async with followed(script) as world:
        await script.until(lambda: script.last == "40")
    assert script.asked == ["/api/v1/pods", "5", "40"]
    assert world.pauses == []


async def test_a_watch_that_ends_at_once_without_an_event_is_no_reason_to_spin():
    script = Script(lists=[([], "5"), ([], "6")], watches=[([], None)])
    async with followed(script) as world:
        await script.until(lambda: script.last == "6")
    assert script.asked == ["/api/v1/pods", "5", "/api/v1/pods", "6"]
    assert world.pauses == [0.1]


async def test_a_bookmark_without_news_does_not_hide_that_the_watch_ends_at_once():
    script = Script(lists=[([], "5"), ([], "6")], watches=[([bookmark(5)], None)])
    async with followed(script) as world:
        await script.until(lambda: script.last == "6")
    assert len(world.pauses) == 1


async def test_a_watch_that_was_silent_for_longer_continues_at_its_version(monkeypatch):
    monkeypatch.setattr(watching, "SHORTEST_WATCH", -1.0)
    script = Script(lists=[([], "5")], watches=[([], None), ([event("ADDED", 6)], None)])
    async with followed(script) as world:
        await script.until(lambda: world.changes)
    assert script.asked[:3] == ["/api/v1/pods", "5", "5"]


async def test_a_frozen_watch_lists_again():
    script = Script([([], "5"), ([doc(8)], "9")], [([], Unavailable("no byte for 100 s"))])
    async with followed(script) as world:
        await script.until(lambda: world.changes)
    assert world.seen == [("a", 8, False)]


async def test_a_server_that_can_be_listed_but_not_watched_is_asked_ever_more_slowly():
    script = Script([([], "5")] * 12, [([], Unavailable("away"))] * 11)
    async with followed(script, longest_pause=15.0) as world:
        await script.until(lambda: not script.watches and script.last == "5")
    assert world.pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert max(world.pauses) == 15.0


async def test_an_event_ends_the_back_off():
    script = Script([([], "5")] * 4, [([], Unavailable("away"))] * 2 + [([event("ADDED", 6)], Unavailable("away"))])
    async with followed(script) as world:
        await script.until(lambda: len(script.asked) == 8)
    assert world.pauses == pytest.approx([0.1, 0.2, 0.1])


async def test_a_missing_right_is_raised_at_the_beginning_only_and_only_where_that_is_wanted():
    with pytest.raises(Forbidden):
        await Followed(Script([Forbidden("no")], []), fail_fast=True).reflector.run()

    script = Script([([], "5"), Forbidden("no"), ([doc(8)], "9")], [([], Gone("old"))])
    async with followed(script, fail_fast=True) as world:
        await script.until(lambda: world.changes)
        assert world.reflector.ready.is_set()

    script = Script([Forbidden("no"), ([doc(8)], "9")], [])
    async with followed(script) as world:
        await script.until(lambda: world.changes)
        assert world.reflector.ready.is_set()


async def test_a_replaced_object_is_reported_with_its_new_uid():
    script = Script(
        [([doc(1, uid="old")], "5")], [([event("DELETED", 6, uid="old"), event("ADDED", 7, uid="new")], None)]
    )
    async with followed(script) as world:
        await script.until(lambda: len(world.changes) == 3)
    assert [(change.doc["metadata"]["uid"], change.deleted) for change in world.changes] == [
        ("old", False),
        ("old", True),
        ("new", False),
    ]
    assert world.reflector.get(A)["metadata"]["uid"] == "new"


async def test_events_that_are_older_than_what_was_applied_are_ignored():
    script = Script([([], "5")], [([event("ADDED", 6), event("MODIFIED", 8)], None)])
    world = Followed(script)
    world.reflector.apply(doc(8))
    task = asyncio.create_task(world.reflector.run())
    await script.until(lambda: script.last == "8")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert world.seen == [("a", 8, False)]


async def test_what_was_applied_and_deleted_while_no_watch_was_open_is_reported_by_the_next_list():
    script = Script([([], "5"), ([], "12")], [([], Unavailable("away"))])
    released = asyncio.Event()

    async def pause(_seconds: float) -> None:
        await released.wait()

    async with followed(script, pause=pause) as world:
        await script.until(lambda: script.last == "5")
        world.reflector.apply(doc(9))
        released.set()
        await script.until(lambda: len(world.changes) == 2)
    assert world.seen == [("a", 9, False), ("a", 9, True)]


async def test_one_odd_document_and_one_failing_callback_end_nothing():
    script = Script([([{"metadata": {}}], "5"), ([doc(1), doc(2, B)], "6")], [])
    changes: list[Key] = []

    def on_change(change: Change) -> None:
        changes.append(change.key)
        if change.key == A:
            raise KeyError("a bug")

    async def no_pause(_seconds: float) -> None:
        await asyncio.sleep(0)

    reflector = Reflector(script, PODS, on_change, pause=no_pause)
    with capture_logs() as logs:
        task = asyncio.create_task(reflector.run())
        await script.until(lambda: script.last == "6")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert changes == [A, B]
    assert [line["event"] for line in logs] == [
        "reflector.crashed",
        "reflector.callback_failed",
        "reflector.resumed",
    ]


async def test_a_task_that_waits_for_an_object_is_woken_by_its_change():
    world = Followed(Script([], []))
    waiting = asyncio.create_task(world.reflector.until(A, lambda found: found is not None))
    await asyncio.sleep(0)
    world.reflector.apply(doc(1))
    async with asyncio.timeout(60):
        assert await waiting == doc(1)
    assert list(world.reflector) == [doc(1)]


async def test_versions_of_an_object_skip_what_a_slow_reader_missed_and_its_absence():
    script = Script([([], "5")], [])
    async with followed(script) as world, aclosing(world.reflector.versions(A)) as versions, asyncio.timeout(60):
        await world.reflector.ready.wait()
        first = asyncio.create_task(anext(versions))
        await asyncio.sleep(0)
        world.reflector.apply(doc(6))
        assert await first == doc(6)
        world.reflector.apply(doc(7))
        world.reflector.apply(doc(8))
        assert await anext(versions) == doc(8)


async def test_with_namespaces_each_is_followed_by_itself():
    script = Script([([doc(1)], "5"), ([], "5")], [])
    async with followed(script, namespaces=["ns", "other"]) as world:
        async with asyncio.timeout(60):
            await world.reflector.ready.wait()
        assert sorted(path for path in script.asked if "/" in path) == [
            "/api/v1/namespaces/ns/pods",
            "/api/v1/namespaces/other/pods",
        ]
        assert world.reflector.get(Key("elsewhere", "a")) is None
        world.reflector.apply(doc(3, Key("elsewhere", "a")))
        assert len(world.changes) == 1


def test_a_collection_of_another_group_has_its_own_path():
    deployments = KubeCollection("apps/v1", "deployments", field_selector="metadata.name=a")
    assert deployments.path("ns") == "/apis/apps/v1/namespaces/ns/deployments"
    assert deployments.params == {"fieldSelector": "metadata.name=a"}
