"""Reads what an API server sends as documents, without the lists of who wrote which field.

These `managedFields` are a fifth to a half of an object, and nothing here uses them. They are cut out of the text, so
that they cost no objects. Nothing else of a document is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic_core import from_json

from bkpool.kube.deep_documents import deep_document

Doc = dict[str, Any]

_BEGIN = b',"managedFields":[{"'
_END = b"}]"


def document(raw: bytes) -> Doc:
    """One object, list or event of a watch. A field that is too deep is a text that says so.

    Raises:
        ValueError: It is no object in JSON.
    """
    text = text_without_managed_fields(raw)
    try:
        # Half the time of json.loads, and the names of fields are the same objects in all documents.
        found = from_json(text, cache_strings="keys")
    except ValueError:
        found = deep_document(text)
        if found is None:
            raise
    if not isinstance(found, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - a fault of the text
    return cast("Doc", found)


def without_managed_fields(doc: Doc) -> Doc:
    """The object without managedFields: `text_without_managed_fields` leaves those that look otherwise."""
    doc["metadata"].pop("managedFields", None)
    return doc


def text_without_managed_fields(raw: bytes) -> bytes:
    """The text without the managedFields of its objects. What is not certain to be them stays."""
    if _BEGIN not in raw:
        return raw
    return b"".join(_parts(raw))


def _parts(raw: bytes) -> Iterator[bytes]:
    position = 0
    while (begin := raw.find(_BEGIN, position)) >= 0:
        end = _end(raw, begin)
        if end is None:
            break
        yield raw[position:begin]
        position = end
    yield raw[position:]


def _end(raw: bytes, begin: int) -> int | None:
    """The place behind the list that begins here; None: unknown.

    There is no other list in it, so it ends at the first `}]` that is not in a string. A string ends at its first
    quote without a backslash, and no letter follows that. So what is followed by the name of a field is in no string.
    """
    at = raw.find(_END, begin)
    while at >= 0:
        end = at + len(_END)
        rest = raw[end : end + 4].lstrip(b"}")
        if rest[:2] == b',"' and rest[2:3].isalpha():
            return end
        at = raw.find(_END, end)
    return None
