"""The rules of the Kubernetes API on SQLite tables: versions, generations, finalizers, owners, the event log.

Each method is one command and runs inside a transaction that its caller opens. Nothing here knows about threads,
asyncio or commits.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from bkpool.core.errors import Conflict, Gone, InvalidInput, NotFound
from bkpool.core.names import Key
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable, UnreadableObject
from bkpool.store import Listing, WatchEvent, rows
from bkpool.store.reading import Doc, read, read_or_note
from bkpool.store.recent import RecentlyWritten
from bkpool.store.rows import StoredDocument, StoredRow

_PAGE_SIZE = 256  # events that are read from the log at once: a limit for the memory of a slow watch
_SHARE_REMOVED = 64  # of the log: the part that is removed at once
_SET_BY_STORE = ("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp")


class LogPage(NamedTuple):
    """Consecutive events of the log."""

    events: list[WatchEvent[Any]]
    reached: int
    """The version up to which the log has been read."""
    complete: bool
    """Whether that is the end of the log."""


class Tables:
    """The tables of one connection.

    Args:
        db: A connection in autocommit mode.
        now: The clock for creation and deletion timestamps.
        history: How many events the log keeps.
        recent: What was written last, shared with the thread that reads.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        *,
        now: Callable[[], datetime],
        history: int,
        recent: RecentlyWritten | None = None,
    ) -> None:
        self._db = db
        self._recent = recent or RecentlyWritten()
        self._now = now
        self._history = history
        self._newest: int | None = None
        """The version of the last event, while a transaction is open; None: not asked yet."""
        self._oldest = 0
        """No event of the log has a lower version."""
        self.touched: set[str] = set()
        """The kinds that were written in this transaction. The code that commits empties it."""

    def begins(self) -> None:
        """Notes that a transaction begins, or that a part of one was undone."""
        self._newest = None

    # --- reading ----------------------------------------------------------------------------------------------------

    def get(self, kind: type[R], key: Key) -> R:
        """See Store.get."""
        found = _object(kind, self._find(kind, key))
        if isinstance(found, Unreadable):
            raise UnreadableObject(found)
        return found

    def list(self, kind: type[R], namespace: str | None, labels: Mapping[str, str]) -> Listing[R]:
        """See Store.list."""
        terms = _label_terms(labels)
        conditions = ["kind = ?"] + ["namespace = ?"] * (namespace is not None)
        conditions += ["uid IN (SELECT uid FROM terms WHERE term = ?)"] * len(terms)
        selected = self._db.execute(
            f"{_ROW} WHERE {' AND '.join(conditions)} ORDER BY namespace, name",
            [kind.KIND, *([] if namespace is None else [namespace]), *terms],
        )
        found = [_object(kind, self._read(row)) for row in selected.fetchall()]
        return Listing(
            tuple(obj for obj in found if not isinstance(obj, Unreadable)),
            str(self._version()),
            tuple(obj for obj in found if isinstance(obj, Unreadable)),
        )

    def events_after(self, kind: type[R], version: int) -> LogPage:
        """The next events of a kind. Raises Gone if some were removed from the log, or the version is of no use."""
        newest = self._version()
        compacted = self._db.execute("SELECT version FROM compacted WHERE kind = ?", [kind.KIND]).fetchone()
        if version > newest or (compacted and version < compacted[0]):
            raise Gone(
                f"the changes of {kind.KIND} since version {version} are no longer in the log", hint="List again."
            )
        logged = self._db.execute(
            f"SELECT version, CAST(type AS BLOB), {rows.DATA} FROM events"  # noqa: S608 - fixed parts only
            " WHERE kind = ? AND version > ? ORDER BY version LIMIT ?",
            [kind.KIND, version, _PAGE_SIZE],
        ).fetchall()
        complete = len(logged) < _PAGE_SIZE
        events = [self._event(kind, *row) for row in logged]
        return LogPage(events, newest if complete else logged[-1][0], complete)

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, obj: R) -> R:
        """See Store.create."""
        if self._db.execute(_BY_KEY, [obj.KIND, *obj.key]).fetchone():
            raise Conflict(f"{obj.KIND} {obj.key} exists already")
        doc = obj.to_json()
        metadata = doc["metadata"]
        for field in ("deletionTimestamp", "resourceVersion"):
            metadata.pop(field, None)
        metadata.update(uid=str(uuid4()), generation=1, creationTimestamp=self._timestamp())
        text = self._put("ADDED", doc)
        self._index(doc)
        if self._orphaned(doc):
            self._delete_or_mark(self._find(type(obj), obj.key)._replace(doc=doc))
            return read(type(obj), doc)
        return self._written(type(obj), text, doc)

    def replace(self, obj: R) -> R:
        """See Store.replace."""
        found = self._unchanged(obj)
        current = found.doc
        doc = obj.to_json(without_status=True) | {"status": current.get("status", {})}
        metadata, stored = doc["metadata"], current["metadata"]
        for field in _SET_BY_STORE:
            metadata.pop(field, None)
        metadata.update({field: stored[field] for field in _SET_BY_STORE if field in stored})
        if found.problem:
            metadata.update(uid=stored["uid"] or str(uuid4()), creationTimestamp=self._timestamp())
        if doc == current:
            return read(type(obj), doc)
        if doc["spec"] != current.get("spec"):
            metadata["generation"] += 1
        if "deletionTimestamp" in metadata:
            _refuse_new_finalizers(obj, stored)
        if "deletionTimestamp" in metadata and not metadata["finalizers"]:
            self._remove(found.rowid, doc)
            return read(type(obj), doc)
        text = self._put("MODIFIED", doc, found.rowid)
        if found.problem or _terms(metadata) != _terms(stored):
            self._index(doc)
        return self._written(type(obj), text, doc)

    def replace_status(self, obj: R) -> R:
        """See Store.replace_status."""
        found = self._unchanged(obj)
        doc = found.doc | {"status": obj.to_json()["status"]}
        if doc == found.doc:
            return read(type(obj), doc)
        return self._written(type(obj), self._put("MODIFIED", doc, found.rowid), doc)

    def patch_status(self, found: Unreadable, fields: Mapping[str, Any]) -> None:
        """See Store.patch_status."""
        stored = self._find(found.kind, found.key)
        if stored.problem:  # what somebody may want to correct would be lost
            raise UnreadableObject(_unreadable(found.kind, stored))
        current = stored.doc
        if found.version != current["metadata"]["resourceVersion"]:
            raise _changed(found.kind, found.key)
        doc = current | {"status": {**found.status, **fields}}
        if doc != current:
            self._put("MODIFIED", doc, stored.rowid)

    def delete(self, kind: type[Resource], key: Key, uid: str | None, version: str | None) -> None:
        """See Store.delete."""
        found = self._find(kind, key)
        metadata = found.doc["metadata"]
        if uid not in {None, metadata["uid"]} or version not in {None, metadata["resourceVersion"]}:
            raise _changed(kind, key)
        self._delete_or_mark(found)

    def compact(self) -> None:
        """Removes the events that are older than the history that the log keeps, many of them at once."""
        limit = self._version() - self._history
        if self._oldest + self._history // _SHARE_REMOVED > limit:
            return
        self._db.execute(
            "INSERT OR REPLACE INTO compacted SELECT kind, MAX(version) FROM events WHERE version <= ? GROUP BY kind",
            [limit],
        )
        self._db.execute("DELETE FROM events WHERE version <= ?", [limit])
        self._oldest = limit + 1

    # --- the rules --------------------------------------------------------------------------------------------------

    def _delete_or_mark(self, found: StoredDocument) -> None:
        """Deletes an object, or only marks it as deleted while it has finalizers.

        The mark raises the generation, as in Kubernetes.
        """
        metadata = found.doc["metadata"]
        if not metadata["finalizers"]:
            self._remove(found.rowid, found.doc)
        elif "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = self._timestamp()
            metadata["generation"] += 1
            self._put("MODIFIED", found.doc, found.rowid)

    def _remove(self, rowid: int, doc: Doc) -> None:
        """Removes an object, then the objects that only it owned ("background" deletion in Kubernetes)."""
        uid = doc["metadata"]["uid"]
        self._db.execute("DELETE FROM objects WHERE rowid = ?", [rowid])
        self._db.execute("DELETE FROM terms WHERE uid = ?", [uid])
        self._log_event("DELETED", doc)
        owned = self._db.execute("SELECT uid FROM terms WHERE term = ?", [f"owner:{uid}"]).fetchall()
        for (dependent,) in owned:
            row = self._db.execute(f"{_ROW} WHERE uid = ?", [dependent]).fetchone()
            if row and self._orphaned((other := self._read(row)).doc):
                self._delete_or_mark(other)

    def _orphaned(self, doc: Doc) -> bool:
        owners = [owner["uid"] for owner in doc["metadata"]["ownerReferences"]]
        alive = (self._db.execute("SELECT 1 FROM objects WHERE uid = ?", [uid]).fetchone() for uid in owners)
        return bool(owners) and not any(alive)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _find(self, kind: type[Resource], key: Key) -> StoredDocument:
        row = self._db.execute(_BY_KEY, [kind.KIND, *key]).fetchone()
        if row is None:
            raise NotFound(f"there is no {kind.KIND} {key}")
        return self._read(row)

    def _read(self, columns: tuple[Any, ...]) -> StoredDocument:
        """What is stored in a row. An object that cannot be read has the next version: nobody has seen it so far."""
        row = StoredRow(*columns)
        found = rows.document(row, 0, [], self._recent.doc(row.data))
        if not found.problem:
            return found
        terms = self._db.execute("SELECT term FROM terms WHERE uid = ? AND term LIKE 'owner:%'", [row.known_uid])
        return rows.document(row, self._version() + 1, [term.removeprefix("owner:") for (term,) in terms.fetchall()])

    def _unchanged(self, obj: Resource) -> StoredDocument:
        found = self._find(type(obj), obj.key)
        if obj.metadata.resource_version != found.doc["metadata"]["resourceVersion"]:
            raise _changed(type(obj), obj.key)
        return found

    def _event(self, kind: type[R], version: int, change: bytes, data: object) -> WatchEvent[R]:
        """An event of the log. Raises Gone if it cannot be read: a new list then says what is there."""
        known = self._recent.obj(kind, data)
        try:
            if known is not None and known.metadata.resource_version == str(version):
                return WatchEvent(_CHANGES[change], known)
            return WatchEvent(_CHANGES[change], read_or_note(kind, rows.logged(kind.KIND, version, data)))
        except (rows.NotADocument, KeyError):
            raise Gone(f"change {version} of {kind.KIND} in the log cannot be read", hint="List again.") from None

    def _written(self, kind: type[R], text: str, doc: Doc) -> R:
        """The object that was just written. The document may not be changed any more."""
        obj = read(kind, doc)
        self._recent.add(text.encode(), doc, obj)
        return obj

    def _put(self, event: str, doc: Doc, rowid: int | None = None) -> str:
        """Writes an object, and returns its text.

        Args:
            event: What the log says of it.
            doc: The object.
            rowid: Where it is stored; None for a new one.
        """
        metadata, text = doc["metadata"], self._log_event(event, doc)
        if rowid is not None:
            self._db.execute("UPDATE objects SET uid = ?, data = ? WHERE rowid = ?", [metadata["uid"], text, rowid])
            return text
        self._db.execute(
            "INSERT INTO objects (uid, kind, namespace, name, data) VALUES (?, ?, ?, ?, ?)",
            [metadata["uid"], doc["kind"], metadata["namespace"], metadata["name"], text],
        )
        return text

    def _log_event(self, event: str, doc: Doc) -> str:
        """Gives the object the next version, and writes the event to the log. Returns the object's text.

        An object that could not be read had the next version already (`_read`), and gets the one after it.
        """
        version = max(self._version(), int(doc["metadata"].get("resourceVersion", 0))) + 1
        doc["metadata"]["resourceVersion"] = str(version)
        text = rows.text_of(doc).decode()
        self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", [version, doc["kind"], event, text])
        self.touched.add(doc["kind"])
        self._newest = version
        return text

    def _index(self, doc: Doc) -> None:
        metadata = doc["metadata"]
        uid = metadata["uid"]
        self._db.execute("DELETE FROM terms WHERE uid = ?", [uid])
        terms = [(term, uid) for term in _terms(metadata)]
        self._db.executemany("INSERT INTO terms (term, uid) VALUES (?, ?)", terms)

    def _version(self) -> int:
        """The version of the last event. It is read once in a transaction: each statement may wait for a thread."""
        if self._newest is None or not self._db.in_transaction:
            newest: int = self._db.execute("SELECT COALESCE(MAX(version), 0) FROM events").fetchone()[0]
            self._newest = newest
        return self._newest

    def _timestamp(self) -> str:
        """Whole seconds, as in Kubernetes, so that no code relies on a finer time."""
        return self._now().replace(microsecond=0).isoformat().replace("+00:00", "Z")


_ROW = f"SELECT {rows.COLUMNS} FROM objects"  # noqa: S608 - fixed parts only
_BY_KEY = f"{_ROW} WHERE kind = ? AND namespace = ? AND name = ?"


def _object(kind: type[R], found: StoredDocument) -> R | Unreadable:
    return _unreadable(kind, found) if found.problem else read_or_note(kind, found.doc)


def _unreadable(kind: type[Resource], found: StoredDocument) -> Unreadable:
    metadata = found.doc["metadata"]
    return Unreadable(kind, Key(metadata["namespace"], metadata["name"]), found.problem, found.doc)


_CHANGES: Mapping[object, Literal["ADDED", "MODIFIED", "DELETED"]] = {
    b"ADDED": "ADDED",
    b"MODIFIED": "MODIFIED",
    b"DELETED": "DELETED",
}


def _changed(kind: type[Resource], key: Key) -> Conflict:
    return Conflict(f"{kind.KIND} {key} has changed since it was read", hint="Read it again and repeat the change.")


def _refuse_new_finalizers(obj: Resource, stored: Doc) -> None:
    if not set(obj.metadata.finalizers) <= set(stored["finalizers"]):
        raise InvalidInput(
            f"metadata.finalizers: {obj.KIND} {obj.key} is being deleted, so it cannot get new finalizers",
            field="metadata.finalizers",
        )


def _terms(metadata: Doc) -> set[str]:
    """By what an object is found: its labels and its owners."""
    owners = {f"owner:{owner['uid']}" for owner in metadata["ownerReferences"]}
    return owners.union(_label_terms(metadata["labels"]))


def _label_terms(labels: Mapping[str, str]) -> list[str]:
    return [f"label:{key}={value}" for key, value in labels.items()]
