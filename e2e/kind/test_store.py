"""The store of a cluster passes the same contract tests as the store in a file, with a real API server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from store.test_contract import *  # noqa: F403 - the contract, with the fixture `store` of this directory
from store.test_contract import a_pool, scaled, seen

from bkpool.core.errors import Conflict, HostFault, InvalidInput, NotFound
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.worker import Worker, new_worker
from bkpool.kube import paths
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror, MirrorChange
from support.forgotten_writers import expect_writers_are_forgotten


def changed_status(worker: Worker, **status: object) -> tuple[str, dict]:
    """Returns path and patch for a status that this version of bkpool never writes."""
    return paths.custom(Worker.PLURAL, *worker.key, "status"), {"status": status}


async def test_only_fields_of_bkpool_are_sent_and_only_used_metadata_is_kept(store):
    made = await store.create(a_pool())

    assert made.metadata.model_extra == {}, "managedFields would be most of the object"
    again = await store.replace(scaled(made, 3))
    assert again.metadata.model_extra == {}


async def test_the_server_forgets_who_wrote_a_worker_and_keeps_it_of_a_pool(api, store):
    await expect_writers_are_forgotten(api, store)


async def test_a_scoped_store_lists_and_watches_its_own_namespace_only(api, store):
    scoped = KubernetesStore(api, StoreBounds(("other",)))
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


async def test_an_unreadable_object_hides_no_other_and_only_its_status_is_written(api, store):
    since = (await store.list(Pool)).resource_version
    odd = a_pool().to_json() | {
        "metadata": {"name": "with.dots", "namespace": "default"}
    }  # a name that only Kubernetes allows
    await api.create(paths.custom(Pool.PLURAL, "default"), odd)
    good = await store.create(a_pool())

    events = await seen(store, Pool, since, lambda e: isinstance(e.object, Pool))
    assert events[-1].object == good
    listing = await store.list(Pool)
    [found] = listing.unreadable
    assert (listing.items, found.key) == ((good,), Key("default", "with.dots"))
    assert "metadata.name" in found.reason
    with pytest.raises(HostFault, match=r"with\.dots cannot be read"):
        await store.get(Pool, *found.key)

    await store.patch_status(found, {**(found.noted(datetime.now(UTC)) or {}), "phase": "Degraded"})
    with pytest.raises(Conflict):
        await store.patch_status(found, {"phase": "Ready"})
    [marked] = (await store.list(Pool)).unreadable
    assert marked.noted(datetime.now(UTC)) is None, "it says so itself now"
    assert (marked.status["phase"], marked.document["spec"]) == ("Degraded", found.document["spec"])
    await store.delete(Pool, *found.key)
    assert (await store.list(Pool)).unreadable == ()


async def test_an_object_that_becomes_unreadable_is_kept_apart_until_it_can_be_read_again(api, store):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    await api.patch(*changed_status(worker, phase="Moonlight"))
    mirror = Mirror(store)
    mirror.apply(worker)
    running = asyncio.create_task(mirror.run())
    async with asyncio.timeout(60):
        await mirror.ready.wait()
    assert mirror.workers == {}
    assert "Moonlight" in mirror.unreadable_workers[worker.key].reason
    assert mirror.unreadable_slots(pool.key) == {worker.slot}

    changes: asyncio.Queue[MirrorChange] = asyncio.Queue()
    mirror.subscribe(changes.put_nowait)
    await api.patch(*changed_status(worker, phase="Idle"))
    async with asyncio.timeout(60):
        await changes.get()
        assert mirror.workers[worker.key].status.phase == "Idle"
        await api.patch(*changed_status(worker, phase="Moonlight"))
        await changes.get()
        await store.delete(Worker, *worker.key)
        await changes.get()
    assert mirror.workers == {}
    assert mirror.unreadable_workers == {}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_watch_delivers_large_objects(store):
    since = (await store.list(Pool)).resource_version
    made = await store.create(a_pool(annotations={"large": "x" * 250_000}))
    await store.replace_status(made.but(status=PoolStatus(endpoint="x" * 700_000)))

    events = await seen(store, Pool, since, lambda e: e.type == "MODIFIED")

    assert [len(e.object.status.endpoint or "") for e in events] == [0, 700_000]
