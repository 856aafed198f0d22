"""Turns what is stored in a row of `objects` or `events` into a document, or says why it is none.

A row that somebody edited, or that a fault of the disk changed, may contain anything. Its columns name the object.
If its content is not a document that the store can go on with, the object cannot be read, and only its columns and
what is certain of its content are kept.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from pydantic_core import PydanticSerializationError, to_json

from bkpool.core.errors import InvalidInput
from bkpool.store.reading import Doc

LARGEST = 16 * 1024 * 1024
"""Bytes of a stored document. The files of `up -f` have a million characters, each at most 12 bytes in JSON."""
_BYTES = "CAST(data AS BLOB)"
DATA = f"CASE WHEN length({_BYTES}) <= {LARGEST} THEN {_BYTES} ELSE length({_BYTES}) END"
"""The SQL expression for the content of a row: its bytes, or their number if there are too many to read."""
COLUMNS = f"rowid, CASE typeof(uid) WHEN 'text' THEN CAST(uid AS BLOB) END, kind, namespace, name, {DATA}"
"""The SQL expressions for a `StoredRow`."""

_DEEPEST = 100  # objects and lists inside each other; json, pydantic and the C stack each have a limit of their own
_VERSION = re.compile("[0-9]{1,18}")  # in an integer of SQLite


class StoredRow(NamedTuple):
    """One row of `objects`."""

    rowid: int
    uid: bytes | None
    kind: str
    namespace: str
    name: str
    data: object
    """As `DATA` returns it."""

    @property
    def known_uid(self) -> str:
        """The uid in its column; empty if that is of no use."""
        return (self.uid or b"").decode(errors="ignore")


class StoredDocument(NamedTuple):
    """What is stored in a row."""

    rowid: int
    doc: Doc
    """The document. If there is a problem: one that names the object, with its spec and its status if it has them."""
    problem: str
    """Why the content of the row is not the object, without a stop at the end; empty if it is."""


class NotADocument(ValueError):
    """What is stored is not one JSON object."""


def document(row: StoredRow, version: int, owners: list[str], parsed: Doc | None = None) -> StoredDocument:
    """The document of an object, or what stands for it.

    Args:
        row: The row.
        version: The resourceVersion of the stand-in.
        owners: The uids of its owners, as they are in the index.
        parsed: What `parse` makes of its content; None: not known.
    """
    stored: Doc = {}
    try:
        stored = parse(row.data) if parsed is None else parsed
        _check(row, stored)
    except NotADocument as problem:
        return StoredDocument(
            row.rowid, _stand_in(row, stored, version, owners), f"what is stored in state.db {problem}"
        )
    return StoredDocument(row.rowid, stored, "")


def logged(kind: str, version: int, data: object) -> Doc:
    """The document of an event in the log.

    Args:
        kind: The kind of the object.
        version: The version of the event.
        data: As `DATA` returns it.

    Raises:
        NotADocument: It does not say what has changed.
    """
    doc = parse(data)
    metadata = doc.get("metadata")
    if not isinstance(metadata, dict) or (doc.get("kind"), metadata.get("resourceVersion")) != (kind, str(version)):
        raise NotADocument("is not that event")
    if not (isinstance(metadata.get("namespace"), str) and isinstance(metadata.get("name"), str)):
        raise NotADocument("names no object")
    return doc


def parse(data: object) -> Doc:
    """The JSON object that is stored.

    Args:
        data: As `DATA` returns it.

    Raises:
        NotADocument: It is not JSON in UTF-8, no object, too large or nested too deeply.
    """
    if isinstance(data, int):
        raise NotADocument(f"has {data:,} bytes (an object may have {LARGEST:,})")
    if not isinstance(data, bytes):
        raise NotADocument("is missing")
    try:
        doc = json.loads(data.decode())
        if b"\\u" in data:  # a half of a surrogate pair is no character, and can be neither printed nor sent
            json.dumps(doc, ensure_ascii=False).encode()
    except UnicodeError:
        raise NotADocument("is not UTF-8") from None
    except ValueError:
        raise NotADocument("is not JSON") from None
    except RecursionError:
        raise NotADocument("is nested too deeply") from None
    if not isinstance(doc, dict):
        raise NotADocument(f"is JSON, but {_TYPES.get(type(doc), 'nothing')} where an object should be")
    if data.count(b"{") + data.count(b"[") > _DEEPEST and _is_deeper(doc, _DEEPEST):
        raise NotADocument("is nested too deeply")
    return doc


def text_of(doc: Doc) -> bytes:
    """The document as it is stored. Raises InvalidInput if it could not be read again: too large, or no Unicode."""
    try:
        text = to_json(doc)
    except PydanticSerializationError:  # a half of a surrogate pair
        raise InvalidInput(
            f"{doc['kind']} {doc['metadata']['name']} has a text that is not Unicode", hint="Correct that text."
        ) from None
    if len(text) > LARGEST:
        raise InvalidInput(
            f"{doc['kind']} {doc['metadata']['name']} has {len(text):,} bytes, and an object may have {LARGEST:,}",
            hint="Make its texts and lists shorter.",
        )
    return text


_TYPES = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}


def _check(row: StoredRow, doc: Doc) -> None:
    """Raises NotADocument if the document is not that object, or if a field that the store itself needs is wrong."""
    metadata = doc.get("metadata")
    if not isinstance(metadata, dict):
        raise NotADocument("has no metadata")
    named = doc.get("kind"), metadata.get("namespace"), metadata.get("name"), metadata.get("uid")
    if named != (row.kind, row.namespace, row.name, row.known_uid) or not row.uid:
        raise NotADocument("names another object, or another uid")
    version, generation = metadata.get("resourceVersion"), metadata.get("generation")
    owners = metadata.get("ownerReferences")
    sound = {
        "resourceVersion": isinstance(version, str) and _VERSION.fullmatch(version) is not None,
        "generation": isinstance(generation, int) and not isinstance(generation, bool),
        "labels": _is_labels(metadata.get("labels")),
        "finalizers": _is_texts(metadata.get("finalizers")),
        "ownerReferences": isinstance(owners, list)
        and all(isinstance(one, dict) and isinstance(one.get("uid"), str) for one in owners),
    }
    wrong = next((field for field, is_sound in sound.items() if not is_sound), "")
    if wrong:
        raise NotADocument(f"has a metadata.{wrong} that no bkpool writes")
    if not isinstance(doc.get("spec"), dict) or "status" not in doc:
        raise NotADocument("has no spec or no status")


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_deeper(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [found for one in inner for found in one]
        if not level:
            return False
    return True


def _stand_in(row: StoredRow, stored: Doc, version: int, owners: list[str]) -> Doc:
    """A document with all that the store needs to name, to replace and to delete the object."""
    kept = {part: stored[part] for part in ("spec", "status") if isinstance(stored.get(part), dict)}
    metadata = {
        "name": row.name,
        "namespace": row.namespace,
        "uid": row.known_uid,
        "resourceVersion": str(version),
        "generation": 1,
        "labels": {},
        "annotations": {},
        "finalizers": [],
        "ownerReferences": [{"uid": uid} for uid in owners],
    }
    return {"kind": row.kind, "metadata": metadata, **kept}
