"""From a stored document to an object, for every implementation of the store.

What cannot be read is an error that names the object and the field; nothing is guessed or repaired.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bkpool.core.errors import HostFault
from bkpool.core.resource import R, explain

Doc = dict[str, Any]


def read(kind: type[R], doc: Doc) -> R:
    """The object in a document.

    Raises:
        HostFault: `Unreadable`: a field is not what this version understands.
    """
    try:
        return kind.model_validate(doc)
    except ValidationError as error:
        metadata = doc["metadata"]
        raise HostFault(
            f"{kind.KIND} {metadata['namespace']}/{metadata['name']} cannot be read: {explain(error).message}",
            hint="Correct that field, or delete the object; if a newer bkpool has written it, use that version.",
            code="Unreadable",
        ) from None
