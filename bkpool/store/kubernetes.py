"""The Store as custom resources of a Kubernetes cluster, shared by several replicas and kubectl.

It writes only the fields that bkpool owns, and caches nothing. An object that cannot be read (written by another
version, or wrong) is left out and reported; it never hides or delays another object.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager

import structlog

from bkpool.core.errors import BkpoolError, Conflict, Gone, HostFault, InvalidInput, NotFound, Unavailable
from bkpool.core.names import API_VERSION, Key
from bkpool.core.resource import R, Resource
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.watching import endless_watch
from bkpool.store import Listing, Store, WatchEvent
from bkpool.store.reading import read

log = structlog.get_logger(__name__)

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
        self._unreadable: dict[tuple[str, Key], tuple[str, str]] = {}

    @property
    def unreadable(self) -> Mapping[tuple[str, Key], str]:
        """Why objects cannot be read, by kind and key, as the last list or watch found them."""
        return {where: reason for where, (_, reason) in self._unreadable.items()}

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get(self, kind: type[R], namespace: str, name: str) -> R:
        """See Store. Raises HostFault (`Unreadable`) if the object cannot be read."""
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
        if not labels and scope == self._namespace:
            self._forget_all_but(kind, {paths.key_of(doc) for doc in docs})
        found = [(paths.key_of(doc), self._readable(kind, doc)) for doc in docs]
        return Listing(
            tuple(obj for _, obj in found if obj is not None),
            version,
            frozenset(key for key, obj in found if obj is None),
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
                if event["type"] != "BOOKMARK" and (known := self._event(kind, event)):
                    yield known

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

    # --- unreadable objects -----------------------------------------------------------------------------------------

    def _event(self, kind: type[R], event: Doc) -> WatchEvent[R] | None:
        doc = event["object"]
        key, obj = paths.key_of(doc), self._readable(kind, doc)
        if event["type"] == "DELETED":
            self._unreadable.pop((kind.KIND, key), None)
            if obj is None:
                # A reader may still have it as it was when it could be read. Only a list says that it was deleted.
                raise Gone(f"{kind.KIND} {key} was deleted in a state that cannot be read", hint="List again.")
        return None if obj is None else WatchEvent(event["type"], obj)

    def _readable(self, kind: type[R], doc: Doc) -> R | None:
        where, version = (kind.KIND, paths.key_of(doc)), doc["metadata"]["resourceVersion"]
        try:
            obj = _read(kind, doc)
        except HostFault as error:
            if self._unreadable.get(where, ("", ""))[0] != version:
                log.warning("store.object_skipped", kind=kind.KIND, reason=error.message)
            self._unreadable[where] = (version, error.message)
            return None
        self._unreadable.pop(where, None)
        return obj

    def _forget_all_but(self, kind: type[Resource], keys: set[Key]) -> None:
        for where in [where for where in self._unreadable if where[0] == kind.KIND and where[1] not in keys]:
            del self._unreadable[where]


def _read(kind: type[R], doc: Doc) -> R:
    doc["metadata"].pop("managedFields", None)  # which client wrote which field: long, and not used here
    return read(kind, doc)


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
