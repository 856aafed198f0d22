"""The configuration that a pod's buildkitd gets, as it is written to the cluster."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime

from bkpool.core.errors import NotFound
from bkpool.core.pool import CacheGC
from bkpool.pki.bundle import ClusterSecrets
from bkpool.workers.pods.pod_spec import ROOTLESS_IMAGE, PodRequest
from bkpool.workers.pods.runtime import PodRuntime
from support.objects import pool, slot


class Cluster:
    """A KubeApi without objects, that notes what is applied."""

    def __init__(self) -> None:
        self.applied: dict[str, dict] = {}

    async def get(self, path: str) -> dict:
        raise NotFound(path)

    async def apply(self, path: str, body: dict) -> dict:
        self.applied[body["kind"]] = body
        return body

    async def create(self, _path: str, body: dict) -> dict:
        return body | {"metadata": body["metadata"] | {"resourceVersion": "1", "uid": "uid"}}


async def test_the_operators_defaults_of_the_collection_reach_the_pods_configuration():
    api = Cluster()
    runtime = PodRuntime(
        api,
        backend=ClusterSecrets.create(datetime.now(UTC)).backend,
        context=ssl.create_default_context(),
        gc_defaults=CacheGC(keep_storage="40%", reserved_space="1GB", min_free_space="3GB"),
    )
    await runtime.daemons._writes.make(PodRequest(slot(0), "uid-1", None, pool(), ROOTLESS_IMAGE))
    (text,) = api.applied["ConfigMap"]["data"].values()
    assert 'maxUsedSpace = "40%"' in text
