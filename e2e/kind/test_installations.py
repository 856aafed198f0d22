"""Two installations on kind, with one set of definitions and only the rights that `bkpool manifests` gives each.

Their control replicas run in this process, and have no workers. With workers, and every request recorded:
e2e/test_installations.py.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from kind.objects import INSTALLED, installed_path

from bkpool.appliance.control_replica import ControlReplica
from bkpool.appliance.run_options import Address, Role, RunOptions
from bkpool.appliance.shutdown import Shutdown
from bkpool.core.errors import Forbidden, NotFound
from bkpool.core.pool import Pool, PoolSpec, PoolStatus
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker
from bkpool.install import crds
from bkpool.install.manifests import Install, render
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.settings import Settings
from bkpool.store.kubernetes import KubernetesStore
from harness import free_port
from worlds import Pods


@dataclass
class Installation:
    """An installation with the pools of one namespace."""

    namespace: str
    system: str
    admin: KubeApi
    """With every right."""
    api: KubeApi
    """With those of the installation's ServiceAccount."""
    options: RunOptions

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        shutdown = Shutdown()
        async with AsyncExitStack() as stack:
            await ControlReplica(self.options)._start(stack, shutdown)
            try:
                yield
            finally:
                shutdown.requested.set()
                shutdown.forced.set()


async def until_allowed(api: KubeApi, path: str) -> None:
    """The API server learns of new rights a moment later."""
    while True:
        with suppress(Forbidden):
            await api.list(path)
            return


@asynccontextmanager
async def installed(world: Pods, admin: KubeApi, home: Path, name: str) -> AsyncIterator[Installation]:
    namespace, system = (f"{name}-{uuid.uuid4().hex[:6]}{end}" for end in ("", "-system"))
    text = render(Install(system, pool_namespaces=(namespace,), definitions=False))
    docs = [doc for doc in yaml.safe_load_all(text) if doc and doc["kind"] in INSTALLED]
    async with AsyncExitStack() as stack:
        for made in (namespace, system):
            await admin.create(paths.core("namespaces"), {"metadata": {"name": made}})
            stack.push_async_callback(admin.delete, paths.core("namespaces", name=made))
        for doc in docs:
            if doc["kind"] != "Namespace":
                await admin.apply(installed_path(doc), doc)
                if "namespace" not in doc["metadata"]:
                    stack.push_async_callback(admin.delete, installed_path(doc))
        kubeconfig = await _kubeconfig(world, admin, system, home)
        api = await KubeApi.connect(ClusterAccess(kubeconfig))
        stack.push_async_callback(api.close)
        async with asyncio.timeout(60):
            await until_allowed(api, paths.custom(Worker.PLURAL, namespace))
        port = free_port()
        sections = {
            "appliance": {"roles": frozenset({Role.API, Role.CONTROLLER}), "endpoint_removal_delay": timedelta(0)},
            "api": {"address": Address("127.0.0.1", port)},
            "metrics": {"address": Address("127.0.0.1", 0)},
            "kubernetes": {"kubeconfig": kubeconfig, "namespace": system, "pool_namespaces": (namespace,)},
        }
        options = RunOptions(home, home, "kubernetes", settings=Settings.model_validate(sections))
        yield Installation(namespace, system, admin, api, options)
        pools = KubernetesStore(admin)
        with suppress(NotFound):
            await pools.delete(Pool, namespace, "p")
        for worker in (await pools.list(Worker, namespace=namespace)).items:
            with suppress(NotFound):
                await admin.delete(paths.custom(Worker.PLURAL, *worker.key))
                await admin.patch(paths.custom(Worker.PLURAL, *worker.key), {"metadata": {"finalizers": None}})


async def _kubeconfig(world: Pods, admin: KubeApi, system: str, home: Path) -> Path:
    """A kubeconfig with the token of the installation's ServiceAccount."""
    account = paths.core("serviceaccounts", system, "buildkit-controller", "token")
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    token = (await admin.create(account, asked))["status"]["token"]
    config = yaml.safe_load(world.cluster.kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": token}
    file = home / f"kubeconfig-{system}"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
async def both(world: Pods, api: KubeApi, tmp_path: Path) -> AsyncIterator[tuple[Installation, Installation]]:
    await crds.install(api)
    async with installed(world, api, tmp_path, "one") as one, installed(world, api, tmp_path, "two") as two:
        yield one, two


async def test_two_installations_run_beside_each_other_with_rights_in_their_namespaces_only(
    both: tuple[Installation, Installation],
) -> None:
    one, two = both
    spec = PoolSpec.model_validate({"scaling": {"min": 0, "max": 1}})
    store = KubernetesStore(one.admin)
    async with one.running(), two.running(), asyncio.timeout(120):
        for installation in both:
            pool = Pool(metadata=Metadata(name="p", namespace=installation.namespace), spec=spec)
            made = await store.create(pool)
            async with aclosing(store.watch(Pool, made.metadata.resource_version or "")) as events:
                async for event in events:  # its controller writes the status
                    if event.object.key == made.key and event.object.status != PoolStatus():
                        break
            system = paths.group("coordination.k8s.io/v1", "leases", installation.system, "bkpool-controller")
            assert (await one.admin.get(system))["spec"]["holderIdentity"], "each has a leader of its own"


@pytest.mark.parametrize("plural", ["pods", "secrets", "persistentvolumeclaims", "services", "events"])
async def test_an_installation_has_no_right_in_the_others_namespaces(
    both: tuple[Installation, Installation], plural: str
) -> None:
    one, two = both
    for namespace in (two.namespace, two.system, None):
        with pytest.raises(Forbidden):
            await one.api.list(paths.core(plural, namespace))
        for kind in (Pool, Worker):
            with pytest.raises(Forbidden):
                await one.api.list(paths.custom(kind.PLURAL, namespace))
    with pytest.raises(Forbidden):
        await one.api.create(paths.custom(Worker.PLURAL, two.namespace), {"metadata": {"name": "p-worker-0"}})


async def test_the_requests_of_an_installation_have_its_own_priority(both: tuple[Installation, Installation]) -> None:
    one, _ = both
    asked = {
        paths.custom(Worker.PLURAL, one.namespace): "",
        paths.core("pods", one.namespace): "",
        paths.core("events", one.namespace): ".events",
    }
    for path, schema in asked.items():
        found = await one.admin.get(
            paths.group("flowcontrol.apiserver.k8s.io/v1", "flowschemas", name=f"bkpool-{one.system}{schema}")
        )
        async with asyncio.timeout(60):
            while await _flow_schema(one.api, path) != found["metadata"]["uid"]:
                pass  # the API server learns of a new FlowSchema a moment later


async def _flow_schema(api: KubeApi, path: str) -> str:
    async with api._session.get(path, headers=await api._headers()) as answer:
        return str(answer.headers["X-Kubernetes-PF-FlowSchema-UID"])
