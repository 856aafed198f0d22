"""The fake cluster as a whole: a pod that the real runtime makes runs, answers over mutual TLS, and goes away."""

from __future__ import annotations

import random
import sys
from datetime import UTC, datetime

import pytest

from bkpool.core.errors import NotFound
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.store.kubernetes import KubernetesStore
from bkpool.workers.pods.runtime import PodRuntime
from support.fake_api_server import fake_api_server
from support.fake_kubelet import FakeKubelet
from support.fake_workers import FakeWorkers

SLOT = Slot("default", "p", 0)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8")


async def not_told(_: str) -> None:
    pass


async def test_a_pod_runs_answers_as_its_worker_and_goes_away(tmp_path):
    async with fake_api_server() as server:
        workers = FakeWorkers(server.objects)
        network = f"127.{random.randint(10, 250)}"
        kubelet = FakeKubelet(server.objects, network=network, run=workers.run, ended=workers.ended)
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
        runtime = PodRuntime(api, authorities=PoolAuthorities(Authority.create(datetime.now(UTC))))
        await runtime.adopt()
        try:
            pool = await KubernetesStore(api).create(Pool(metadata=Metadata(name="p")))
            endpoint = await runtime.daemons.start(SLOT, "uid-0", None, pool, not_told)
            assert endpoint.startswith(f"tcp://{network}.")
            assert await runtime.daemons.answers(SLOT, "uid-0", fresh=False)
            assert not await runtime.daemons.answers(SLOT, "another", fresh=False)
            assert workers.calls >= 2

            await runtime.daemons.stop(SLOT)
            await server.until(lambda: runtime.daemons.seen(SLOT) is None)
            with pytest.raises(NotFound):
                await api.get(paths.core("pods", *SLOT.worker))
        finally:
            await runtime.close(stop_workers=False)
            await api.close()
            await kubelet.close()
            await workers.close()
    assert server.total("create", "pods") == 1


async def test_a_volume_claim_is_bound_and_a_deployment_available(tmp_path):
    async with fake_api_server() as server:
        kubelet = FakeKubelet(server.objects)
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
        await api.create(paths.core("persistentvolumeclaims", "default"), {"metadata": {"name": "c"}, "spec": {}})
        deployments = paths.group("apps/v1", "deployments", "default")
        await api.create(deployments, {"metadata": {"name": "d"}, "spec": {"replicas": 2}})
        claim = await api.get(paths.core("persistentvolumeclaims", "default", "c"))
        assert claim["status"]["phase"] == "Bound"
        assert (await api.get(f"{deployments}/d"))["status"]["availableReplicas"] == 2
        await api.close()
        await kubelet.close()
