"""The Store as custom resources of a Kubernetes cluster, shared by several replicas and kubectl.

It writes only the fields that bkpool owns, and remembers nothing. An object that cannot be read (written by another
version, or wrong) never hides or delays another object.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from bkpool.core.errors import BkpoolError, Conflict, Gone, InvalidInput, NotFound, Unavailable
from bkpool.core.names import API_VERSION, Key
from bkpool.core.resource import R, Resource
from bkpool.core.unreadable import Unreadable
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.watching import endless_watch
from bkpool.store import Listing, Store, WatchEvent
from bkpool.store.reading import read, read_or_note

_GIVEN = ("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences")
"""The metadata fields that bkpool writes. The server sets the others."""


class KubernetesStore(Store):
    """A Store for one event loop.

    Args:
        api: The cluster. Its creator closes it.
        namespace: The only namespace that is listed and watched; None: all of them.
        jitter: Returns a number from 0 to 1, to spread the lengths of watches.
    """

    def __init__(
        self, api: KubeApi, *, namespace: str | None = None, jitter: Callable[[], float] = random.random
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._jitter = jitter

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """See Store."""
        key = Key(namespace, name)
        with _errors_about(kind, key):
            return _read(kind, await self._api.get(_path(kind, key)))

    async def list(
        self, kind: type[R], *, namespace: str | None = None, labels: Mapping[str, str] | None = None
    ) -> Listing[R]:
        """See Store."""
        scope = self._namespace if namespace is None else namespace
        params = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())} if labels else {}
        docs, version = await self._api.list(paths.custom(kind.PLURAL, scope), **params)
        found = [_read_or_note(kind, doc) for doc in docs]
        return Listing(
            tuple(obj for obj in found if not isinstance(obj, Unreadable)),
            version,
            tuple(obj for obj in found if isinstance(obj, Unreadable)),
        )

    async def answers(self) -> None:
        """See Store. The mirror's watches tell when the API server is gone."""

    async def watch(self, kind: type[R], since: str) -> AsyncGenerator[WatchEvent[R], None]:
        """See Store."""
        if not since.isdecimal() or int(since) == 0:  # to Kubernetes, 0 means "any version"
            raise Gone(f"{since[:40]!r} is not a version of this store", hint="List again.")
        path = paths.custom(kind.PLURAL, self._namespace)
        async with aclosing(endless_watch(self._api, path, since, jitter=self._jitter)) as events:
            async for event in events:
                if event["type"] != "BOOKMARK":
                    yield WatchEvent(event["type"], _read_or_note(kind, event["object"]))

    # --- writing ----------------------------------------------------------------------------------------------------

    async def create(self, obj: R) -> R:
        """See Store. A status that is not the default needs a second write: Kubernetes ignores it in the first."""
        doc = obj.to_json()
        body = {"apiVersion": API_VERSION, "kind": obj.KIND, "metadata": _given(doc), "spec": doc["spec"]}
        try:
            created = _read(type(obj), await self._api.create(paths.custom(obj.PLURAL, obj.key.namespace), body))
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
        body = {**found.document, "status": {**found.status, **fields}}
        with _errors_about(found.kind, found.key):
            await self._api.replace(_path(found.kind, found.key, "status"), body)

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
        with _errors_about(kind, key):
            await self._api.delete(_path(kind, key), uid=uid, resource_version=resource_version)

    async def _put(self, obj: R, sub: str | None, *parts: str) -> R:
        """Writes these parts, if the object still has the version that was read."""
        doc = obj.to_json()
        metadata = _given(doc) | {"resourceVersion": obj.metadata.resource_version}
        body = {"apiVersion": API_VERSION, "kind": obj.KIND, "metadata": metadata, parts[-1]: doc[parts[-1]]}
        with _errors_about(type(obj), obj.key):
            try:
                return _read(type(obj), await self._api.replace(_path(type(obj), obj.key, sub), body))
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


def _read(kind: type[R], doc: Doc) -> R:
    return read(kind, _without_writers(doc))


def _read_or_note(kind: type[R], doc: Doc) -> R | Unreadable:
    return read_or_note(kind, _without_writers(doc))


def _without_writers(doc: Doc) -> Doc:
    doc["metadata"].pop("managedFields", None)  # which client wrote which field: long, and not used here
    return doc


def _given(doc: Doc) -> Doc:
    return {field: doc["metadata"][field] for field in _GIVEN}


def _content(obj: Resource, parts: tuple[str, ...]) -> Doc:
    doc = obj.to_json()
    return {part: _given(doc) if part == "metadata" else doc[part] for part in parts}


def _path(kind: type[Resource], key: Key, sub: str | None = None) -> str:
    return paths.custom(kind.PLURAL, key.namespace, key.name, sub)


@contextmanager
def _errors_about(kind: type[Resource], key: Key) -> Iterator[None]:
    """Turns errors of the API server into those of the Store, which name the object."""
    try:
        yield
    except NotFound:
        raise NotFound(f"there is no {kind.KIND} {key}") from None
    except Conflict:
        raise Conflict(
            f"{kind.KIND} {key} has changed since it was read", hint="Read it again and repeat the change."
        ) from None


def _refused(obj: Resource, error: InvalidInput) -> InvalidInput:
    return InvalidInput(f"{obj.KIND} {obj.key}: {error.message}", hint=error.hint, field=error.field)
