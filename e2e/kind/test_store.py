"""The store of a cluster passes the same contract tests as the store in a file, with a real API server."""

from __future__ import annotations

import asyncio

import pytest
from store.test_contract import *  # noqa: F403 - the contract, with the fixture `store` of this directory
from store.test_contract import a_pool, scaled, seen
from structlog.testing import capture_logs

from bkpool.core.errors import Gone, HostFault, InvalidInput, NotFound
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.worker import Worker, new_worker
from bkpool.kube import paths
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror


def changed_status(worker: Worker, **status: object) -> tuple[str, dict]:
    """Returns path and patch for a status that this version of bkpool never writes."""
    return paths.custom(Worker.PLURAL, *worker.key, "status"), {"status": status}


async def test_only_fields_of_bkpool_are_sent_and_only_used_metadata_is_kept(store):
    made = await store.create(a_pool())

    assert made.metadata.model_extra == {}, "managedFields would be most of the object"
    again = await store.replace(scaled(made, 3))
    assert again.metadata.model_extra == {}


async def test_a_scoped_store_lists_and_watches_its_own_namespace_only(api, store):
    scoped = KubernetesStore(api, namespace="other")
    mine = await store.create(a_pool("mine", "other"))
    await store.create(a_pool("foreign"))

    listing = await scoped.list(Pool)
    assert listing.items == (mine,)
    await store.replace(scaled(await store.get(Pool, "default", "foreign"), 3))
    changed = await store.replace(scaled(mine, 3))
    assert [e.object for e in await seen(scoped, Pool, listing.resource_version, lambda e: True)] == [changed]


async def test_errors_name_an_unknown_namespace_and_a_field_that_the_schema_rejects(store):
    with pytest.raises(NotFound, match="nowhere"):
        await store.create(a_pool("p", "nowhere"))
    made = await store.create(a_pool())
    absurd = made.but(spec=made.spec.but(scaling=made.spec.scaling.but(max=-1)))  # as an older client might write
    with pytest.raises(InvalidInput, match="BuildKitPool default/p") as refused:
        await store.replace(absurd)
    assert refused.value.field == "spec.scaling.max"


async def test_an_unreadable_object_is_reported_once_and_hides_no_other(api, store):
    since = (await store.list(Pool)).resource_version
    odd = a_pool().to_json() | {
        "metadata": {"name": "with.dots", "namespace": "default"}
    }  # a name that only Kubernetes allows
    with capture_logs() as logs:
        await api.create(paths.custom(Pool.PLURAL, "default"), odd)
        good = await store.create(a_pool())

        assert [e.object for e in await seen(store, Pool, since, lambda e: True)] == [good]
        listing = await store.list(Pool)
        await store.list(Pool)

    key = Key("default", "with.dots")
    assert (listing.items, listing.unreadable) == ((good,), {key})
    assert "metadata.name" in store.unreadable[Pool.KIND, key]
    assert [line["event"] for line in logs] == ["store.object_skipped"]
    with pytest.raises(HostFault, match=r"with\.dots cannot be read"):
        await store.get(Pool, *key)
    await store.delete(Pool, *key)
    await store.list(Pool)
    assert store.unreadable == {}


async def test_an_object_that_becomes_unreadable_keeps_its_last_state(api, store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    listing = await store.list(Worker)
    await api.patch(*changed_status(worker, phase="Moonlight"))
    mirror = Mirror(store)
    mirror.apply(worker)
    running = asyncio.create_task(mirror.run())
    async with asyncio.timeout(10):
        await mirror.ready.wait()
    assert mirror.workers == {worker.key: worker}, "a list that cannot read it does not end it"
    assert "Moonlight" in store.unreadable[Worker.KIND, worker.key]

    changes: asyncio.Queue[Key] = asyncio.Queue()
    mirror.subscribe(changes.put_nowait)
    await api.patch(*changed_status(worker, phase="Idle"))
    async with asyncio.timeout(10):
        await changes.get()
        assert mirror.workers[worker.key].status.phase == "Idle"
        await api.patch(*changed_status(worker, phase="Moonlight"))
        await store.delete(Worker, *worker.key)
        await changes.get()
    assert mirror.workers == {}
    assert store.unreadable == {}
    with pytest.raises(Gone):
        await seen(store, Worker, listing.resource_version, lambda e: e.type == "DELETED")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_watch_delivers_large_objects(store):
    since = (await store.list(Pool)).resource_version
    made = await store.create(a_pool(annotations={"large": "x" * 250_000}))
    await store.replace_status(made.but(status=PoolStatus(endpoint="x" * 700_000)))

    events = await seen(store, Pool, since, lambda e: e.type == "MODIFIED")

    assert [len(e.object.status.endpoint or "") for e in events] == [0, 700_000]
