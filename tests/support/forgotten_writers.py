"""That an API server, real or of a test, keeps no managedFields of workers after a write of bkpool."""

from __future__ import annotations

import json

from bkpool.core.names import Slot
from bkpool.core.pool import Pool, Scaling
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.kube import KubeApi, paths
from bkpool.store import Store


async def expect_writers_are_forgotten(api: KubeApi, store: Store) -> None:
    """The server forgets who wrote a worker, and keeps it of a pool."""
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    await store.replace(pool.but(spec=pool.spec.but(scaling=Scaling(max=3))))
    found = []
    for write in (store.replace_status, store.replace, store.replace_status):
        worker = await write(worker.with_status(failures=worker.status.failures + 1))
        raw = json.loads(await api.text(paths.custom(Worker.PLURAL, *worker.key)))
        found.append("managedFields" in raw["metadata"])
    assert found == [True, False, False], "a write of the spec ends it for ever"
    raw = json.loads(await api.text(paths.custom(Pool.PLURAL, *pool.key)))
    assert raw["metadata"]["managedFields"], "users apply pools"
