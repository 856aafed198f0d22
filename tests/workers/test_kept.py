from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

import pytest

from bkpool.core.errors import BkpoolError, Forbidden, Gone, Unavailable
from bkpool.core.names import Key
from bkpool.workers.pods.kept import Copy, Kept

A = Key("ns", "p-worker-0")


def doc(version: int, key: Key = A, **more: object):
    return {"metadata": {"namespace": key.namespace, "name": key.name, "resourceVersion": str(version), **more}}


def event(kind: str, version: int, key: Key = A):
    return {"type": kind, "object": doc(version, key)}


# --- the copy -------------------------------------------------------------------------------------------------------


def test_what_was_written_here_is_known_at_once_and_never_goes_back():
    copy = Copy()
    copy.listed([], "5")
    assert copy.applied(doc(7)) == [A]
    assert copy.applied(doc(6)) == copy.followed(event("MODIFIED", 6)) == []
    assert copy.items[A]["metadata"]["resourceVersion"] == "7"


def test_what_is_gone_does_not_come_back_by_an_older_write():
    copy = Copy()
    copy.listed([doc(3)], "5")
    assert copy.followed(event("DELETED", 9)) == [A]
    assert copy.applied(doc(8)) == []
    assert copy.items == {}
    assert copy.applied(doc(10)) == [A]
    assert copy.followed(event("DELETED", 9)) == []  # of the one before


def test_a_new_listing_ends_what_is_not_in_it_but_not_what_is_newer():
    copy = Copy()
    copy.listed([doc(1)], "2")
    other = Key("ns", "p-worker-1")
    copy.applied(doc(9, other))
    assert copy.listed([], "5") == [A]
    assert set(copy.items) == {other}


def test_a_bookmark_only_moves_the_version():
    copy = Copy()
    assert copy.followed({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "40"}}}) == []
    assert copy.seen == 40


# --- list and watch -------------------------------------------------------------------------------------------------


class Script:
    """An API server that says what it is told to say: lists, and watches that end with an error."""

    def __init__(self, lists: Iterable[object], watches: Iterable[tuple[list[object], BkpoolError | None]]) -> None:
        self.lists, self.watches = list(lists), list(watches)
        self.asked: list[str] = []
        self.moved = asyncio.Event()

    async def list(self, path: str, **params: str):
        self.asked.append(path)
        self.moved.set()
        said = self.lists.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said

    async def watch(self, path: str, since: str, **params: str) -> AsyncGenerator[object, None]:
        self.asked.append(since)
        self.moved.set()
        if not self.watches:
            await asyncio.Event().wait()
        events, error = self.watches.pop(0)
        for said in events:
            yield said
        if error:
            raise error


async def no_pause(_seconds: float) -> None:
    pass


async def follow(script: Script, done) -> tuple[Kept, list[Key]]:
    changed: list[Key] = []

    def note(key: Key) -> None:
        changed.append(key)
        script.moved.set()

    kept = Kept(script, "pods", None, note, pause=no_pause)
    task = asyncio.create_task(kept.run())
    async with asyncio.timeout(5):
        while not done(kept):
            await script.moved.wait()
            script.moved.clear()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return kept, changed


async def test_a_watch_that_ended_well_goes_on_where_it_was_and_a_failed_one_lists_anew():
    script = Script(
        lists=[([doc(1)], "5"), Unavailable("away"), ([], "20")],
        watches=[([event("MODIFIED", 6)], None), ([event("MODIFIED", 7)], Gone("too old"))],
    )
    _, changed = await follow(script, lambda kept: kept.ready.is_set() and kept.get(A) is None and not script.watches)
    assert script.asked == ["/api/v1/pods", "5", "6", "/api/v1/pods", "/api/v1/pods", "20"]
    assert changed == [A] * 4


async def test_a_watch_that_ends_at_once_without_a_word_is_no_reason_to_spin():
    script = Script(lists=[([], "5"), ([], "6")], watches=[([], None)])
    await follow(script, lambda _kept: script.asked[-1:] == ["6"])
    assert script.asked == ["/api/v1/pods", "5", "/api/v1/pods", "6"]


async def test_a_missing_right_is_told_at_the_beginning_only():
    with pytest.raises(Forbidden):
        await Kept(Script([Forbidden("no")], []), "pods", None, print, pause=no_pause).run()
    script = Script([([], "5"), Forbidden("no"), ([doc(8)], "9")], [([], Gone("old"))])
    kept, _ = await follow(script, lambda kept: kept.get(A) is not None)
    assert kept.ready.is_set()


async def test_whoever_waits_for_an_object_is_woken_by_its_change():
    kept = Kept(Script([], []), "pods", None, lambda _key: None)
    waiting = asyncio.create_task(kept.until(A, lambda found: found is not None))
    await asyncio.sleep(0)
    kept.apply(doc(1))
    async with asyncio.timeout(5):
        await waiting
    assert list(kept) == [doc(1)]


async def test_with_namespaces_each_is_followed_by_itself():
    script = Script([([doc(1)], "5"), ([], "5")], [])
    changed: list[Key] = []
    kept = Kept(script, "pods", ["ns", "other"], changed.append)
    task = asyncio.create_task(kept.run())
    async with asyncio.timeout(5):
        await kept.ready.wait()
    assert sorted(path for path in script.asked if "/" in path) == [
        "/api/v1/namespaces/ns/pods",
        "/api/v1/namespaces/other/pods",
    ]
    assert kept.get(Key("elsewhere", "p-worker-0")) is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
