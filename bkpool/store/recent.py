"""The documents that this process has written last, by their text, so that it need not read its own writing.

A watch reads each change from the file, and the next writer of an object reads what it replaces; both have just been
written here. It says what a text from the file means. It never says what the file contains.
"""

from __future__ import annotations

from typing import NamedTuple

from bkpool.core.resource import R, Resource
from bkpool.store.reading import Doc

MOST = 128
"""Texts that are remembered. Twenty leases at once are forty changes."""
LONGEST = 64 * 1024
"""Bytes of a text that is remembered. A worker with its past leases has five thousand."""


class Written(NamedTuple):
    """What a text means."""

    doc: Doc
    obj: Resource


class RecentlyWritten:
    """The documents. One thread writes, and others may read."""

    def __init__(self) -> None:
        self._by_text: dict[bytes, Written] = {}

    def add(self, text: bytes, doc: Doc, obj: Resource) -> None:
        """Remembers a text that was just written.

        Args:
            text: The text.
            doc: The document that a parser makes of it. Nobody may change it any more.
            obj: The object that is read from the document.
        """
        if len(text) > LONGEST:
            return
        self._by_text[text] = Written(doc, obj)
        if len(self._by_text) > MOST:
            del self._by_text[next(iter(self._by_text))]

    def doc(self, data: object) -> Doc | None:
        """The document of a text that was read, with metadata that may be changed; None if it is not remembered."""
        found = self._by_text.get(data) if isinstance(data, bytes) else None
        return None if found is None else {**found.doc, "metadata": {**found.doc["metadata"]}}

    def obj(self, kind: type[R], data: object) -> R | None:
        """The object of this kind in a text that was read; None if it is not remembered."""
        found = self._by_text.get(data) if isinstance(data, bytes) else None
        return found.obj if found is not None and isinstance(found.obj, kind) else None
