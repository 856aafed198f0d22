"""Turns a stored document into an object, for every implementation of the store.

A document that cannot be read becomes an `Unreadable`, which names the object and the field. Nothing is guessed or
repaired.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bkpool.core.names import Key
from bkpool.core.resource import R, explain
from bkpool.core.unreadable import Unreadable, UnreadableObject

Doc = dict[str, Any]


def read(kind: type[R], doc: Doc) -> R:
    """The object that a document describes.

    Raises:
        UnreadableObject: This version does not understand a field.
    """
    found = read_or_note(kind, doc)
    if isinstance(found, Unreadable):
        raise UnreadableObject(found)
    return found


def read_or_note(kind: type[R], doc: Doc) -> R | Unreadable:
    """The object that a document describes, or what can be said of it if it cannot be read."""
    try:
        return kind.model_validate(doc)
    except ValidationError as error:
        metadata = doc["metadata"]
        return Unreadable(kind, Key(metadata["namespace"], metadata["name"]), explain(error).message, doc)
