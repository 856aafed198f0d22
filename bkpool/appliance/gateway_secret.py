"""The certificates of one pool's gateway, from the Secret that the controller keeps for it."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Self

import structlog

from bkpool.core.errors import HostFault
from bkpool.core.names import Key
from bkpool.gateway.control.server import Gateway
from bkpool.gateway.net.dial import TlsDialler
from bkpool.gateway.net.tls_context import server_context
from bkpool.kube import Doc, KubeApi
from bkpool.kube.reflector import KubeCollection, Reflector
from bkpool.pki import bundle
from bkpool.pki.worker_tls import worker_context

log = structlog.get_logger(__name__)

_LONGEST_PAUSE = 5.0
"""Seconds between attempts to read the Secret while it cannot be read."""


@dataclass(frozen=True, slots=True)
class _Certificates:
    """One valid version of the Secret."""

    data: Mapping[str, bytes]
    dialling: tuple[ssl.SSLContext, ...]

    @classmethod
    def of(cls, data: Mapping[str, bytes]) -> Self:
        """Raises KeyError, ValueError, OSError or HostFault if something is missing or damaged."""
        server_context(data[bundle.TLS_CERT], data[bundle.TLS_KEY], data[bundle.CA_CERT])
        dialling = [worker_context(data[bundle.DIALLER_CERT], data[bundle.DIALLER_KEY], data[bundle.WORKER_CA])]
        if bundle.FORMER_DIALLER_CERT in data:
            former = (bundle.FORMER_DIALLER_CERT, bundle.FORMER_DIALLER_KEY, bundle.FORMER_WORKER_CA)
            dialling.append(worker_context(*(data[name] for name in former)))
        return cls(data, tuple(dialling))

    def install(self, gateway: Gateway) -> None:
        """Hands the gateway its server certificate."""
        data = self.data
        gateway.set_server_certificate(data[bundle.TLS_CERT], data[bundle.TLS_KEY], data[bundle.CA_CERT])


class GatewaySecret:
    """The certificates of one pool's gateway: its server certificate, and its client certificate for workers.

    Create it with `open`, which waits until the Secret exists.
    """

    def __init__(self, api: KubeApi, pool: Key, current: _Certificates) -> None:
        self._api = api
        self._pool = pool
        self._current = current
        self.dial = TlsDialler(lambda _pool: self._current.dialling)
        """Reaches workers of the pool; `run` keeps its certificates up to date."""

    @classmethod
    async def open(cls, api: KubeApi, pool: Key) -> Self:
        """Waits for a valid version of the Secret."""
        async with aclosing(_valid_versions(api, pool)) as versions:
            return cls(api, pool, await anext(versions))

    def install(self, gateway: Gateway) -> None:
        """Hands the gateway its server certificate."""
        self._current.install(gateway)

    async def run(self, gateway: Gateway) -> None:
        """Uses every later version of the Secret, until cancelled. Open connections keep their certificate."""
        async with aclosing(_valid_versions(self._api, self._pool)) as versions:
            async for found in versions:
                if found.data != self._current.data:
                    found.install(gateway)
                    self._current = found
                    log.info("gateway.certificate_renewed")


async def _valid_versions(api: KubeApi, pool: Key) -> AsyncGenerator[_Certificates, None]:
    """Every valid version of the Secret. After an invalid one the caller goes on using the version before it."""
    secret = Key(pool.namespace, f"{pool.name}-gateway")
    async with aclosing(_versions(api, secret)) as versions:
        async for doc in versions:
            try:
                yield _Certificates.of(_decoded(doc))
            except (KeyError, ValueError, OSError, HostFault) as error:
                log.warning("gateway.secret_not_usable", secret=str(secret), reason=str(error))


async def _versions(api: KubeApi, secret: Key) -> AsyncGenerator[Doc, None]:
    """The Secret as it is now, and again after each change. While it cannot be read, it is tried again."""
    only = KubeCollection("v1", "secrets", field_selector=f"metadata.name={secret.name}")
    reflector = Reflector(api, only, namespaces=[secret.namespace], longest_pause=_LONGEST_PAUSE)
    following = asyncio.create_task(reflector.run())
    try:
        async with aclosing(reflector.versions(secret)) as versions:
            async for doc in versions:
                yield doc
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def _decoded(secret: Doc) -> Mapping[str, bytes]:
    data = secret.get("data")
    return {key: base64.b64decode(value) for key, value in data.items()} if isinstance(data, dict) else {}
