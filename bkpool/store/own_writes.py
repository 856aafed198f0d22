"""What this process has written last to a cluster, so that it need not read it again when the watch brings it.

It says what a document means that is the same as one of these. It never says what the cluster contains.
"""

from __future__ import annotations

from bkpool.core.resource import R, Resource
from bkpool.store.reading import Doc, read

MOST = 128
"""Objects that are remembered. Twenty leases at once are forty changes."""


class OwnWrites:
    """The last version of each object that was written, as the answer to the write has it."""

    def __init__(self) -> None:
        self._by_uid: dict[str, tuple[Doc, Resource]] = {}

    def read(self, kind: type[R], doc: Doc) -> R:
        """The object that the answer to a write describes. Nobody may change the document any more.

        Raises:
            UnreadableObject: This version does not understand a field.
        """
        obj = read(kind, doc)
        self._by_uid.pop(obj.uid, None)
        self._by_uid[obj.uid] = doc, obj
        if len(self._by_uid) > MOST:
            del self._by_uid[next(iter(self._by_uid))]
        return obj

    def object_of(self, kind: type[R], doc: Doc) -> R | None:
        """The object of this kind that a document of a watch describes; None: it must be read."""
        metadata = doc.get("metadata")
        known = self._by_uid.get(str(metadata.get("uid"))) if isinstance(metadata, dict) else None
        return known[1] if known is not None and isinstance(known[1], kind) and known[0] == doc else None
