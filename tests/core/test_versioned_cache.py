"""The cache of a list and watch: it never goes back to an older version, in any order of events."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.versioned_cache import VersionedCache


class Thing(NamedTuple):
    name: str
    version: int
    uid: int = 0


def a_cache(*things: Thing, version: int = 0) -> VersionedCache[str, Thing]:
    cache: VersionedCache[str, Thing] = VersionedCache(lambda thing: thing.name, lambda thing: thing.version)
    if things or version:
        cache.listed(things, version)
    return cache


def test_an_applied_object_is_known_at_once_and_an_older_one_never_replaces_it():
    cache = a_cache(version=5)
    assert cache.applied(Thing("a", 7)) == [Thing("a", 7)]
    assert cache.applied(Thing("a", 6)) == cache.event("MODIFIED", Thing("a", 6)) == []
    assert cache.items == {"a": Thing("a", 7)}


def test_the_event_of_an_applied_object_is_no_second_change():
    cache = a_cache(version=5)
    cache.applied(Thing("a", 7))
    assert cache.event("ADDED", Thing("a", 7)) == []


def test_an_older_write_does_not_bring_back_a_deleted_object():
    cache = a_cache(Thing("a", 3), version=5)
    assert cache.event("DELETED", Thing("a", 9)) == [Thing("a", 9)]
    assert cache.applied(Thing("a", 8)) == []
    assert cache.items == {}
    assert cache.applied(Thing("a", 10)) == [Thing("a", 10)]


def test_a_late_deletion_does_not_remove_an_object_that_was_created_again():
    cache = a_cache(Thing("a", 3, uid=1), version=5)
    cache.applied(Thing("a", 9, uid=2))
    assert cache.event("DELETED", Thing("a", 8, uid=1)) == []
    assert cache.items == {"a": Thing("a", 9, uid=2)}


def test_a_list_reports_an_object_that_was_replaced_by_another_of_its_name():
    cache = a_cache(Thing("a", 3, uid=1), version=5)
    assert cache.listed([Thing("a", 8, uid=2)], 9) == [Thing("a", 8, uid=2)]


def test_a_list_removes_what_is_not_in_it_but_not_what_is_newer():
    cache = a_cache(Thing("a", 1), version=2)
    cache.applied(Thing("b", 9))
    assert cache.listed([], 5) == [Thing("a", 1)]
    assert cache.items == {"b": Thing("b", 9)}


def test_a_list_that_is_older_than_what_was_reached_replaces_everything():
    """The store was restored from a backup, and gives the same versions again to other changes."""
    cache = a_cache(Thing("a", 5, uid=1), Thing("b", 3), version=5)
    cache.event("ADDED", Thing("c", 8))
    cache.applied(Thing("d", 9))
    restored = [Thing("a", 4, uid=2), Thing("b", 3)]
    assert cache.listed(restored, 6) == [Thing("c", 8), Thing("d", 9), *restored]
    assert cache.items == {"a": Thing("a", 4, uid=2), "b": Thing("b", 3)}
    assert cache.event("MODIFIED", Thing("a", 7)) == [Thing("a", 7)], "and it goes on from there"


def test_a_list_with_nothing_new_reports_nothing():
    cache = a_cache(Thing("a", 1), version=2)
    assert cache.listed([Thing("a", 1)], 8) == []


def test_a_deletion_of_an_unknown_object_is_no_change():
    assert a_cache(version=2).event("DELETED", Thing("a", 5)) == []


def test_a_bookmark_only_moves_the_version_and_never_back():
    cache = a_cache(Thing("a", 1), version=2)
    cache.bookmark(40)
    cache.bookmark(30)
    assert (cache.version, cache.items) == (40, {"a": Thing("a", 1)})
    assert cache.applied(Thing("b", 39)) == [], "it was deleted before version 40"


History = list[tuple[str, str]]


@given(
    history=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "delete"])), max_size=20),
    draws=st.randoms(use_true_random=False),
)
def test_whatever_a_writer_applies_meanwhile_the_end_is_what_the_store_has(history: History, draws):
    """All events in order; between them, and late, any object as some write returned it."""
    store: dict[str, Thing] = {}
    events: list[tuple[str, Thing]] = []
    written: list[Thing] = []
    for version, (name, what) in enumerate(history, 1):
        if what == "put":
            events.append(("MODIFIED" if name in store else "ADDED", Thing(name, version)))
            store[name] = Thing(name, version)
            written.append(store[name])
        elif name in store:
            events.append(("DELETED", store.pop(name)._replace(version=version)))
    cache = a_cache()
    for kind, thing in events:
        if written and draws.random() < 0.5:
            # A writer has its answer no later than the store has the object, and perhaps much later than the watch.
            cache.applied(draws.choice(written))
        cache.event(kind, thing)
    for thing in written:
        cache.applied(thing)
    assert cache.items == store
