"""Custom resources of an earlier version: made by its own code and definitions, then read and kept by today's."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from earlier_version import earlier_version

from bkpool.core.errors import InvalidInput
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, Worker
from bkpool.install import crds
from bkpool.kube import KubeApi, paths
from bkpool.store.kubernetes import KubernetesStore

TOO_LONG = "p" * 58
OBJECTS = """
import json
from datetime import UTC, datetime, timedelta
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Allocation, Phase, new_worker

now = datetime.now(UTC)
pool = Pool(metadata=Metadata(name="p", namespace="default"))
lease = Allocation(
    id="l", job_id="j", token_sha256="0" * 64, requested_by="ann", owner="1" * 64, allocated_at=now,
    expires_at=now + timedelta(hours=1), not_after=now + timedelta(hours=24),
)
worker = new_worker(Slot("default", "p", 0), pool, lease, {})
status = worker.with_status(phase=Phase.ALLOCATED, endpoint="tcp://10.0.0.1:1234", cache_owner="1" * 64)
long = Pool(metadata=Metadata(name="%s", namespace="default"))
print(json.dumps([one.to_json() for one in (pool, long, status)]))
"""


@pytest.fixture
async def upgraded(custom_resources: KubeApi) -> tuple[KubeApi, dict[str, Any]]:
    """Objects that the earlier version made under its own definitions; then today's definitions are applied."""
    api, earlier = custom_resources, earlier_version()
    made = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [earlier.python, "-c", OBJECTS % TOO_LONG], env=earlier.env, capture_output=True, check=True
    ).stdout
    pool, long, worker = json.loads(made)
    try:
        for file in sorted(earlier.definitions.glob("*.yaml")):
            definition = yaml.safe_load(file.read_text())
            await api.apply(
                paths.group(
                    "apiextensions.k8s.io/v1", "customresourcedefinitions", name=definition["metadata"]["name"]
                ),
                definition,
            )
        stored = await api.create(paths.custom(Pool.PLURAL, "default"), pool)
        await api.create(paths.custom(Pool.PLURAL, "default"), long)
        worker["metadata"]["ownerReferences"][0]["uid"] = stored["metadata"]["uid"]
        made_worker = await api.create(paths.custom(Worker.PLURAL, "default"), worker)
        status = {**made_worker, "status": worker["status"]}
        await api.replace(paths.custom(Worker.PLURAL, "default", "p-worker-0", "status"), status)
    finally:
        await crds.install(api)
    return api, worker


async def test_objects_of_an_earlier_version_go_on(upgraded: tuple[KubeApi, dict[str, Any]]) -> None:
    api, written = upgraded
    store = KubernetesStore(api)
    pool = await store.get(Pool, "default", "p")
    worker = await store.get(Worker, "default", "p-worker-0")
    assert worker.held_lease.token_sha256 == "0" * 64
    assert worker.status.phase is Phase.ALLOCATED
    kept = worker.to_json()["spec"]["allocation"]
    assert {name: kept[name] for name in written["spec"]["allocation"]} == written["spec"]["allocation"]

    renewed = await store.replace(worker.with_lease(worker.held_lease.but(expires_at=worker.held_lease.not_after)))
    assert (await store.replace_status(renewed.with_status(phase=Phase.DRAINING))).status.phase is Phase.DRAINING
    await store.replace_status(pool.but(status=pool.status.but(phase="Ready")))

    listing = await store.list(Pool)
    [found] = listing.unreadable
    assert found.key == Key("default", TOO_LONG)
    await store.patch_status(found, {**(found.noted(datetime.now(UTC)) or {}), "phase": "Degraded"})
    [marked] = (await store.list(Pool)).unreadable
    assert "has 58 characters" in marked.status["conditions"][0]["message"], "although its name is refused today"
    with pytest.raises(InvalidInput, match=r"metadata.name"):
        await store.create(Pool.model_construct(metadata=Metadata(name="q" * 58, namespace="default")))
