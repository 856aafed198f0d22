"""A lease that another replica has just made is found by the first connection here. All parts are real."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.appliance.roles.gateway import feed_leases
from bkpool.core import tokens
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, new_worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


async def test_a_replica_with_an_outdated_copy_serves_a_lease_that_is_newer(store, new_world, worker_lease, now):
    mirror = Mirror(store)  # it does not run, so it stays outdated
    registry = StoreLeaseRegistry(
        store, "gateway-1", lambda: now, mirror.apply, pause=lambda _seconds: asyncio.sleep(0)
    )
    world = await new_world(registry=registry)
    unsubscribe = feed_leases(world.gateway, mirror)
    token = world.token("a")
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    lease = worker_lease.but(token_sha256=tokens.digest(token))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, lease, {}))
    ready = worker.with_status(phase=Phase.ALLOCATED, endpoint=world.endpoint, cache_owner=lease.owner)
    await store.replace_status(ready)

    await (await world.connect(token)).echo(b"at the first attempt")
    code, sentence = await (await world.connect(world.token("unknown"))).call()
    assert code == 16
    assert sentence.startswith("no lease has the token of this client certificate")

    unsubscribe()
    await world.gateway.close()  # it withdraws the registration, so the store must be open
