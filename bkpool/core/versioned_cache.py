"""A cache of objects by key that only moves forward: an older version of an object never replaces a newer one.

A list and a watch fill it, and a writer may add what it has just written. A list of a lower version than what was
reached replaces everything, because the store was restored from a backup. It does no I/O and knows no kind of object;
bkpool.kube.reflector and bkpool.store.mirror feed it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

EventType = Literal["ADDED", "MODIFIED", "DELETED"]


class VersionedCache(Generic[K, T]):
    """The objects of one collection. Its version numbers grow with every change, as resourceVersions do.

    Every method that changes the cache returns the objects that have changed: as they are now, or, where they were
    deleted (their key is no longer in `items`), as they were last.

    Args:
        key_of: The key of an object.
        version_of: The version of an object.
    """

    def __init__(self, key_of: Callable[[T], K], version_of: Callable[[T], int]) -> None:
        self._key_of = key_of
        self._version_of = version_of
        self.items: dict[K, T] = {}
        self.version = 0
        """Every change up to this version is known: an object that is older and not in `items` has been deleted."""

    def listed(self, objects: Iterable[T], version: int) -> list[T]:
        """Takes over a complete list. Lists and watches must not overlap in time.

        Args:
            objects: Everything that existed at that version.
            version: The version of the list.
        """
        earlier, self.version = version < self.version, version
        listed = {self._key_of(obj): obj for obj in objects}
        if earlier:  # the store is an earlier copy of itself: versions of before say nothing about those of now
            lost = [obj for key, obj in self.items.items() if key not in listed]
            self.items.clear()
            self.items.update(listed)
            return [*lost, *listed.values()]
        deleted = {
            key: obj for key, obj in self.items.items() if key not in listed and self._version_of(obj) <= version
        }
        for key in deleted:
            del self.items[key]
        return [*deleted.values(), *(obj for obj in listed.values() if self._put(obj))]

    def event(self, kind: EventType, obj: T) -> list[T]:
        """Takes over one event of a watch; for a deletion, `obj` is the object as it was last."""
        self.bookmark(self._version_of(obj))
        if kind != "DELETED":
            return [obj] if self._put(obj) else []
        key = self._key_of(obj)
        held = self.items.get(key)
        if held is None or self._version_of(held) > self._version_of(obj):
            return []  # not known, or created again since
        del self.items[key]
        return [obj]

    def bookmark(self, version: int) -> None:
        """Notes that every change up to this version is known."""
        self.version = max(self.version, version)

    def applied(self, obj: T) -> list[T]:
        """Takes over an object that has just been written or read outside of list and watch, if it is news."""
        return [obj] if self._version_of(obj) > self.version and self._put(obj) else []

    def _put(self, obj: T) -> bool:
        key = self._key_of(obj)
        held = self.items.get(key)
        if held is not None and self._version_of(held) >= self._version_of(obj):
            return False
        self.items[key] = obj
        return True
