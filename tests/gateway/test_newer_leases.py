"""A lease that another replica has just made is found by the first connection here. All parts are real."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.core import tokens
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, new_worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.gateway.session.lease_table import LeaseTable
from bkpool.store import Listing
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore
from support.no_store import NoStore
from support.objects import lease as new_lease
from support.objects import worker as leased_worker


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


async def test_a_replica_with_an_outdated_copy_serves_a_lease_that_is_newer(store, new_world, worker_lease, now):
    mirror = Mirror(store)  # it does not run, so it stays outdated
    feeder = TableFeeder(mirror)
    registry = StoreLeaseRegistry(
        store,
        "gateway-1",
        lambda: now,
        mirror.apply,
        hand_on=feeder.hand_on,
        pause=lambda _seconds: asyncio.sleep(0),
    )
    world = await new_world(registry=registry)
    unsubscribe = feeder.start(world.gateway.update)
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


class BusyStore(NoStore):
    """A store with this many leased workers, that can only be listed."""

    def __init__(self, count):
        self.lists = 0
        self.workers = []
        for number in range(count):
            found = leased_worker(number, new_lease(id=f"lease-{number}", token_sha256=f"token-{number}"))
            self.workers.append(found.but(metadata=found.metadata.but(resource_version=str(10 + number))))

    async def list(self, kind, *, namespace=None, labels=None):
        self.lists += 1
        return Listing(tuple(self.workers), "5000", ())


async def test_a_lease_is_in_the_table_when_it_is_found_however_many_others_are_new(now):
    store, table = BusyStore(600), LeaseTable()
    mirror = Mirror(store)  # it does not run, so all of them are new to it
    feeder = TableFeeder(mirror)
    registry = StoreLeaseRegistry(store, "gateway-1", lambda: now, mirror.apply, hand_on=feeder.hand_on)
    end = feeder.start(table.apply)
    await registry.find("token-599")
    assert table.route("token-599"), "the last of the list"
    assert not table.route("token-598"), "not all of them have been handed on meanwhile"
    await registry.find("token-598")
    assert table.route("token-598")
    assert store.lists == 1, "the copy has the second one already"
    end()


async def test_a_client_that_comes_before_the_table_is_complete_is_served_without_a_list(now):
    store, table = BusyStore(200), LeaseTable()
    mirror = Mirror(store)
    for worker in store.workers:
        mirror.apply(worker)
    feeder = TableFeeder(mirror)
    registry = StoreLeaseRegistry(store, "gateway-1", lambda: now, mirror.apply, hand_on=feeder.hand_on)
    end = feeder.start(table.apply)
    assert not table.route("token-199")
    await registry.find("token-199")
    assert table.route("token-199")
    assert store.lists == 0
    end()
