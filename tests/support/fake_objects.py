"""The objects of the fake API server: versions, generations, finalizers, owners, and the history that watches read.

It has no I/O. Its semantics are those that the contract of the store (tests/store/test_contract.py) asks for, and
that suite runs against it and against a real API server.
"""

from __future__ import annotations

import bisect
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from support import fake_patches
from support.fake_kinds import Doc, Matches, Refused, ServedKind, Where, invalid, served_kinds

HISTORY = 20_000
"""Changes of one kind that a watch may ask for. After that it is told that its version is too old."""
_PARTS_OF_METADATA = ("labels", "annotations", "finalizers", "ownerReferences")
ObjectKey = tuple[str, str]
"""The namespace (empty if the kind has none) and the name."""


@dataclass(slots=True)
class Stored:
    """One version of an object, and the same as the server sends it."""

    doc: Doc
    raw: bytes

    @property
    def version(self) -> int:
        return int(self.doc["metadata"]["resourceVersion"])


@dataclass(slots=True)
class HistoryEntry:
    """One change, with the object before it."""

    version: int
    type: str
    new: Stored
    before: Stored | None

    def seen_through(self, matches: Matches | None) -> str:
        """What a watch with a selector calls the change; empty: it does not see it."""
        if matches is None:
            return self.type
        was = self.before is not None and matches(self.before.doc)
        is_now = self.type != "DELETED" and matches(self.new.doc)
        return {(False, True): "ADDED", (True, True): "MODIFIED", (True, False): "DELETED"}.get((was, is_now), "")


@dataclass(slots=True)
class Collection:
    """All objects of one kind, in all namespaces."""

    kind: ServedKind
    objects: dict[ObjectKey, Stored] = field(default_factory=dict)
    history: list[HistoryEntry] = field(default_factory=list)
    forgotten: int = 0
    """The history after this version is known."""
    listeners: list[Callable[[HistoryEntry], None]] = field(default_factory=list)

    def since(self, version: int) -> list[HistoryEntry]:
        """The changes after a version. Raises Refused if they are not known any more."""
        if version < self.forgotten:
            raise Refused(410, "Expired", f"too old resource version: {version} ({self.forgotten})")
        return self.history[bisect.bisect_right(self.history, version, key=lambda entry: entry.version) :]

    def forget(self, keep: int = 0) -> None:
        """Forgets all changes but the last ones."""
        drop = len(self.history) - keep
        if drop > 0:
            self.forgotten = self.history[drop - 1].version
            del self.history[:drop]

    def selected(self, namespace: str, matches: Matches | None) -> Iterator[Stored]:
        for key, stored in sorted(self.objects.items()):
            if (not namespace or key[0] == namespace) and (matches is None or matches(stored.doc)):
                yield stored


class FakeObjects:
    """The content of a cluster.

    Args:
        namespaces: Those that exist from the beginning.
        later: Calls a function soon. The garbage collector works there.
        now: The wall clock.
    """

    def __init__(
        self,
        namespaces: tuple[str, ...] = ("default",),
        *,
        later: Callable[[Callable[[], None]], object],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.version = 1000
        self.collections = {key: Collection(kind) for key, kind in served_kinds().items()}
        self._later = later
        self._now = now
        self._applied: dict[tuple[str, ObjectKey, str], Doc] = {}
        self._uids: set[str] = set()
        self._owned: defaultdict[str, set[tuple[tuple[str, str], ObjectKey]]] = defaultdict(set)
        for namespace in namespaces:
            at = Where("v1", "namespaces")
            self.create(at, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})

    # --- reading ----------------------------------------------------------------------------------------------------

    def collection(self, where: Where) -> Collection:
        """Raises Refused if the kind is not served."""
        found = self.collections.get((where.api_version, where.plural))
        if found is None or (where.namespace and not found.kind.namespaced):
            raise Refused(404, "NotFound", f"the server could not find the requested resource ({where.plural})")
        return found

    def get(self, where: Where) -> Stored:
        """Raises Refused if there is no such object."""
        stored = self.collection(where).objects.get((where.namespace, where.name))
        if stored is None:
            raise Refused(404, "NotFound", f'{where.plural} "{where.name}" not found')
        return stored

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, where: Where, body: Doc, manager: str = "", *, dry_run: bool = False) -> Stored:
        """Stores a new object. Raises Refused."""
        collection = self.collection(where)
        kind, given = collection.kind, body.get("metadata") or {}
        name = given.get("name") or (
            f"{given['generateName']}{uuid.uuid4().hex[:5]}" if given.get("generateName") else ""
        )
        _check_identity(kind, where, body, name)
        if not name:
            raise invalid("name or generateName is required", "metadata.name")
        if kind.namespaced and ("", where.namespace) not in self.collections["v1", "namespaces"].objects:
            raise Refused(404, "NotFound", f'namespaces "{where.namespace}" not found')
        key = (where.namespace, name)
        if key in collection.objects:
            raise Refused(409, "AlreadyExists", f'{where.plural} "{name}" already exists')
        metadata = {"name": name, **({"namespace": where.namespace} if kind.namespaced else {})}
        metadata |= {part: given[part] for part in _PARTS_OF_METADATA if given.get(part)}
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": self._time()}
        if kind.counts_generations:
            metadata["generation"] = 1
        doc = {**body, "apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata}
        if kind.has_status:
            doc.pop("status", None)
        if kind.api_version == "v1" and kind.plural in {"pods", "persistentvolumeclaims"}:
            doc["status"] = {"phase": "Pending"}
        if kind.plural == "customresourcedefinitions":  # all kinds are served from the beginning
            doc["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
        return self._written(collection, key, doc, manager, "Update", "", dry_run=dry_run)

    def replace(self, where: Where, body: Doc, manager: str = "", operation: str = "Update") -> Stored:
        """Replaces an object, or its status, if the version in the body is its own. Raises Refused."""
        collection, before = self.collection(where), self.get(where)
        old, given = before.doc, body.get("metadata") or {}
        _check_identity(collection.kind, where, body, given.get("name", where.name))
        if collection.kind.custom and not given.get("resourceVersion"):
            raise invalid("metadata.resourceVersion: must be specified for an update", "metadata.resourceVersion")
        for condition in ("uid", "resourceVersion"):
            if given.get(condition) and given[condition] != old["metadata"][condition]:
                raise _changed(where)
        if where.sub:
            doc = {**old, "status": body.get("status", {})}
        else:
            kept = {k: v for k, v in old["metadata"].items() if k not in _PARTS_OF_METADATA}
            metadata = kept | {part: given[part] for part in _PARTS_OF_METADATA if given.get(part)}
            doc = {**body, "apiVersion": old["apiVersion"], "kind": old["kind"], "metadata": metadata}
            if collection.kind.has_status:
                doc.pop("status", None)
                doc |= {"status": old["status"]} if "status" in old else {}
        if (
            given.get("managedFields") == [{}] and not where.sub
        ):  # forgets who wrote which field, also for later updates
            doc = {**doc, "metadata": {k: v for k, v in doc["metadata"].items() if k != "managedFields"}}
        if doc == old:
            return before
        _check_finalizers(old, doc)
        self._count_generation(collection.kind, old, doc)
        return self._written(collection, (where.namespace, where.name), doc, manager, operation, where.sub)

    def patch(self, where: Where, patch: Any, content_type: str, manager: str = "") -> Stored:
        """Patches an object; an applied one is created if it does not exist. Raises Refused."""
        if content_type == "application/apply-patch+yaml":
            return self._apply(where, patch, manager)
        old = self.get(where).doc
        doc = (
            fake_patches.json_patched(old, patch)
            if isinstance(patch, list)
            else fake_patches.merge_patched(old, patch)
        )
        return self.replace(where, doc, manager)

    def _apply(self, where: Where, wanted: Doc, manager: str) -> Stored:
        remembered = (f"{where.api_version}/{where.resource}", (where.namespace, where.name), manager)
        if (where.namespace, where.name) not in self.collection(where).objects:
            made = self.create(where, wanted, manager)
            self._applied[remembered] = wanted
            return made
        old = self.get(where).doc
        doc = fake_patches.applied(old, self._applied.get(remembered, {}), wanted)
        stored = self.replace(where, doc, manager, "Apply")
        self._applied[remembered] = wanted
        return stored

    def delete(self, where: Where, options: Doc) -> Stored:
        """Deletes an object, or marks it if something holds it: a finalizer, or the node of a pod. Raises Refused."""
        collection, before = self.collection(where), self.get(where)
        old = before.doc["metadata"]
        for condition, wanted in (options.get("preconditions") or {}).items():
            if old[condition] != wanted:
                raise _changed(where)
        key, asked_for = (where.namespace, where.name), options.get("gracePeriodSeconds")
        on_node = where.plural == "pods" and bool(before.doc["spec"].get("nodeName"))
        default = before.doc["spec"].get("terminationGracePeriodSeconds", 30) if on_node else 0
        grace = int(default if asked_for is None else asked_for)
        if not old.get("finalizers") and not (on_node and grace):
            return self._removed(collection, key)
        shorter = on_node and grace < old.get("deletionGracePeriodSeconds", grace + 1)
        if "deletionTimestamp" in old and not shorter:
            return before
        mark: Doc = {"deletionTimestamp": self._time(), "deletionGracePeriodSeconds": grace}
        if collection.kind.counts_generations:
            mark["generation"] = old["generation"] + 1
        doc = {**before.doc, "metadata": {**old, **mark}}
        return self._written(collection, key, doc, "", "Update", "")

    def removed_by_node(self, namespace: str, name: str) -> None:
        """A pod's containers have ended, so its object goes away."""
        collection = self.collections["v1", "pods"]
        if (namespace, name) in collection.objects:
            self._removed(collection, (namespace, name))

    # --- all of it --------------------------------------------------------------------------------------------------

    def documents(self) -> list[Doc]:
        """Every object, to be kept and restored."""
        return [stored.doc for collection in self.collections.values() for stored in collection.objects.values()]

    def restore(self, documents: Iterable[Doc]) -> None:
        """Takes over objects as they were kept, with their uids and versions. Nobody who watches is told."""
        by_kind = {(one.kind.api_version, one.kind.kind): one for one in self.collections.values()}
        for doc in documents:
            collection, metadata = by_kind[doc["apiVersion"], doc["kind"]], doc["metadata"]
            key, stored = (metadata.get("namespace", ""), metadata["name"]), _stored(doc)
            self.version = max(self.version, stored.version)
            self._note_owners(collection, key, None, stored)
            collection.objects[key] = stored
        for collection in self.collections.values():
            collection.forgotten = self.version

    # --- the parts of a write ---------------------------------------------------------------------------------------

    def _written(
        self,
        collection: Collection,
        key: ObjectKey,
        doc: Doc,
        manager: str,
        operation: str,
        sub: str,
        *,
        dry_run: bool = False,
    ) -> Stored:
        before = collection.objects.get(key)
        metadata = doc["metadata"]
        if "deletionTimestamp" in metadata and not metadata.get("finalizers") and not _ends_on_node(collection, doc):
            return self._removed(collection, key)
        written = metadata.get("managedFields", [])
        if manager and (written or before is None or operation == "Apply"):
            written = fake_patches.managed_fields(doc, written, manager, operation, sub, self._time())
        self.version += not dry_run
        stamped = {
            **metadata,
            "resourceVersion": str(self.version),
            **({"managedFields": written} if written else {}),
        }
        stored = _stored({**doc, "metadata": stamped})
        if not dry_run:
            collection.objects[key] = stored
            self._note_owners(collection, key, before, stored)
            self._announce(collection, HistoryEntry(self.version, "MODIFIED" if before else "ADDED", stored, before))
        return stored

    def _removed(self, collection: Collection, key: ObjectKey) -> Stored:
        before = collection.objects.pop(key)
        self.version += 1
        metadata = {**before.doc["metadata"], "resourceVersion": str(self.version)}
        last = _stored({**before.doc, "metadata": metadata})
        uid = metadata["uid"]
        self._uids.discard(uid)
        for owner in metadata.get("ownerReferences", ()):
            self._owned[owner["uid"]].discard(((collection.kind.api_version, collection.kind.plural), key))
        self._announce(collection, HistoryEntry(self.version, "DELETED", last, before))
        for owned in sorted(self._owned.pop(uid, ())):
            self._later(lambda owned=owned: self._collect(*owned))  # type: ignore[misc]
        return last

    def _announce(self, collection: Collection, entry: HistoryEntry) -> None:
        collection.history.append(entry)
        if len(collection.history) > 2 * HISTORY:
            collection.forget(HISTORY)
        for listener in list(collection.listeners):
            listener(entry)

    def _note_owners(self, collection: Collection, key: ObjectKey, before: Stored | None, stored: Stored) -> None:
        self._uids.add(stored.doc["metadata"]["uid"])
        owners = stored.doc["metadata"].get("ownerReferences", [])
        if before is not None and before.doc["metadata"].get("ownerReferences", []) == owners:
            return
        me = ((collection.kind.api_version, collection.kind.plural), key)
        for owner in owners:
            self._owned[owner["uid"]].add(me)
        if owners:
            self._later(lambda: self._collect(*me))

    def _collect(self, at: tuple[str, str], key: ObjectKey) -> None:
        """Deletes an object whose owners have all gone."""
        stored = self.collections[at].objects.get(key)
        owners = stored.doc["metadata"].get("ownerReferences", ()) if stored else ()
        if owners and not any(owner["uid"] in self._uids for owner in owners):
            self.delete(Where(*at, *key), {})

    @staticmethod
    def _count_generation(kind: ServedKind, old: Doc, doc: Doc) -> None:
        def wanted(one: Doc) -> Doc:
            return {name: value for name, value in one.items() if name not in {"metadata", "status"}}

        if kind.counts_generations and wanted(old) != wanted(doc):
            doc["metadata"] = {**doc["metadata"], "generation": old["metadata"]["generation"] + 1}

    def _time(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")


def _stored(doc: Doc) -> Stored:
    return Stored(doc, json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode())


def _ends_on_node(collection: Collection, doc: Doc) -> bool:
    """Whether the object is a pod whose containers still run, so that its node removes it."""
    return collection.kind.plural == "pods" and bool(doc["metadata"].get("deletionGracePeriodSeconds"))


def _check_identity(kind: ServedKind, where: Where, body: Doc, name: str) -> None:
    """Raises Refused if the body is about another object than the path."""
    if body.get("kind", kind.kind) != kind.kind or body.get("apiVersion", kind.api_version) != kind.api_version:
        raise Refused(400, "BadRequest", f"the object is no {kind.kind} of {kind.api_version}")
    if (where.name and name != where.name) or (body.get("metadata") or {}).get(
        "namespace", where.namespace
    ) != where.namespace:
        raise Refused(400, "BadRequest", "the name in the object is not that in the URL")


def _check_finalizers(old: Doc, doc: Doc) -> None:
    before, after = (set(one["metadata"].get("finalizers", ())) for one in (old, doc))
    if "deletionTimestamp" in old["metadata"] and after - before:
        message = "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted"
        raise invalid(message, "metadata.finalizers")


def _changed(where: Where) -> Refused:
    return Refused(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {where.plural} "{where.name}": the object has been modified; please apply '
        "your changes to the latest version and try again",
    )
