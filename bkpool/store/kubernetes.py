"""The Store as custom resources of a Kubernetes cluster, shared by several replicas and kubectl.

It writes only the fields that bkpool owns, and decides nothing by what it has written. An object that cannot be read
(written by another version, or wrong) never hides or delays another object.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from bkpool.core.errors import BkpoolError, Conflict, Gone, InvalidInput, NotFound, Unavailable
from bkpool.core.names import API_VERSION, Key
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable
from bkpool.core.worker import Worker
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.watching import endless_watch
from bkpool.store import Listing, Store, WatchEvent
from bkpool.store.bounds import StoreBounds
from bkpool.store.cluster_errors import errors_about, errors_in
from bkpool.store.own_writes import OwnWrites
from bkpool.store.reading import read, read_or_note

_GIVEN = ("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences")
"""The metadata fields that bkpool writes. The server sets the others."""
_FORGET_WRITERS: Doc = {"managedFields": [{}]}
"""In a write of metadata and spec: the server forgets who wrote which field, and later writes do not change that.
Only for workers, which nobody else writes. It is almost half of such an object, in each event of each watch."""
_AT_ONCE = 32
"""Documents of a list that are read without a pause: about 5 ms."""


class KubernetesStore(Store):
    """A Store for one event loop.

    Args:
        api: The cluster. Its creator closes it.
        bounds: Which objects of the cluster this store has. All others do not exist for it.
        jitter: Returns a number from 0 to 1, to spread the lengths of watches.
    """

    def __init__(
        self,
        api: KubeApi,
        bounds: StoreBounds = StoreBounds(),  # noqa: B008 - immutable
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._api = api
        self._bounds = bounds
        self._jitter = jitter
        self._own = OwnWrites()

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """See Store."""
        key = Key(namespace, name)
        with errors_about(kind, key):
            return read(kind, await self._api.get(self._path(kind, key)))

    async def list(
        self, kind: type[R], *, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Listing[R]:
        """See Store."""
        scopes = self._bounds.scopes(kind) if namespace is None else (namespace,)
        found: list[R | Unreadable] = []
        versions = []
        for scope in scopes:
            if self._bounds.has(kind, scope):
                with errors_in(kind, scope):
                    docs, version = await self._api.list(
                        paths.custom(kind.PLURAL, scope), **self._bounds.selectors(kind, labels)
                    )
                versions.append(version)
                found += await _all_read(kind, docs)
        return Listing(
            tuple(obj for obj in found if not isinstance(obj, Unreadable)),
            min(versions, key=int, default="0"),
            tuple(obj for obj in found if isinstance(obj, Unreadable)),
        )

    def scopes(self, kind: type[Resource]) -> tuple[str | None, ...]:
        """See Store."""
        return self._bounds.scopes(kind)

    async def answers(self) -> None:
        """See Store. The mirror's watches tell when the API server is gone."""

    async def watch(
        self, kind: type[R], since: str, *, namespace: str | None = None
    ) -> AsyncGenerator[WatchEvent[R], None]:
        """See Store."""
        if not since.isdecimal() or int(since) == 0:  # to Kubernetes, 0 means "any version"
            raise Gone(f"{since[:40]!r} is not a version of this store", hint="List again.")
        path = paths.custom(kind.PLURAL, self._scope(kind, namespace))
        selectors = self._bounds.selectors(kind)
        with errors_in(kind, namespace):
            async with aclosing(endless_watch(self._api, path, since, jitter=self._jitter, **selectors)) as events:
                async for event in events:
                    if event["type"] != "BOOKMARK":
                        doc = event["object"]
                        yield WatchEvent(event["type"], self._own.object_of(kind, doc) or read_or_note(kind, doc))

    # --- writing ----------------------------------------------------------------------------------------------------

    async def create(self, obj: R) -> R:
        """See Store. A status that is not the default needs a second write: Kubernetes ignores it in the first."""
        if not self._bounds.has(type(obj), obj.key.namespace):
            raise _not_here(obj)
        doc = obj.to_json()
        body = {"apiVersion": API_VERSION, "kind": obj.KIND, "metadata": _given(doc["metadata"]), "spec": doc["spec"]}
        try:
            path = paths.custom(obj.PLURAL, obj.key.namespace)
            with errors_in(type(obj), obj.key.namespace):
                created = self._own.read(type(obj), await self._api.create(path, body))
        except Conflict:
            raise Conflict(f"{obj.KIND} {obj.key} exists already") from None
        except InvalidInput as error:
            raise _refused(obj, error) from None
        except Unavailable:
            found = await self._written(obj, "metadata", "spec")
            if found is None:
                raise
            created = found
        if created.to_json()["status"] == doc["status"]:
            return created
        return await self.replace_status(obj.but(metadata=created.metadata))

    async def replace(self, obj: R) -> R:
        """See Store."""
        return await self._put(obj, None, "metadata", "spec")

    async def replace_status(self, obj: R) -> R:
        """See Store."""
        return await self._put(obj, "status", "status")

    async def patch_status(self, found: Unreadable, fields: Mapping[str, Any]) -> None:
        """See Store."""
        given = {field: found.document[field] for field in ("apiVersion", "kind", "metadata")}
        body = {**given, "status": {**found.status, **fields}}
        with errors_about(found.kind, found.key):
            await self._api.replace(self._path(found.kind, found.key, "status"), body)

    async def delete(
        self,
        kind: type[R],
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> None:
        """See Store."""
        key = Key(namespace, name)
        with errors_about(kind, key):
            await self._api.delete(self._path(kind, key), uid=uid, resource_version=resource_version)

    async def _put(self, obj: R, sub: str | None, *parts: str) -> R:
        """Writes these parts, if the object still has the version that was read."""
        metadata = _given(obj.part("metadata")) | {"resourceVersion": obj.metadata.resource_version}
        metadata |= _FORGET_WRITERS if isinstance(obj, Worker) and sub is None else {}
        body = {"apiVersion": API_VERSION, "kind": obj.KIND, "metadata": metadata, parts[-1]: obj.part(parts[-1])}
        with errors_about(type(obj), obj.key):
            try:
                return self._own.read(type(obj), await self._api.replace(self._path(type(obj), obj.key, sub), body))
            except InvalidInput as error:
                raise _refused(obj, error) from None
            except (Conflict, Unavailable):
                written = await self._written(obj, *parts, uid=obj.uid)
                if written is None:
                    raise
                return written

    async def _written(self, obj: R, *parts: str, uid: str = "") -> R | None:
        """The stored object, if it has what was to be written: then the write succeeded, and its response was lost.

        That happens after a time-out. It also happens when a connection breaks during a PUT: the HTTP client repeats
        the request, which then conflicts with the first one. Without this check, a lease that was written in this way
        would stay unused until it expires.
        """
        try:
            current = await self.get(type(obj), *obj.key)
        except BkpoolError:
            return None
        same = uid in {"", current.uid} and _content(current, parts) == _content(obj, parts)
        return current if same else None

    # --- bounds -----------------------------------------------------------------------------------------------------

    def _path(self, kind: type[Resource], key: Key, sub: str | None = None) -> str:
        """The path of an object. Raises NotFound if it is outside of the bounds."""
        if not self._bounds.has(kind, key.namespace):
            raise NotFound(f"there is no {kind.KIND} {key}")
        return paths.custom(kind.PLURAL, key.namespace, key.name, sub)

    def _scope(self, kind: type[Resource], namespace: str | None) -> str | None:
        """The scope to watch. Without a namespace there must be only one."""
        scopes = self._bounds.scopes(kind)
        if namespace is None and len(scopes) == 1:
            return scopes[0]
        if namespace not in scopes:
            raise InvalidInput(f"{kind.KIND} is not watched in namespace {namespace!r}, but in {scopes}")
        return namespace


async def _all_read(kind: type[R], docs: Sequence[Doc]) -> list[R | Unreadable]:
    """The objects that these documents describe. The loop gets its turn in between."""
    found: list[R | Unreadable] = []
    for start in range(0, len(docs), _AT_ONCE):
        found += [read_or_note(kind, doc) for doc in docs[start : start + _AT_ONCE]]
        await asyncio.sleep(0)
    return found


def _given(metadata: Doc) -> Doc:
    return {field: metadata[field] for field in _GIVEN}


def _content(obj: Resource, parts: tuple[str, ...]) -> Doc:
    return {part: _given(obj.part(part)) if part == "metadata" else obj.part(part) for part in parts}


def _not_here(obj: Resource) -> InvalidInput:
    return InvalidInput(
        f"{obj.KIND} {obj.key}: this installation has no pools in namespace {obj.key.namespace!r}",
        hint=f"Add --pool-namespace {obj.key.namespace}, or use another namespace.",
        field="metadata.namespace",
    )


def _refused(obj: Resource, error: InvalidInput) -> InvalidInput:
    return InvalidInput(f"{obj.KIND} {obj.key}: {error.message}", hint=error.hint, field=error.field)
