"""Reads what an API server sends if something in it has more levels than the fast parser takes.

An API server stores objects of thousands of levels where a definition keeps unknown fields. One of them must not hide
all others. Its fields that are too deep become a text that says so. They are never shortened, because that could be
written back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

Doc = dict[str, Any]

MOST_LEVELS = 180
"""Levels of a field. The parser takes 200 of a whole text, and pydantic writes 255."""
_TEXT_LEVELS = MOST_LEVELS + 8  # a list has three levels above the fields of its objects
TOO_DEEP = f"nested in more than {MOST_LEVELS} levels"

_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)


def deep_document(raw: bytes) -> Doc | None:
    """The document, with a text instead of each field that is too deep; None: it is no JSON, or not too deep."""
    text = b"".join(_shallow(raw))
    if text == raw:
        return None
    try:
        doc: Doc = from_json(text, cache_strings="keys")
    except ValueError:
        return None
    for found in _objects(doc):
        metadata = found.get("metadata")
        if isinstance(metadata, dict):
            metadata.pop("managedFields", None)
            _mark_fields(metadata)
        _mark_fields(found)
    return doc


def _shallow(raw: bytes) -> Iterator[bytes]:
    """The text with `null` instead of what is too deep."""
    level, kept = 0, 0
    for token in _TOKENS.finditer(raw):
        sign = raw[token.start()]
        if sign in b"{[":
            level += 1
            if level == _TEXT_LEVELS + 1:
                yield raw[kept : token.start()]
                yield b"null"
        elif sign in b"}]":
            if level == _TEXT_LEVELS + 1:
                kept = token.end()
            level -= 1
    if level <= _TEXT_LEVELS:
        yield raw[kept:]


def _objects(doc: Doc) -> list[Doc]:
    """The object, that of an event, or those of a list."""
    found = doc.get("items", [doc.get("object", doc)])
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else [doc]


def _mark_fields(doc: Doc) -> None:
    for name, value in doc.items():
        if _is_too_deep(value):
            doc[name] = TOO_DEEP


def _is_too_deep(value: object) -> bool:
    at_level: list[object] = [value]
    for _ in range(MOST_LEVELS + 1):
        at_level = [inner for one in at_level for inner in _inside(one)]
        if not at_level:
            return False
    return True


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
