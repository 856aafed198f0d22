"""The rules of the Kubernetes API on SQLite tables: versions, generations, finalizers, owners, the event log.

Each method is one command and runs inside a transaction that its caller opens. Nothing here knows about threads,
asyncio or commits.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple
from uuid import uuid4

import structlog

from bkpool.core.errors import Conflict, Gone, HostFault, InvalidInput, NotFound
from bkpool.core.names import Key
from bkpool.core.resource import R, Resource
from bkpool.store import Listing, WatchEvent
from bkpool.store.reading import Doc, read

log = structlog.get_logger(__name__)

_PAGE_SIZE = 256  # events that are read from the log at once: a limit for the memory of a slow watch
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
    """

    def __init__(self, db: sqlite3.Connection, *, now: Callable[[], datetime], history: int) -> None:
        self._db = db
        self._now = now
        self._history = history
        self._reported: set[str] = set()
        self.touched: set[str] = set()
        """The kinds that were written in this transaction. The code that commits empties it."""

    # --- reading ----------------------------------------------------------------------------------------------------

    def get(self, kind: type[R], key: Key) -> R:
        """See Store.get."""
        return read(kind, self._find(kind, key))

    def list(self, kind: type[R], namespace: str | None, labels: Mapping[str, str]) -> Listing[R]:
        """See Store.list. Objects that this version cannot read are left out, and logged."""
        terms = _label_terms(labels)
        conditions = ["kind = ?"] + ["namespace = ?"] * (namespace is not None)
        conditions += ["uid IN (SELECT uid FROM terms WHERE term = ?)"] * len(terms)
        rows = self._db.execute(
            f"SELECT data FROM objects WHERE {' AND '.join(conditions)} ORDER BY namespace, name",  # noqa: S608 - fixed parts only
            [kind.KIND, *([] if namespace is None else [namespace]), *terms],
        )
        return Listing(tuple(self._readable(kind, (data for (data,) in rows))), str(self._version()))

    def events_after(self, kind: type[R], version: int) -> LogPage:
        """The next events of a kind. Raises Gone if some were removed from the log, or the version is of no use."""
        newest = self._version()
        compacted = self._db.execute("SELECT version FROM compacted WHERE kind = ?", [kind.KIND]).fetchone()
        if version > newest or (compacted and version < compacted[0]):
            raise Gone(
                f"the changes of {kind.KIND} since version {version} are no longer in the log", hint="List again."
            )
        rows = self._db.execute(
            "SELECT version, type, data FROM events WHERE kind = ? AND version > ? ORDER BY version LIMIT ?",
            [kind.KIND, version, _PAGE_SIZE],
        ).fetchall()
        complete = len(rows) < _PAGE_SIZE
        events = [WatchEvent(type_, obj) for _, type_, data in rows for obj in self._readable(kind, [data])]
        return LogPage(events, newest if complete else rows[-1][0], complete)

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, obj: R) -> R:
        """See Store.create."""
        if self._db.execute(_BY_KEY, [obj.KIND, *obj.key]).fetchone():
            raise Conflict(f"{obj.KIND} {obj.key} exists already")
        doc = obj.to_json()
        metadata = doc["metadata"]
        metadata.pop("deletionTimestamp", None)
        metadata.update(uid=str(uuid4()), generation=1, creationTimestamp=self._timestamp())
        self._put("ADDED", doc)
        self._index(doc)
        if self._orphaned(doc):
            self._delete_or_mark(doc)
        return read(type(obj), doc)

    def replace(self, obj: R) -> R:
        """See Store.replace."""
        current = self._unchanged(obj)
        doc = obj.to_json() | {"status": current["status"]}
        metadata, stored = doc["metadata"], current["metadata"]
        for field in _SET_BY_STORE:
            metadata.pop(field, None)
        metadata.update({field: stored[field] for field in _SET_BY_STORE if field in stored})
        if doc == current:
            return read(type(obj), doc)
        if doc["spec"] != current["spec"]:
            metadata["generation"] += 1
        if "deletionTimestamp" in metadata:
            _refuse_new_finalizers(obj, stored)
        if "deletionTimestamp" in metadata and not metadata["finalizers"]:
            self._remove(doc)
        else:
            self._put("MODIFIED", doc)
            self._index(doc)
        return read(type(obj), doc)

    def replace_status(self, obj: R) -> R:
        """See Store.replace_status."""
        current = self._unchanged(obj)
        doc = current | {"status": obj.to_json()["status"]}
        if doc != current:
            self._put("MODIFIED", doc)
        return read(type(obj), doc)

    def delete(self, kind: type[Resource], key: Key, uid: str | None, version: str | None) -> None:
        """See Store.delete."""
        doc = self._find(kind, key)
        metadata = doc["metadata"]
        if uid not in {None, metadata["uid"]} or version not in {None, metadata["resourceVersion"]}:
            raise _changed(kind, key)
        self._delete_or_mark(doc)

    def compact(self) -> None:
        """Removes the events that are older than the history that the log keeps."""
        limit = self._version() - self._history
        if not self._db.execute("SELECT 1 FROM events WHERE version <= ? LIMIT 1", [limit]).fetchone():
            return
        self._db.execute(
            "INSERT OR REPLACE INTO compacted SELECT kind, MAX(version) FROM events WHERE version <= ? GROUP BY kind",
            [limit],
        )
        self._db.execute("DELETE FROM events WHERE version <= ?", [limit])

    # --- the rules --------------------------------------------------------------------------------------------------

    def _delete_or_mark(self, doc: Doc) -> None:
        """Deletes an object, or only marks it as deleted while it has finalizers.

        The mark raises the generation, as in Kubernetes.
        """
        metadata = doc["metadata"]
        if not metadata["finalizers"]:
            self._remove(doc)
        elif "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = self._timestamp()
            metadata["generation"] += 1
            self._put("MODIFIED", doc)

    def _remove(self, doc: Doc) -> None:
        """Removes an object, then the objects that only it owned ("background" deletion in Kubernetes)."""
        uid = doc["metadata"]["uid"]
        self._db.execute("DELETE FROM objects WHERE uid = ?", [uid])
        self._db.execute("DELETE FROM terms WHERE uid = ?", [uid])
        self._log_event("DELETED", doc)
        owned = self._db.execute("SELECT uid FROM terms WHERE term = ?", [f"owner:{uid}"]).fetchall()
        for (dependent,) in owned:
            row = self._db.execute("SELECT data FROM objects WHERE uid = ?", [dependent]).fetchone()
            if row and self._orphaned(other := json.loads(row[0])):
                self._delete_or_mark(other)

    def _orphaned(self, doc: Doc) -> bool:
        owners = [owner["uid"] for owner in doc["metadata"]["ownerReferences"]]
        alive = (self._db.execute("SELECT 1 FROM objects WHERE uid = ?", [uid]).fetchone() for uid in owners)
        return bool(owners) and not any(alive)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _find(self, kind: type[Resource], key: Key) -> Doc:
        row = self._db.execute(_BY_KEY, [kind.KIND, *key]).fetchone()
        if row is None:
            raise NotFound(f"there is no {kind.KIND} {key}")
        doc: Doc = json.loads(row[0])
        return doc

    def _unchanged(self, obj: Resource) -> Doc:
        current = self._find(type(obj), obj.key)
        if obj.metadata.resource_version != current["metadata"]["resourceVersion"]:
            raise _changed(type(obj), obj.key)
        return current

    def _put(self, event: str, doc: Doc) -> None:
        self._log_event(event, doc)
        metadata = doc["metadata"]
        self._db.execute(
            "INSERT INTO objects (uid, kind, namespace, name, data) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (uid) DO UPDATE SET data = excluded.data",
            [metadata["uid"], doc["kind"], metadata["namespace"], metadata["name"], json.dumps(doc)],
        )

    def _log_event(self, event: str, doc: Doc) -> None:
        """Gives the object the next version, and writes the event to the log."""
        version = self._version() + 1
        doc["metadata"]["resourceVersion"] = str(version)
        self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", [version, doc["kind"], event, json.dumps(doc)])
        self.touched.add(doc["kind"])

    def _index(self, doc: Doc) -> None:
        metadata = doc["metadata"]
        uid = metadata["uid"]
        owners = {f"owner:{owner['uid']}" for owner in metadata["ownerReferences"]}
        self._db.execute("DELETE FROM terms WHERE uid = ?", [uid])
        self._db.executemany(
            "INSERT INTO terms (term, uid) VALUES (?, ?)",
            [(term, uid) for term in owners.union(_label_terms(metadata["labels"]))],
        )

    def _version(self) -> int:
        version: int = self._db.execute("SELECT COALESCE(MAX(version), 0) FROM events").fetchone()[0]
        return version

    def _timestamp(self) -> str:
        """Whole seconds, as in Kubernetes, so that no code relies on a finer time."""
        return self._now().replace(microsecond=0).isoformat().replace("+00:00", "Z")

    def _readable(self, kind: type[R], rows: Iterable[str]) -> Iterator[R]:
        for data in rows:
            doc = json.loads(data)
            try:
                yield read(kind, doc)
            except HostFault as error:
                uid = doc["metadata"]["uid"]
                if uid not in self._reported:
                    self._reported.add(uid)
                    log.warning("store.object_skipped", kind=kind.KIND, reason=error.message)


_BY_KEY = "SELECT data FROM objects WHERE kind = ? AND namespace = ? AND name = ?"


def _changed(kind: type[Resource], key: Key) -> Conflict:
    return Conflict(f"{kind.KIND} {key} has changed since it was read", hint="Read it again and repeat the change.")


def _refuse_new_finalizers(obj: Resource, stored: Doc) -> None:
    if not set(obj.metadata.finalizers) <= set(stored["finalizers"]):
        raise InvalidInput(
            f"metadata.finalizers: {obj.KIND} {obj.key} is being deleted, so it cannot get new finalizers",
            field="metadata.finalizers",
        )


def _label_terms(labels: Mapping[str, str]) -> list[str]:
    return [f"label:{key}={value}" for key, value in labels.items()]
