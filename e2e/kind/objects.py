"""The store of a cluster as a fixture, with the definitions installed and without objects of earlier tests.

The tests use all namespaces. So the cluster must be one for tests, and no appliance may run on it meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest

from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.install import crds
from bkpool.kube import Doc, KubeApi, paths
from bkpool.store.kubernetes import KubernetesStore

NAMESPACES = ("default", "other")
"""The namespaces in which the tests of the store make pools."""

INSTALLED = {
    "Namespace": ("v1", "namespaces"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "ClusterRole": ("rbac.authorization.k8s.io/v1", "clusterroles"),
    "ClusterRoleBinding": ("rbac.authorization.k8s.io/v1", "clusterrolebindings"),
    "Role": ("rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings"),
    "FlowSchema": ("flowcontrol.apiserver.k8s.io/v1", "flowschemas"),
    "PriorityLevelConfiguration": ("flowcontrol.apiserver.k8s.io/v1", "prioritylevelconfigurations"),
}
"""The kinds of the manifests that say who an installation is, what it may do, and how it is served."""

_prepared = False


def installed_path(doc: Doc) -> str:
    """The path of an object of the manifests."""
    version, plural = INSTALLED[doc["kind"]]
    namespace, name = doc["metadata"].get("namespace"), doc["metadata"]["name"]
    return paths.core(plural, namespace, name) if version == "v1" else paths.group(version, plural, namespace, name)


@pytest.fixture
async def custom_resources(api: KubeApi) -> AsyncIterator[KubeApi]:
    """Installs the definitions. There is no pool or worker before and after the test."""
    global _prepared  # noqa: PLW0603 - once per session, because each test has another loop
    if not _prepared:
        await crds.install(api)
    await emptied(api)
    if not _prepared:
        await collected(KubernetesStore(api))
        _prepared = True
    yield api
    await emptied(api)


@pytest.fixture
async def store(custom_resources: KubeApi) -> KubernetesStore:
    return KubernetesStore(custom_resources)


async def emptied(api: KubeApi) -> None:
    """Removes every pool and worker from the cluster, also those with finalizers, and makes the namespaces of the
    tests."""
    for namespace in NAMESPACES:
        with suppress(Conflict):
            await api.create(
                paths.core("namespaces"), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            )
    for kind in (Pool, Worker):
        docs, _ = await api.list(paths.custom(kind.PLURAL))
        await asyncio.gather(
            *(_removed(api, kind, doc["metadata"]["namespace"], doc["metadata"]["name"]) for doc in docs)
        )


async def _removed(api: KubeApi, kind: type[Pool | Worker], namespace: str, name: str) -> None:
    path = paths.custom(kind.PLURAL, namespace, name)
    with suppress(NotFound):
        await api.delete(path)
        await api.patch(path, {"metadata": {"finalizers": None}})


async def collected(store: KubernetesStore) -> None:
    """Waits until the garbage collector knows the kinds. It looks for new ones every 30 s."""
    pool = await store.create(Pool(metadata=Metadata(name="collected")))
    worker = await store.create(new_worker(Slot("default", "collected", 0), pool, None, {}))
    await store.delete(Pool, *pool.key)
    async with asyncio.timeout(90), aclosing(store.watch(Worker, worker.metadata.resource_version)) as events:
        async for event in events:
            if event.type == "DELETED":
                return
