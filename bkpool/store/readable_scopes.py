"""Lists a kind in all namespaces of a store that may be read, so that one without rights does not stop the rest.

Who must act on every object says which namespaces were left out. It never hides that none can be read.
"""

from __future__ import annotations

from typing import Generic, NamedTuple

from bkpool.core.errors import Forbidden
from bkpool.core.resource import R
from bkpool.core.unreadable import Unreadable
from bkpool.store import Store


class ReadableList(NamedTuple, Generic[R]):
    """What could be read."""

    items: tuple[R, ...]
    unreadable: tuple[Unreadable, ...]
    refused: tuple[str, ...]
    """The namespaces that may not be read."""


async def list_readable(store: Store, kind: type[R]) -> ReadableList[R]:
    """Lists one namespace after the other.

    Raises:
        Forbidden: None of them may be read.
        Unavailable: The store does not answer.
    """
    items: list[R] = []
    unreadable: list[Unreadable] = []
    refused: list[str] = []
    scopes = store.scopes(kind)
    for scope in scopes:
        try:
            listing = await store.list(kind, namespace=scope)
        except Forbidden:
            if scope is None or len(refused) == len(scopes) - 1:
                raise
            refused.append(scope)
            continue
        items += listing.items
        unreadable += listing.unreadable
    return ReadableList(tuple(items), tuple(unreadable), tuple(refused))
