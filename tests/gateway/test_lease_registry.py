"""The lease registry over a real store. It only registers for the lease that holds the worker."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from bkpool.core.errors import Gone, Unavailable
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolGateway
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, GatewayRegistration, Worker, new_worker
from bkpool.gateway.control.heartbeat_writer import HeartbeatWriter
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.session.lease_table import leases_of
from bkpool.store.sqlite import SqliteStore


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
async def worker(store, worker_lease):
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    return await store.create(new_worker(Slot("default", "p", 0), pool, worker_lease, {}))


@pytest.fixture
def route(worker):
    return leases_of(worker, PoolGateway()).route


@pytest.fixture
def seen_workers():
    return []


@pytest.fixture
def registry(store, now, seen_workers):
    return StoreLeaseRegistry(store, "gateway-1", lambda: now, seen_workers.append)


async def gateways(store):
    return (await store.get(Worker, "default", "p-worker-0")).status.gateways


async def test_a_registration_is_in_the_workers_status_and_is_reported(store, registry, route, seen_workers, now):
    await registry.register(route, 3)
    entry = GatewayRegistration(gateway="gateway-1", lease_id="allocation-1", renewed_at=now, connections=3)
    assert await gateways(store) == (entry,)
    assert [worker.status.gateways for worker in seen_workers] == [(entry,)]


async def test_a_renewal_replaces_the_registration(store, route, now):
    times = iter([now, now, now + timedelta(seconds=20), now + timedelta(seconds=20)])
    registry = StoreLeaseRegistry(store, "gateway-1", lambda: next(times), lambda _: None)
    await registry.register(route, 1)
    await registry.renew(route, 7)
    [entry] = await gateways(store)
    assert (entry.renewed_at, entry.connections) == (now + timedelta(seconds=20), 7)


async def test_a_withdrawal_keeps_the_registrations_of_others(store, registry, route, now):
    other = StoreLeaseRegistry(store, "gateway-2", lambda: now, lambda _: None)
    await registry.register(route, 1)
    await other.register(route, 1)
    await registry.withdraw(route)
    assert [entry.gateway for entry in await gateways(store)] == ["gateway-2"]
    await registry.withdraw(route)


async def test_a_registration_removes_those_of_leases_that_have_left_the_worker(store, registry, route, now):
    """They protect nothing, and would stay for ever if their gateway is dead (rule 10)."""
    other = StoreLeaseRegistry(store, "gateway-2", lambda: now, lambda _: None)
    await other.register(route, 1)
    held = await store.get(Worker, "default", "p-worker-0")
    gone = GatewayRegistration(gateway="dead", lease_id="before", renewed_at=now, connections=5)
    await store.replace_status(held.with_status(gateways=(gone, *held.status.gateways)))
    await registry.register(route, 1)
    assert [entry.gateway for entry in await gateways(store)] == ["gateway-2", "gateway-1"]


async def test_replicas_that_register_simultaneously_all_succeed(store, route, now):
    replicas = [StoreLeaseRegistry(store, f"gateway-{n}", lambda: now, lambda _: None) for n in range(5)]
    await asyncio.gather(*(replica.register(route, 1) for replica in replicas))
    assert len(await gateways(store)) == 5


async def test_an_ended_lease_is_not_registered_but_an_existing_registration_is_renewed(
    store, registry, route, worker, now
):
    await registry.register(route, 1)
    current = await store.get(Worker, "default", "p-worker-0")
    ended = current.lease.but(ended_at=now, end_reason=EndReason.RELEASED)
    await store.replace(current.with_lease(ended))
    with pytest.raises(Gone, match="it was released"):
        await registry.register(route, 1)
    await registry.renew(route, 1)


async def test_an_expired_lease_is_not_registered(store, route, now):
    late = StoreLeaseRegistry(store, "gateway-1", lambda: now + timedelta(hours=1), lambda _: None)
    with pytest.raises(Gone, match="it was expired"):
        await late.register(route, 1)
    assert await gateways(store) == ()


async def test_a_worker_of_the_next_lease_is_refused(store, registry, route, worker, worker_lease):
    await store.replace(worker.with_lease(worker_lease.but(id="allocation-2")))
    for request in (registry.register, registry.renew):
        with pytest.raises(Gone, match="does not hold worker default/p-worker-0 any more"):
            await request(route, 1)
    await registry.withdraw(route)
    assert await gateways(store) == ()


async def test_a_deleted_worker_is_refused_and_a_new_one_of_the_same_name_too(
    store, registry, route, worker, worker_lease
):
    await store.delete(Worker, "default", "p-worker-0")
    deleted = await store.get(Worker, "default", "p-worker-0")
    await store.replace(deleted.but(metadata=deleted.metadata.but(finalizers=())))  # by force, because it has a lease
    with pytest.raises(Gone):
        await registry.register(route, 1)
    await registry.withdraw(route)
    await store.create(worker.but(metadata=worker.metadata.but(uid=None, resource_version=None)))
    with pytest.raises(Gone):
        await registry.register(route, 1)


async def test_endless_conflicts_are_an_error(store, registry, route, monkeypatch):
    get = store.get

    async def outrun(kind, namespace, name):
        found = await get(kind, namespace, name)
        await store.replace_status(found.with_status(failures=found.status.failures + 1))
        return found

    monkeypatch.setattr(store, "get", outrun)
    with pytest.raises(Unavailable, match="changes too often"):
        await registry.register(route, 1)


async def test_a_withdrawal_that_is_tried_again_keeps_a_newer_registration(store, registry, route, monkeypatch):
    """The lease was renewed, and a client has come, while the withdrawal was on its way to the store."""
    await registry.register(route, 1)
    replace_status = store.replace_status
    attempts = []

    async def slow(worker):
        attempts.append(len(worker.status.gateways))
        if len(attempts) == 1:  # the withdrawal has read the worker; now a client registers, and is faster
            await registry.register(route, 2)
        return await replace_status(worker)

    monkeypatch.setattr(store, "replace_status", slow)
    await registry.withdraw(route)
    assert attempts == [0, 1]
    assert [entry.connections for entry in await gateways(store)] == [2]
    await registry.withdraw(route)
    assert await gateways(store) == ()


async def test_a_registration_names_the_heartbeat_that_may_renew_it(store, route, now):
    writer = HeartbeatWriter(store, Key("default", "g-1"), lambda: now)
    registry = StoreLeaseRegistry(store, "gateway-1", lambda: now, lambda _: None, heartbeat=writer)
    await registry.register(route, 1)
    assert [entry.heartbeat for entry in await gateways(store)] == ["default/g-1"]
    await registry.beat("loop", {"allocation-1": 3})
    assert (await store.get(GatewayHeartbeat, "default", "g-1")).status.leases == {"allocation-1": 3}
    assert [entry.connections for entry in await gateways(store)] == [1], "the worker is not written again"


async def test_without_a_heartbeat_none_is_named_and_each_lease_must_be_renewed(registry, route, store):
    await registry.register(route, 1)
    assert [entry.heartbeat for entry in await gateways(store)] == [""]
    with pytest.raises(Unavailable):
        await registry.beat("loop", {"allocation-1": 3})


# --- the copy of the workers ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(store, monkeypatch):
    """The names of the workers that were read."""
    found = []
    get = store.get

    async def counted(kind, namespace, name):
        found.append(name)
        return await get(kind, namespace, name)

    monkeypatch.setattr(store, "get", counted)
    return found


@pytest.fixture
def copies(worker):
    return {worker.key: worker}


@pytest.fixture
def copying(store, now, copies):
    """A registry with a copy of the workers, which gets what is written."""

    def apply(found):
        copies[found.key] = found

    return StoreLeaseRegistry(store, "gateway-1", lambda: now, apply, known=copies.get)


async def test_with_a_copy_of_the_worker_nothing_is_read(copying, route, reads, copies):
    await copying.register(route, 1)
    await copying.renew(route, 2)
    await copying.withdraw(route)
    assert reads == []
    assert next(iter(copies.values())).status.gateways == ()


async def test_a_copy_that_is_old_costs_one_read(store, copying, route, reads, worker):
    await store.replace_status(worker.with_status(failures=1))
    await copying.register(route, 1)
    assert reads == ["p-worker-0"]
    current = await store.get(Worker, "default", "p-worker-0")
    assert (current.status.failures, len(current.status.gateways)) == (1, 1)


@pytest.mark.parametrize("ended", [True, False])
async def test_an_old_copy_refuses_nobody(store, copying, route, copies, worker, now, ended):
    """It says that the lease has ended, or that another one holds the worker; the store says that it goes on."""
    held = worker.lease.but(ended_at=now) if ended else worker.lease.but(id="allocation-0")
    copies[worker.key] = worker.with_lease(held)
    await copying.register(route, 1)
    assert len(await gateways(store)) == 1


async def test_what_an_old_copy_allows_the_store_refuses(store, copying, route, worker, worker_lease):
    await store.replace(worker.with_lease(worker_lease.but(id="allocation-2")))
    with pytest.raises(Gone, match="does not hold worker"):
        await copying.register(route, 1)
    assert await gateways(store) == ()


async def test_a_withdrawal_reads_if_its_copy_has_no_registration(store, copying, route, copies, worker):
    await copying.register(route, 1)
    copies[worker.key] = worker
    await copying.withdraw(route)
    assert await gateways(store) == ()


# --- leases that the table does not have ----------------------------------------------------------------------------


class CountedStore:
    """The real store. It counts lists, and each waits until it may continue."""

    def __init__(self, store):
        self._store = store
        self.lists = 0
        self.started = asyncio.Event()
        self.may_continue = asyncio.Event()
        self.error = None

    def scopes(self, kind):
        return self._store.scopes(kind)

    async def list(self, kind, *, namespace=None):
        self.lists += 1
        self.started.set()
        await self.may_continue.wait()
        if self.error is not None:
            raise self.error
        return await self._store.list(kind, namespace=namespace)


@pytest.fixture
def counted_store(store):
    return CountedStore(store)


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def finder(counted_store, now, seen_workers, pauses):
    async def pause(seconds):
        pauses.append(seconds)
        await asyncio.sleep(0)

    return StoreLeaseRegistry(counted_store, "gateway-1", lambda: now, seen_workers.append, pause=pause)


async def run_loop():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_simultaneous_searches_share_one_list(finder, counted_store, worker, seen_workers):
    counted_store.may_continue.set()
    await asyncio.gather(*(finder.find(f"token-{n}") for n in range(100)))
    assert counted_store.lists == 1
    assert len(seen_workers) == 1


async def test_a_search_during_a_list_gets_the_next_one_and_not_within_a_second(
    finder, counted_store, worker, pauses, monkeypatch
):
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
    first = asyncio.create_task(finder.find("old"))
    await counted_store.started.wait()
    later = [asyncio.create_task(finder.find(f"newer-{n}")) for n in range(20)]
    await run_loop()
    assert counted_store.lists == 1
    counted_store.may_continue.set()
    await asyncio.gather(first, *later)
    assert counted_store.lists == 2
    assert pauses == [0, 1]


async def test_a_list_that_fails_is_an_error_for_all_who_waited_for_it_and_does_not_count(
    finder, counted_store, worker
):
    counted_store.error = Unavailable("the store is away", hint="")
    counted_store.may_continue.set()
    failed = await asyncio.gather(*(finder.find("token") for _ in range(20)), return_exceptions=True)
    assert [type(error) for error in failed] == [Unavailable] * 20
    assert counted_store.lists == 1
    counted_store.error = None
    await finder.find("token")
    assert counted_store.lists == 2


async def test_a_search_that_is_given_up_neither_ends_nor_delays_another(finder, counted_store, worker, pauses):
    given_up, other = (asyncio.create_task(finder.find(name)) for name in ("given up", "other"))
    await counted_store.started.wait()
    given_up.cancel()
    counted_store.may_continue.set()
    async with asyncio.timeout(60):
        await other
    assert (counted_store.lists, pauses) == (1, [0])


async def test_a_list_that_nobody_waits_for_any_more_is_ended_and_does_not_count(finder, counted_store, worker):
    alone = asyncio.create_task(finder.find("token"))
    await counted_store.started.wait()
    alone.cancel()
    await run_loop()
    counted_store.may_continue.set()
    await finder.find("token")
    assert counted_store.lists == 2
