"""One HTTP session to one API server, with documents in and documents out.

It turns error responses into bkpool's errors. It caches
nothing. It retries only a request that the server refused to start (429), a few times and briefly.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Self

import aiohttp
from aiohttp.http import HttpProcessingError

from bkpool.core.errors import HostFault, Unavailable
from bkpool.kube.access import ClusterAccess
from bkpool.kube.documents import Doc, document, without_managed_fields
from bkpool.kube.errors import error_of
from bkpool.kube.limits import KubeLimits

if TYPE_CHECKING:
    from kubernetes.aio.client import Configuration

FIELD_MANAGER = "bkpool"
PAGE = 250
"""Objects in one page of a list. Reading it takes a few milliseconds, in which nothing else can happen."""
HTTP_ERROR, TOO_MANY = 400, 429
_MOST_ATTEMPTS = 4  # of a request that the server refuses with 429
_LONGEST_PAUSE = 2.0  # seconds between them, whatever Retry-After says
_LARGEST_EVENT = 8 << 20  # bytes: etcd takes objects of up to 1.5 MiB; JSON may write six bytes for one character


class KubeApi:
    """The API of one cluster. Every method may raise Unavailable, and Forbidden if a right is missing.

    Args:
        session: Has the server as base URL, and its TLS settings.
        configuration: Gives the bearer token, and renews it.
        namespace: The default namespace: that of the kubeconfig's context, or this pod's.
        limits: How long a watch lasts and may be silent. Those of a request are in the session.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        configuration: Configuration,
        namespace: str,
        limits: KubeLimits = KubeLimits(),  # noqa: B008 - immutable
    ) -> None:
        self._session = session
        self._configuration = configuration
        self.namespace = namespace
        self.limits = limits

    @classmethod
    async def connect(cls, access: ClusterAccess, limits: KubeLimits = KubeLimits()) -> Self:  # noqa: B008 - as above
        """Reads the kubeconfig or the pod's credentials. Sends nothing to the server yet.

        Args:
            access: Which cluster to use.
            limits: How long to wait for it.

        Raises:
            HostFault: There is no kubeconfig, or it cannot be used.
            InvalidInput: The kubeconfig does not have the context.
        """
        configuration, namespace = await access.load()
        try:
            session = _session(configuration, limits)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise HostFault(
                f"{access.file_from}: the certificates for {configuration.host} cannot be used: {error}",
                hint="Create the kubeconfig again (with kind: `bkpool down`, then `bkpool up`).",
            ) from None
        return cls(session, configuration, namespace, limits)

    async def close(self) -> None:
        """Closes the session."""
        await self._session.close()

    @property
    def server(self) -> str:
        """The server's URL."""
        return str(self._configuration.host)

    # --- one object -------------------------------------------------------------------------------------------------

    async def get(self, path: str, **params: str) -> Doc:
        """Reads one object. Raises NotFound."""
        return await self._request_json("GET", path, params)

    async def create(self, path: str, body: Doc, **params: str) -> Doc:
        """Creates an object in a collection. Raises Conflict if the name is taken, or InvalidInput."""
        return await self._request_json("POST", path, {"fieldManager": FIELD_MANAGER, **params}, body)

    async def replace(self, path: str, body: Doc) -> Doc:
        """Replaces an object. Raises Conflict (its resourceVersion has changed), NotFound or InvalidInput."""
        return await self._request_json("PUT", path, {"fieldManager": FIELD_MANAGER}, body)

    async def patch(self, path: str, body: Doc | list[Doc]) -> Doc:
        """Patches an object: a dict is a merge patch (RFC 7386), a list a JSON patch (RFC 6902). Raises NotFound."""
        kind = "application/json-patch+json" if isinstance(body, list) else "application/merge-patch+json"
        return await self._request_json("PATCH", path, {"fieldManager": FIELD_MANAGER}, body, content_type=kind)

    async def apply(self, path: str, body: Doc) -> Doc:
        """Applies on the server's side: the fields in this body get these values, all other fields stay."""
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._request_json("PATCH", path, params, body, content_type="application/apply-patch+yaml")

    async def delete(
        self, path: str, *, uid: str | None = None, resource_version: str | None = None, grace: int | None = None
    ) -> None:
        """Deletes an object. The cluster then deletes, in the background, what it owned.

        Args:
            path: The object's path.
            uid: The uid that it must have; otherwise Conflict is raised.
            resource_version: The version that it must have; otherwise Conflict is raised.
            grace: Seconds that a pod gets to stop.
        """
        body: Doc = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if conditions := {
            key: value for key, value in (("uid", uid), ("resourceVersion", resource_version)) if value is not None
        }:
            body["preconditions"] = conditions
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await self._request_json("DELETE", path, {}, body)

    async def text(self, path: str, **params: str) -> str:
        """Reads something that is not JSON, such as the log of a pod."""
        return (await self._request("GET", path, params, None, "")).decode(errors="replace")

    # --- many -------------------------------------------------------------------------------------------------------

    async def list(self, path: str, **params: str) -> tuple[list[Doc], str]:
        """All objects of a collection at one moment, read in pages, and the version from which to watch."""
        items: list[Doc] = []
        page = {**params, "limit": str(PAGE)}
        while True:
            listing = await self._request_json("GET", path, page)
            # The items of a list do not carry their kind.
            kind, version = str(listing.get("kind", "")).removesuffix("List"), listing.get("apiVersion")
            found = listing.get("items") or []
            items += [{"apiVersion": version, "kind": kind, **without_managed_fields(item)} for item in found]
            metadata = listing.get("metadata")
            if not isinstance(metadata, dict) or "resourceVersion" not in metadata:
                raise _no_answer(f"GET {path}", "it is no list")
            if not metadata.get("continue"):
                return items, metadata["resourceVersion"]
            page["continue"] = metadata["continue"]

    async def watch(self, path: str, since: str, **params: str) -> AsyncGenerator[Doc, None]:
        """Every event after `since`, bookmarks included, until the server ends the watch (every few minutes).

        Raises:
            Gone: `since` is too long ago.
            Unavailable: The server cannot be reached, or has sent nothing for `watch_silence`.
        """
        query = {**params, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": since}
        limits = self.limits
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=limits.connect_timeout, sock_read=limits.watch_silence
        )
        try:
            async with self._session.get(
                path, params=query, headers=await self._headers(), timeout=timeout
            ) as answer:
                if answer.status >= HTTP_ERROR:
                    raise error_of(answer.status, await answer.read(), what=f"watch {path}")
                try:
                    while line := await answer.content.readline(max_line_length=_LARGEST_EVENT):
                        event = document(line)
                        if not isinstance(event.get("object"), dict) or "type" not in event:
                            raise _no_answer(f"watch {path}", "it is no event")
                        if event["type"] == "ERROR":
                            status = event["object"]
                            raise error_of(status.get("code", 500), json.dumps(status).encode(), what=f"watch {path}")
                        without_managed_fields(event["object"])
                        yield event
                finally:
                    # A watch is mostly closed in the middle. An orderly TLS shutdown would outlive the event loop.
                    if answer.connection is not None and answer.connection.transport is not None:
                        answer.connection.transport.abort()
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError, ValueError) as error:
            raise _unreachable(f"watch {path}", error) from None

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _request_json(
        self, method: str, path: str, params: Mapping[str, str], body: object = None, *, content_type: str = ""
    ) -> Doc:
        raw = await self._request(method, path, params, body, content_type or "application/json")
        try:
            found = document(raw)
        except ValueError as error:
            raise _no_answer(f"{method} {path}", str(error)) from None
        return without_managed_fields(found) if isinstance(found.get("metadata"), dict) else found

    async def _request(
        self, method: str, path: str, params: Mapping[str, str], body: object, content_type: str
    ) -> bytes:
        what = f"{method} {path}"
        data = None if body is None else json.dumps(body).encode()
        for last in (*[False] * (_MOST_ATTEMPTS - 1), True):
            headers = await self._headers()
            if data is not None:
                headers["Content-Type"] = content_type
            try:
                async with self._session.request(method, path, params=params, data=data, headers=headers) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _unreachable(what, error) from None
            if answer.status < HTTP_ERROR:
                return raw
            refused = error_of(answer.status, raw, what=what, retry_after=answer.headers.get("Retry-After"))
            if answer.status != TOO_MANY or last:
                raise refused
            await asyncio.sleep(min(refused.retry_after or _LONGEST_PAUSE, _LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    async def _headers(self) -> dict[str, str]:
        """The bearer token, which the ServiceAccount's file or an exec plug-in may have renewed meanwhile."""
        settings = await self._configuration.auth_settings()
        token = settings.get("BearerToken", {}).get("value")
        return {"Authorization": str(token)} if token else {}


def _unreachable(what: str, error: Exception) -> Unavailable:
    reason = str(error) or type(error).__name__
    return Unavailable(
        f"Kubernetes: {what}: the API server does not answer ({reason})",
        hint="Check that the cluster is up: `kubectl get nodes`, or `docker ps` for kind.",
        retry_after=5,
    )


def _no_answer(what: str, reason: str) -> Unavailable:
    return Unavailable(
        f"Kubernetes: {what}: what came is no answer of an API server ({reason})",
        hint="Check what is between bkpool and the API server, such as a proxy or a load balancer.",
        retry_after=5,
    )


def _session(configuration: Configuration, limits: KubeLimits) -> aiohttp.ClientSession:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # the CA of many clusters has no key identifier
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return aiohttp.ClientSession(
        base_url=configuration.host.rstrip("/") + "/",
        connector=aiohttp.TCPConnector(limit=0, ssl=context, keepalive_timeout=limits.idle_timeout),
        timeout=aiohttp.ClientTimeout(total=limits.request_timeout, sock_connect=limits.connect_timeout),
        headers={"User-Agent": "bkpool", "Accept": "application/json"},
        proxy=configuration.proxy,
    )
