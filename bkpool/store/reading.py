"""Turns a stored document into an object, for every implementation of the store.

A document that cannot be read is an error, which names the object and the field. Nothing is guessed or repaired.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bkpool.core.errors import HostFault
from bkpool.core.resource import R, explain

Doc = dict[str, Any]


def read(kind: type[R], doc: Doc) -> R:
    """The object that a document describes.

    Raises:
        HostFault: `Unreadable`: this version does not understand a field.
    """
    try:
        return kind.model_validate(doc)
    except ValidationError as error:
        metadata = doc["metadata"]
        raise HostFault(
            f"{kind.KIND} {metadata['namespace']}/{metadata['name']} cannot be read: {explain(error).message}",
            hint="Correct that field, or delete the object. If a newer bkpool wrote it, use that version.",
            code="Unreadable",
        ) from None
