"""One HTTP session to one API server, with documents in and documents out.

It reads access as kubectl does, asks, and turns answers into bkpool's errors. It keeps no copy of anything and tries
again only what the server has refused to begin (429), a few times and briefly.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from aiohttp.http import HttpProcessingError

from bkpool.core.errors import BkpoolError, HostFault, Unavailable
from bkpool.kube.errors import error_of

if TYPE_CHECKING:
    from kubernetes.aio.client import Configuration

Doc = dict[str, Any]

FIELD_MANAGER = "bkpool"
PAGE = 500
"""Objects in one page of a list, as in client-go's reflector."""
REQUEST_TIMEOUT = 15.0
"""Seconds for one request. The API server itself gives up after 60, but a lease waits for this."""
SILENCE_TIMEOUT = 100.0
"""Seconds without a byte after which a watch counts as frozen: a server sends a bookmark about every minute
(Kubernetes API concepts, "watch bookmarks")."""
IDLE_TIMEOUT = 60.0
"""Seconds that an idle connection is kept: a TLS handshake costs a lease some 5 ms. The server's own limit is 90."""
HTTP_ERROR, TOO_MANY = 400, 429
_REFUSED_TRIES = 4
_LONGEST_PAUSE = 2.0
_LARGEST_EVENT = 8 << 20  # bytes: etcd takes objects of 1.5 MiB, and JSON may write six characters for one
_IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """Which cluster, and as whom. Nothing given: this pod's own cluster, else the user's default kubeconfig."""

    kubeconfig: Path | None = None
    context: str | None = None


class KubeApi:
    """The API of one cluster. Every method may raise Unavailable, and Forbidden where a right is missing.

    Args:
        session: With the server as base URL and its TLS.
        configuration: Whence the bearer token comes; it renews it.
        namespace: The namespace of the access: the context's, or this pod's.
    """

    def __init__(self, session: aiohttp.ClientSession, configuration: Configuration, namespace: str) -> None:
        self._session = session
        self._configuration = configuration
        self.namespace = namespace

    @classmethod
    async def connect(cls, access: ClusterAccess) -> Self:
        """Reads the access; asks the server nothing yet.

        Raises:
            HostFault: There is no access, or it cannot be read.
        """
        configuration, namespace = await _configuration(access)
        try:
            session = _session(configuration)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise HostFault(
                f"kubeconfig: the certificates for {configuration.host} cannot be used: {error}",
                hint="Write the kubeconfig again (kind: `bkpool down`, `bkpool up`).",
            ) from None
        return cls(session, configuration, namespace)

    async def close(self) -> None:
        """Ends the session."""
        await self._session.close()

    @property
    def server(self) -> str:
        """The server's URL."""
        return str(self._configuration.host)

    # --- one object -------------------------------------------------------------------------------------------------

    async def get(self, path: str, **params: str) -> Doc:
        """Reads. Raises NotFound."""
        return await self._ask("GET", path, params)

    async def create(self, path: str, body: Doc) -> Doc:
        """Posts to a collection. Raises Conflict if the name is taken, InvalidInput."""
        return await self._ask("POST", path, {"fieldManager": FIELD_MANAGER}, body)

    async def replace(self, path: str, body: Doc) -> Doc:
        """Puts. Raises Conflict (another resourceVersion), NotFound, InvalidInput."""
        return await self._ask("PUT", path, {"fieldManager": FIELD_MANAGER}, body)

    async def patch(self, path: str, body: Doc | list[Doc]) -> Doc:
        """Patches: a dict is a merge patch (RFC 7386), a list a JSON patch (RFC 6902). Raises NotFound."""
        kind = "application/json-patch+json" if isinstance(body, list) else "application/merge-patch+json"
        return await self._ask("PATCH", path, {"fieldManager": FIELD_MANAGER}, body, content_type=kind)

    async def apply(self, path: str, body: Doc) -> Doc:
        """Applies on the server's side: what this body names is so afterwards, the rest stays."""
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._ask("PATCH", path, params, body, content_type="application/apply-patch+yaml")

    async def delete(
        self, path: str, *, uid: str | None = None, resource_version: str | None = None, grace: int | None = None
    ) -> None:
        """Deletes; what it owns follows in the background.

        Args:
            path: Of the object.
            uid: It must have this uid. Another: Conflict.
            resource_version: It must have this version. Another: Conflict.
            grace: Seconds; for pods.
        """
        body: Doc = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if conditions := {
            key: value for key, value in (("uid", uid), ("resourceVersion", resource_version)) if value is not None
        }:
            body["preconditions"] = conditions
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await self._ask("DELETE", path, {}, body)

    async def text(self, path: str, **params: str) -> str:
        """Reads what is no JSON, such as the log of a pod."""
        return (await self._request("GET", path, params, None, "")).decode(errors="replace")

    # --- many -------------------------------------------------------------------------------------------------------

    async def list(self, path: str, **params: str) -> tuple[list[Doc], str]:
        """All of a collection as it was at one moment, read in pages; and the version to watch from."""
        items: list[Doc] = []
        page = {**params, "limit": str(PAGE)}
        while True:
            told = await self._ask("GET", path, page)
            # Items of a list carry no kind of their own.
            kind, version = str(told.get("kind", "")).removesuffix("List"), told.get("apiVersion")
            items += [{"apiVersion": version, "kind": kind, **item} for item in told.get("items") or []]
            metadata = told["metadata"]
            if not metadata.get("continue"):
                return items, metadata["resourceVersion"]
            page["continue"] = metadata["continue"]

    async def watch(self, path: str, since: str, **params: str) -> AsyncGenerator[Doc, None]:
        """Every event after `since`, with bookmarks, until the server ends the watch, as it does every few minutes.

        Raises:
            Gone: `since` is too long ago.
            Unavailable: The server is away, or has been silent for too long.
        """
        asked = {**params, "watch": "true", "allowWatchBookmarks": "true", "resourceVersion": since}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT, sock_read=SILENCE_TIMEOUT)
        try:
            async with self._session.get(
                path, params=asked, headers=await self._headers(), timeout=timeout
            ) as answer:
                if answer.status >= HTTP_ERROR:
                    raise error_of(answer.status, await answer.read(), what=f"watch {path}")
                try:
                    while line := await answer.content.readline(max_line_length=_LARGEST_EVENT):
                        event: Doc = json.loads(line)
                        if event["type"] == "ERROR":
                            told = event["object"]
                            raise error_of(told.get("code", 500), json.dumps(told).encode(), what=f"watch {path}")
                        yield event
                finally:
                    # Left in the middle, as a rule: TLS's own goodbye would outlive the loop.
                    if answer.connection is not None and answer.connection.transport is not None:
                        answer.connection.transport.abort()
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError, ValueError) as error:
            raise _away(f"watch {path}", error) from None

    # --- asking -----------------------------------------------------------------------------------------------------

    async def _ask(
        self, method: str, path: str, params: Mapping[str, str], body: object = None, *, content_type: str = ""
    ) -> Doc:
        raw = await self._request(method, path, params, body, content_type or "application/json")
        told: Doc = json.loads(raw)
        return told

    async def _request(
        self, method: str, path: str, params: Mapping[str, str], body: object, content_type: str
    ) -> bytes:
        what = f"{method} {path}"
        data = None if body is None else json.dumps(body).encode()
        for last in (*[False] * (_REFUSED_TRIES - 1), True):
            headers = await self._headers()
            if data is not None:
                headers["Content-Type"] = content_type
            try:
                async with self._session.request(method, path, params=params, data=data, headers=headers) as answer:
                    raw = await answer.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _away(what, error) from None
            if answer.status < HTTP_ERROR:
                return raw
            refused = error_of(answer.status, raw, what=what, retry_after=answer.headers.get("Retry-After"))
            if answer.status != TOO_MANY or last:
                raise refused
            await asyncio.sleep(min(refused.retry_after or _LONGEST_PAUSE, _LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    async def _headers(self) -> dict[str, str]:
        """The bearer token, which a service account's file or an exec plug-in may have renewed."""
        settings = await self._configuration.auth_settings()
        token = settings.get("BearerToken", {}).get("value")
        return {"Authorization": str(token)} if token else {}


def _away(what: str, error: Exception) -> Unavailable:
    told = str(error) or type(error).__name__
    return Unavailable(
        f"Kubernetes: {what}: the API server does not answer ({told})",
        hint="Check that the cluster is up: `kubectl get nodes`, or `docker ps` for kind.",
        retry_after=5,
    )


def _session(configuration: Configuration) -> aiohttp.ClientSession:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # authorities of many clusters lack a key identifier
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return aiohttp.ClientSession(
        base_url=configuration.host.rstrip("/") + "/",
        connector=aiohttp.TCPConnector(limit=0, ssl=context, keepalive_timeout=IDLE_TIMEOUT),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT, sock_connect=5),
        headers={"User-Agent": "bkpool", "Accept": "application/json"},
        proxy=configuration.proxy,
    )


async def _configuration(access: ClusterAccess) -> tuple[Configuration, str]:
    from kubernetes.aio import config  # noqa: PLC0415 - a second to import, and only clusters need it
    from kubernetes.aio.client import Configuration as Settings  # noqa: PLC0415

    settings = Settings()
    token = _IN_CLUSTER / "token"
    try:
        if access.kubeconfig is None and access.context is None and token.exists():
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            return settings, (_IN_CLUSTER / "namespace").read_text("utf-8").strip() or "default"
        loader = await config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=str(access.kubeconfig) if access.kubeconfig else None,
            context=access.context,
            client_configuration=settings,
        )
        namespace = ""
        with suppress(BkpoolError, KeyError, AttributeError, TypeError):
            namespace = loader.current_context["context"].get("namespace", "")
        return settings, namespace or "default"
    except (config.ConfigException, OSError, ValueError) as error:
        where = str(access.kubeconfig or "the default kubeconfig")
        raise HostFault(
            f"kubeconfig: {where} gives no access to a cluster: {error}",
            hint="Set KUBECONFIG or --kubeconfig to a file with which `kubectl get nodes` works.",
            code="Unreadable",
        ) from None
