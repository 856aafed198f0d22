"""The protocol of the store, which is the only source of truth, for every implementation.

The semantics are those of the Kubernetes API. One suite of contract tests (tests/store) runs against every
implementation. Nothing here knows what a lease is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol

from bkpool.core.names import Key
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """Objects as they were at one moment, and the version from which a watch continues."""

    items: tuple[R, ...]
    resource_version: str
    unreadable: tuple[Unreadable, ...] = ()
    """Objects that exist but cannot be read. They are not in `items`, and they were not deleted."""

    @property
    def keys(self) -> list[Key]:
        """The names of all objects, also of those that cannot be read."""
        return [*(obj.key for obj in self.items), *(found.key for found in self.unreadable)]


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[R]):
    """One change. For a deletion, `object` is the object as it was last."""

    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: R | Unreadable


class Store(Protocol):
    """Typed objects with uid, generation, resourceVersion, finalizers and owners.

    Every method may raise Unavailable when the store cannot be reached.
    """

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """Reads one object. Raises NotFound, or UnreadableObject."""

    async def list(
        self, kind: type[R], *, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Listing[R]:
        """Reads all objects of a kind. With `labels`, only those that have all of them with these values.

        Without `namespace` where there are several scopes: all of them, one after the other.
        """

    async def create(self, obj: R) -> R:
        """Stores a new object with its status. Raises Conflict if the name is taken."""

    async def replace(self, obj: R) -> R:
        """Replaces metadata and spec if the resourceVersion is unchanged. The status stays as it is.

        `generation` grows when the spec changes. When the last finalizer is removed from an object that is being
        deleted, the object is deleted. Raises Conflict (it has changed since it was read) or NotFound.
        """

    async def replace_status(self, obj: R) -> R:
        """Replaces only the status if the resourceVersion is unchanged. Raises Conflict or NotFound."""

    async def patch_status(self, found: Unreadable, fields: Mapping[str, Any]) -> None:
        """Sets fields of the status of an object that cannot be read, and leaves everything else as it is.

        Raises Conflict (it has changed since it was found) or NotFound.
        """

    async def delete(
        self,
        kind: type[R],
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """Deletes the object and then the objects that it owned. With finalizers, it only sets deletionTimestamp.

        Raises NotFound, or Conflict if uid or resource_version is given and is not the object's.
        """

    def scopes(self, kind: type[Resource]) -> tuple[str | None, ...]:
        """The namespaces in which objects of a kind are listed and watched one by one; (None,): all of them at once.

        Versions of different scopes must not be compared.
        """

    async def answers(self) -> None:
        """Returns when reads and writes are answered at all. It writes nothing.

        A store on another machine is not asked: who watches it learns by that when it is gone.
        """

    def watch(
        self, kind: type[R], since: str, *, namespace: str | None = None
    ) -> AsyncGenerator[WatchEvent[R], None]:
        """Every change after `since`, in order, without end. Close it (contextlib.aclosing) when done.

        An object that cannot be read comes as an `Unreadable`.

        Args:
            kind: What to follow.
            since: The version of a list of the same scope.
            namespace: One of `scopes`.

        Raises:
            Gone: `since`, or the position of a slow reader, is too long ago: list again.
            InvalidInput: The namespace is none of `scopes`.
        """
