"""Two installations in one cluster, and what one asks of the API server: real replicas against a fake API server.

Pods run at once, and a stub answers for each buildkitd. With a real API server and its rights:
e2e/kind/test_installations.py.
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bkpool.appliance.control_replica import ControlReplica
from bkpool.appliance.gateway_replica import GatewayReplica
from bkpool.appliance.kube_secrets import ADMIN
from bkpool.appliance.run_options import Address, Role, RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.core.names import LABEL_POOL, Key
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.settings import Settings
from bkpool.store.kubernetes import KubernetesStore
from harness import free_port
from support.fake_api_server import FakeApiServer, fake_api_server
from support.fake_kubelet import FakeKubelet
from support.fake_workers import FakeWorkers

pytestmark = pytest.mark.only("process", "it has a cluster of its own")

ONE, TWO = "one", "two"
SOME = 10


@dataclass
class Installation:
    """A control replica that runs in this loop."""

    name: str
    url: str
    token: str

    async def ask(self, what: str, **body: Any) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{self.url}/api/v1/workers/{what}", json=body) as answer,
        ):
            found = await answer.json()
            assert answer.status == 200, found
            return found

    async def allocate(self, **more: Any) -> dict[str, Any]:
        return await self.ask("allocate", poolName="p", namespace=self.name, **more)


@dataclass
class FakeCluster:
    """A cluster without nodes, and who drives it."""

    server: FakeApiServer
    store: KubernetesStore
    api: KubeApi
    home: Path

    async def pool(self, namespace: str, floor: int = 1) -> Pool:
        spec = PoolSpec.model_validate({"scaling": {"min": floor, "max": 3}})
        return await self.store.create(Pool(metadata=Metadata(name="p", namespace=namespace), spec=spec))

    def workers(self, namespace: str) -> list[dict[str, Any]]:
        (found,) = (kept for (_, plural), kept in self.server.objects.collections.items() if plural == Worker.PLURAL)
        docs = [stored.doc for stored in found.objects.values()]
        return [doc for doc in docs if doc["metadata"]["namespace"] == namespace]

    async def until_idle(self, namespace: str, count: int = 1) -> None:
        def idle() -> bool:
            phases = [doc.get("status", {}).get("phase") for doc in self.workers(namespace)]
            return phases.count(Phase.IDLE.value) >= count

        await self.server.until(idle)

    def settings(self, user: str, sections: dict[str, dict[str, Any]]) -> RunOptions:
        kubeconfig = self.server.write_kubeconfig(self.home / f"kubeconfig-{user}", user=user)
        sections["kubernetes"] = {"kubeconfig": kubeconfig, **sections.get("kubernetes", {})}
        sections["metrics"] = {"address": Address("127.0.0.1", 0)}
        return RunOptions(
            home=self.home, cache=self.home, backend="kubernetes", settings=Settings.model_validate(sections)
        )

    @asynccontextmanager
    async def installed(self, name: str) -> AsyncIterator[Installation]:
        """An installation with the pools of one namespace. Its bearer token at the API server is its name."""
        port, system = free_port(), f"{name}-system"
        options = self.settings(
            name,
            {
                "appliance": {"roles": frozenset({Role.API, Role.CONTROLLER})},
                "api": {"address": Address("127.0.0.1", port)},
                "kubernetes": {"namespace": system, "pool_namespaces": (name,), "leader_lease": timedelta(seconds=6)},
            },
        )
        async with running(ControlReplica(options)):
            secret = await self.api.get(paths.core("secrets", system, ADMIN))
            yield Installation(name, f"http://127.0.0.1:{port}", base64.b64decode(secret["data"]["token"]).decode())

    def gateway(self, name: str, pool: Key) -> GatewayReplica:
        options = self.settings(name, {"gateway": {"address": Address("127.0.0.1", 0), "pool": pool}})
        return GatewayReplica(options, pool)


@asynccontextmanager
async def running(replica: ControlReplica | GatewayReplica) -> AsyncIterator[None]:
    shutdown = Shutdown()
    async with AsyncExitStack() as stack:
        await replica._start(stack, shutdown)
        try:
            yield
        finally:
            shutdown.requested.set()
            shutdown.forced.set()


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeCluster]:
    namespaces = tuple(f"{name}{end}" for name in (ONE, TWO) for end in ("", "-system"))
    async with fake_api_server(namespaces=namespaces) as server, AsyncExitStack() as stack:
        workers = FakeWorkers(server.objects)
        network = f"127.{random.randint(10, 250)}"
        kubelet = FakeKubelet(server.objects, network=network, run=workers.run, ended=workers.ended)
        stack.push_async_callback(workers.close)
        stack.push_async_callback(kubelet.close)
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig-test", user="test")))
        stack.push_async_callback(api.close)
        yield FakeCluster(server, KubernetesStore(api), api, tmp_path)


def places(server: FakeApiServer, user: str) -> set[str]:
    """The namespaces in which somebody has asked for something, and the resources that are in none."""
    return {asked.where.namespace or f"{asked.verb} {asked.resource}" for asked in server.asked if asked.user == user}


async def test_two_installations_never_touch_each_others_objects(fake):
    await fake.pool(ONE)
    await fake.pool(TWO)
    async with fake.installed(ONE) as one:
        async with fake.installed(TWO) as two:
            await fake.until_idle(ONE)
            await fake.until_idle(TWO)
            mine, theirs = await one.allocate(jobId="job"), await two.allocate(jobId="job")
            assert mine["token"] != theirs["token"]
            await two.ask("release", token=theirs["token"])
            await fake.server.until(lambda: not any(doc["spec"].get("allocation") for doc in fake.workers(TWO)))
        before = [doc for doc in fake.workers(ONE) if doc["spec"].get("allocation")]
        async with fake.installed(TWO) as two:  # whoever starts ends what nobody can use any more
            await two.allocate(jobId="another")
            with pytest.raises(AssertionError, match="no lease"):
                await two.ask("release", workerName=mine["workerName"], namespace=ONE)
        (worker,) = [doc for doc in fake.workers(ONE) if doc["spec"].get("allocation")]
        assert worker["spec"]["allocation"]["id"] == before[0]["spec"]["allocation"]["id"]
        assert (await one.allocate(jobId="job"))["token"] == mine["token"], "it goes on"

    for name in (ONE, TWO):
        assert places(fake.server, name) == {name, f"{name}-system"}


async def quiet(server: FakeApiServer) -> None:
    """Waits until nothing is written but the Lease of the leader, while it is renewed twice."""
    async with asyncio.timeout(90):
        while True:
            seen = Counter(server.counts)
            renewals = server.total("update", "leases")
            await server.until(lambda: server.total("update", "leases") >= renewals + 2)  # noqa: B023 - used at once
            if {resource for _, _, resource in server.counts - seen} == {"leases"}:
                return


async def test_nothing_is_listed_or_read_in_the_steady_state(fake):
    pool = await fake.pool(ONE)
    async with fake.installed(ONE) as one:
        await fake.until_idle(ONE)
        await fake.server.until(lambda: fake.server.total("patch", "deployments"))
        async with running(fake.gateway("gateway", pool.key)):
            followed = Counter((watch.asked.user, watch.asked.resource) for watch in fake.server.watches)
            own = [asked for asked in fake.server.asked if asked.user == "gateway"]
            await one.allocate()
            fake.server.reset_counts()
            await quiet(fake.server)
            assert reads(fake.server) == {}
            for _ in range(SOME):
                lease = await one.allocate()
                await one.ask("release", token=lease["token"])
            await quiet(fake.server)
            # A worker is read only after a write of it was refused.
            assert {(verb, resource) for _, verb, resource in reads(fake.server)} <= {("get", "buildkitworkers")}

    assert {what: count for what, count in followed.items() if what[0] == "gateway"} == {
        ("gateway", "buildkitpools"): 1,
        ("gateway", "buildkitworkers"): 1,
        ("gateway", "secrets"): 1,
    }
    assert {asked.params.get("labelSelector") for asked in own if asked.resource == "buildkitworkers"} == {
        f"{LABEL_POOL}=p"
    }


def reads(server: FakeApiServer) -> dict[tuple[str, str, str], int]:
    return {what: count for what, count in server.counts.items() if what[1] in {"get", "list", "watch"}}
