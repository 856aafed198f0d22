"""The caches of a pool, kept from change to change."""

from bkpool.allocation.known_caches import KnownCaches
from bkpool.core.names import Key, Slot
from support.world import MemoryWorkers

P, Q = Key("default", "p"), Key("default", "q")


def test_it_has_what_is_there_and_follows_changes():
    workers = MemoryWorkers()
    workers.cache_owners = {Slot("default", "p", 0): "ann", Slot("default", "q", 0): None}
    caches = KnownCaches(workers)
    assert caches.of(P) == {Slot("default", "p", 0): "ann"}
    assert caches.of(Q) == {Slot("default", "q", 0): None}

    workers.cache_owners = {Slot("default", "p", 1): "bob"}
    for slot in (Slot("default", "p", 0), Slot("default", "p", 1), Slot("default", "q", 0)):
        workers.changed(slot)
    assert caches.of(P) == {Slot("default", "p", 1): "bob"}
    assert caches.of(Q) == caches.of(Key("default", "unknown")) == {}


def test_a_slot_that_was_reported_is_asked_when_the_caches_are_needed():
    """What it is reported for may be known a moment later only."""
    workers = MemoryWorkers()
    caches = KnownCaches(workers)
    slot = Slot("default", "p", 0)
    workers.changed(slot)
    workers.cache_owners[slot] = "ann"
    assert caches.of(P) == {slot: "ann"}
    workers.cache_owners[slot] = "bob"
    assert caches.of(P) == {slot: "ann"}, "nothing was reported"
    caches.close()
    workers.changed(slot)
    assert caches.of(P) == {slot: "ann"}, "it does not listen any more"
