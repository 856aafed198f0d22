"""The gateway's certificates from its Secret: missing at first, replaced, damaged, and unreadable for a while."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from datetime import UTC, datetime

from bkpool.appliance.gateway_secret import GatewaySecret
from bkpool.core.errors import Forbidden
from bkpool.core.names import Key
from bkpool.kube import KubeLimits
from bkpool.pki.authority import Authority
from bkpool.pki.bundle import TLS_CERT, ClusterSecrets, gateway_diallers, gateway_server
from bkpool.pki.names import gateway_names
from bkpool.pki.pool_authority import PoolAuthorities
from support.captured_logs import capture_logs

POOL = Key("team", "p")
NOW = datetime.now(UTC)
SECRETS = ClusterSecrets.create(NOW)
POOLS = PoolAuthorities(SECRETS.backend)


def a_bundle(former: Authority | None = None) -> dict[str, bytes]:
    server = gateway_server(SECRETS.authority, gateway_names("localhost", [POOL]), NOW)
    return server | gateway_diallers(POOLS.current(POOL), former, "p-gateway.team", NOW)


class Cluster:
    """A KubeApi that has one Secret, or none, and may refuse lists."""

    def __init__(self) -> None:
        self.secret: dict | None = None
        self.refusals = 0
        self.limits = KubeLimits()
        self.version = 1
        self.selectors: set[tuple[str, str]] = set()
        self._watches: set[asyncio.Queue[dict]] = set()

    def store(self, data: dict[str, bytes]) -> None:
        self.version += 1
        metadata = {"namespace": "team", "name": "p-gateway", "resourceVersion": str(self.version)}
        self.secret = {"metadata": metadata, "data": {k: base64.b64encode(v).decode() for k, v in data.items()}}
        for queue in self._watches:
            queue.put_nowait({"type": "MODIFIED", "object": self.secret})

    async def list(self, path: str, **params: str) -> tuple[list[dict], str]:
        self.selectors.add((path, params["fieldSelector"]))
        if self.refusals:
            self.refusals -= 1
            raise Forbidden("not yet allowed")
        return [self.secret] if self.secret else [], str(self.version)

    async def watch(self, path: str, since: str, **params: str) -> AsyncGenerator[dict, None]:
        self.selectors.add((path, params["fieldSelector"]))
        queue: asyncio.Queue[dict] = asyncio.Queue()
        self._watches.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watches.discard(queue)

    @property
    def watched(self) -> bool:
        return bool(self._watches)


class Server:
    """The part of a gateway that gets the server certificate."""

    def __init__(self) -> None:
        self.certificates: list[bytes] = []

    def set_server_certificate(self, cert: bytes, _key: bytes, _ca: bytes) -> None:
        self.certificates.append(cert)


async def eventually(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - several things may make it true
            await asyncio.sleep(0.005)


async def test_it_waits_until_the_secret_can_be_read_and_exists():
    cluster = Cluster()
    cluster.refusals = 2
    opening = asyncio.create_task(GatewaySecret.open(cluster, POOL))
    await eventually(lambda: cluster.watched)
    assert not opening.done()
    bundle = a_bundle()
    cluster.store(bundle)
    async with asyncio.timeout(60):
        secret = await opening
    server = Server()
    secret.install(server)
    assert server.certificates == [bundle[TLS_CERT]]
    await eventually(lambda: not cluster.watched)
    assert cluster.selectors == {("/api/v1/namespaces/team/secrets", "metadata.name=p-gateway")}


async def test_a_new_version_is_used_and_a_damaged_one_is_not():
    cluster, server = Cluster(), Server()
    cluster.store(a_bundle())
    secret = await GatewaySecret.open(cluster, POOL)
    task = asyncio.create_task(secret.run(server))
    await eventually(lambda: cluster.watched)
    newer = a_bundle()
    with capture_logs() as logs:
        cluster.store({**newer, TLS_CERT: b"damaged"})
        await eventually(lambda: any(line["event"] == "gateway.secret_not_usable" for line in logs))
        assert server.certificates == []
        cluster.store(newer)
        await eventually(lambda: server.certificates)
    assert server.certificates == [newer[TLS_CERT]]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not cluster.watched


async def test_workers_of_a_former_ca_are_reached_while_the_secret_says_so():
    cluster, server = Cluster(), Server()
    cluster.store(a_bundle(former=SECRETS.backend))
    secret = await GatewaySecret.open(cluster, POOL)
    assert len(secret.dial._contexts(POOL)) == 2
    task = asyncio.create_task(secret.run(server))
    await eventually(lambda: cluster.watched)
    cluster.store(a_bundle())
    await eventually(lambda: len(secret.dial._contexts(POOL)) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
