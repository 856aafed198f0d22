"""No run of the garbage collector goes through many objects, and nothing that it misses stays for ever."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from bkpool.appliance import garbage


class EndOfTest(Exception):
    pass


class Node:
    other: Node


@pytest.fixture(autouse=True)
def _nothing_set_apart():
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _set_apart_as_before():
    """The root's conftest.py sets apart what all tests share."""
    yield
    gc.collect()
    gc.freeze()


def gone_through(count: int) -> list[int]:
    """The objects that each full collection went through while so many were made that live on."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            found.append(sum(len(gc.get_objects(generation)) for generation in range(3)))

    gc.callbacks.append(note)
    try:
        kept: list[Any] = [[] for _ in range(count)]
        assert kept
    finally:
        gc.callbacks.remove(note)
    return found


def test_no_collection_goes_through_many_objects():
    with garbage.short_pauses():
        found = gone_through(300_000)
    assert len(found) > 10
    assert max(found) < 10_000


def test_a_cycle_that_was_set_apart_goes_when_everything_is_gone_through():
    with garbage.short_pauses():
        node = Node()
        node.other = node
        known = weakref.ref(node)
        gc.collect()
        del node
        gc.collect()
        assert known() is not None, "it was set apart, or this test says nothing"
        garbage.collect_everything()
        assert known() is None


def test_what_is_no_cycle_goes_at_once_although_it_was_set_apart():
    with garbage.short_pauses():
        node = Node()
        known = weakref.ref(node)
        gc.collect()
        del node
        assert known() is None


def test_afterwards_python_collects_as_before():
    before = gc.get_threshold(), list(gc.callbacks)
    with garbage.short_pauses():
        assert gc.get_threshold() != before[0]
    assert (gc.get_threshold(), gc.callbacks) == before


@pytest.mark.parametrize(
    ("mib", "grown"), [(100, False), (163, False), (215, True)], ids=["as before", "a little", "by half"]
)
def test_everything_is_gone_through_when_the_memory_has_grown_by_half(mib, grown):
    assert garbage.has_grown(mib << 20, 100 << 20) is grown


async def test_the_memory_is_looked_at_again_and_again():
    sizes = iter([100, 120, 300, 150, 160])  # at the start; twice; after the collection; once more
    collected: list[None] = []

    async def pause(_seconds: float) -> None:
        if (size := next(sizes, None)) is None:
            raise EndOfTest
        now.append(size)

    now = [next(sizes)]
    with pytest.raises(EndOfTest):
        await garbage.collect_when_grown(
            resident=lambda: now[-1] << 20, collect=lambda: collected.append(now.append(next(sizes))), pause=pause
        )
    assert len(collected) == 1, "160 is little more than the 150 after the collection"


def test_the_memory_of_this_process_is_known():
    assert garbage.resident_memory() > 10 << 20
