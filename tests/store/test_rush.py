"""What comes after the answers that are being made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.store.mirror import Mirror, MirrorChange
from bkpool.store.rush import LONGEST, Rush
from bkpool.store.sqlite import SqliteStore
from support.objects import worker


class Timer:
    """A timer that ends when a test says so (`loop.call_later`)."""

    def __init__(self) -> None:
        self.set: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, seconds: float, function: Callable[[], None]) -> Timer:
        self.set.append((seconds, function))
        return self

    def cancel(self) -> None:
        self.set.clear()


def test_nothing_is_put_off_while_no_answer_is_made():
    done: list[str] = []
    Rush().afterwards(lambda: done.append("at once"))
    assert done == ["at once"]


def test_what_is_put_off_comes_after_the_last_answer_in_its_order():
    timer, done = Timer(), list[str]()
    rush = Rush(timer)
    rush.begins("a")
    rush.begins("b")
    rush.afterwards(lambda: done.append("first"))
    rush.afterwards(lambda: done.append("second"))
    rush.ends("a")
    rush.ends("a")
    assert done == []
    rush.ends("b")
    assert (done, timer.set) == (["first", "second"], [])
    assert not rush.is_on


def test_it_is_put_off_for_a_moment_at_most_however_many_answers_follow():
    timer, done = Timer(), list[str]()
    rush = Rush(timer)
    rush.begins("a")
    rush.afterwards(lambda: done.append("first"))
    rush.begins("b")
    rush.afterwards(lambda: done.append("second"))
    ((seconds, ended),) = timer.set
    assert seconds == LONGEST
    ended()
    assert (done, rush.is_on) == (["first", "second"], True)


@pytest.fixture
async def mirror(tmp_path):
    store = await SqliteStore.open(tmp_path / "state.db")
    yield Mirror(store)
    await store.close()


def changed(number: int, version: int):
    made = worker(number)
    return made.but(metadata=made.metadata.but(resource_version=str(version), uid=f"uid-{number}"))


async def test_who_subscribes_for_afterwards_gets_each_change_once(mirror):
    at_once, afterwards = list[Slot | None](), list[Slot | None]()
    mirror.subscribe(lambda change: at_once.append(change.slot))
    end = mirror.subscribe_afterwards(lambda change: afterwards.append(change.slot))
    slots = [changed(number, 1).slot for number in range(2)]

    mirror.apply(changed(0, 1))
    assert (at_once, afterwards) == (slots[:1], slots[:1])
    mirror.rush.begins("a")
    for number, version in ((0, 2), (1, 3), (0, 4)):
        mirror.apply(changed(number, version))
    assert at_once == [slots[0], slots[0], slots[1], slots[0]]
    assert afterwards == slots[:1]
    mirror.rush.ends("a")
    assert afterwards == [slots[0], slots[0], slots[1]]

    mirror.rush.begins("b")
    mirror.apply(changed(1, 5))
    end()
    mirror.rush.ends("b")
    assert len(afterwards) == 3, "nobody is told who has unsubscribed"


async def test_changes_of_pools_are_put_off_too(mirror):
    afterwards: list[MirrorChange] = []
    mirror.subscribe_afterwards(afterwards.append)
    mirror.rush.begins("a")
    pool = Pool(metadata=Metadata(name="p", uid="u", resource_version="1"))
    mirror.apply(pool)
    mirror.rush.ends("a")
    assert afterwards == [MirrorChange(pool.key)]
