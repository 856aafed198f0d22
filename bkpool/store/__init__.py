"""The one truth: what the rest of bkpool may ask of a store, whatever keeps it.

The semantics are those of the Kubernetes API; one contract suite (tests/store) holds every implementation to them.
Nothing here knows what a lease is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol

from bkpool.core.names import Key
from bkpool.core.resource import R


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """Objects as they were at one moment, and where a watch goes on from there."""

    items: tuple[R, ...]
    resource_version: str
    unreadable: frozenset[Key] = frozenset()
    """What is there too, but cannot be read: not in `items`, and not gone either."""


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[R]):
    """One change. A deleted object is given as it last was."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: R


class Store(Protocol):
    """Typed objects with uid, generation, resourceVersion, finalizers and owners.

    Every method may raise Unavailable when the store cannot be reached.
    """

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """The object now. Raises NotFound."""

    async def list(
        self, kind: type[R], *, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Listing[R]:
        """All objects of a kind, read live; `labels` must all be equal."""

    async def create(self, obj: R) -> R:
        """Stores a new object; its status is kept as given. Raises Conflict if the name is taken."""

    async def replace(self, obj: R) -> R:
        """Replaces metadata and spec if the resourceVersion is unchanged; status is left as it is.

        `generation` moves when spec changes. Removing the last finalizer of an object that is being deleted deletes
        it. Raises Conflict (changed since it was read) or NotFound.
        """

    async def replace_status(self, obj: R) -> R:
        """Replaces only the status if the resourceVersion is unchanged. Raises Conflict or NotFound."""

    async def delete(
        self,
        kind: type[R],
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Deletes the object, or with finalizers only sets deletionTimestamp; owned objects follow.

        Raises NotFound, or Conflict if uid or resource_version are given and are not the object's.
        """

    def watch(self, kind: type[R], since: str) -> AsyncGenerator[WatchEvent[R], None]:
        """Every change after `since`, in order, without end; close it (contextlib.aclosing) when done.

        A change into something unreadable is left out: whoever holds the object as it was before keeps it.
        Raises Gone when `since`, or where a slow reader has got to, is too long ago: list again.
        """
