"""Revoked leases: every open connection is cut at once, at every replica, and the next one is told by whom."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.allocation import LeaseService
from bkpool.core import tokens
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import EndReason, Phase, Worker, new_worker
from bkpool.gateway.control.lease_registry import StoreLeaseRegistry
from bkpool.gateway.control.table_feeder import TableFeeder
from bkpool.gateway.session.limits import GatewayLimits
from bkpool.store.mirror import Mirror
from bkpool.store.sqlite import SqliteStore

BY_ADMIN = {"end_reason": EndReason.REVOKED, "end_message": "by the admin"}
TOLD = (16, "the lease was revoked by the admin. Run `bkpool allocate` again.")


async def test_every_open_connection_of_a_revoked_lease_is_cut_and_no_other_one(world):
    token, other = world.lease("a"), world.lease("b")
    cut = [await world.connect(token) for _ in range(5)]
    stays = await world.connect(other)
    for streams in (*cut, stays):
        await streams.echo(b"building")
    world.lease("a", **BY_ADMIN)
    for streams in cut:
        assert await streams.read_to_end() == b""
    assert await (await world.connect(token)).call() == TOLD
    await world.registry.wait_for("withdraw")
    await stays.echo(b"still building")


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_a_connection_that_drains_is_cut_when_its_lease_is_revoked(world, how):
    token = world.lease(expires_at=world.now().timestamp() + 5)
    streams = await world.connect(token)
    await streams.echo(b"building")
    if how == "released":
        world.lease(end_reason=EndReason.RELEASED)
    else:
        await world.advance(6)
    await streams.echo(b"still building")
    world.lease(**BY_ADMIN)
    assert await streams.read_to_end() == b""


async def test_a_client_that_waits_for_its_worker_is_told_that_its_lease_was_revoked(world):
    token = world.lease(endpoint=None, wait_reason="it is being started")
    waiting = await world.connect(token)
    waiting.start_call()
    await world.wait_until(world.holds_client)
    world.lease(**BY_ADMIN)
    assert await waiting.call_result() == TOLD


async def test_a_gateway_that_was_frozen_cuts_when_it_learns_of_the_revocation_after_its_end(world):
    """The lease has left its worker before this gateway saw the revocation."""
    token = world.lease()
    streams = await world.connect(token)
    await streams.echo(b"building")
    world.end_lease("a", EndReason.REVOKED, "by the admin")
    assert await streams.read_to_end() == b""


# --- two replicas over one store ------------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path):
    opened = await SqliteStore.open(tmp_path / "state.db")
    yield opened
    await opened.close()


async def changed_until(mirror, condition):
    """Waits until a change of the store makes the condition true."""
    changed = asyncio.Event()
    unsubscribe = mirror.subscribe(lambda _pool: changed.set())
    async with asyncio.timeout(60):
        while not condition():
            changed.clear()
            await changed.wait()
    unsubscribe()


async def test_a_revocation_cuts_the_connections_at_every_replica_and_waits_for_no_timer(
    store, new_world, worker_lease, now
):
    """Everything is real but buildkitd and the clocks: the store, each replica's copy of it, registrations, TLS,
    sockets. The clocks of the gateways stand still, so what cuts is the news of the revocation."""
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    mirrors = [Mirror(store) for _ in range(3)]
    watching = [asyncio.create_task(mirror.run()) for mirror in mirrors]
    await asyncio.gather(*(mirror.ready.wait() for mirror in mirrors))
    replicas, feeds = [], []
    for number, mirror in enumerate(mirrors[:2]):
        feeder = TableFeeder(mirror)
        registry = StoreLeaseRegistry(store, f"gateway-{number}", lambda: now, mirror.apply, hand_on=feeder.hand_on)
        replicas.append(await new_world(registry=registry))
        feeds.append(feeder.start(replicas[-1].gateway.update))
    token = replicas[0].token("a")
    lease = worker_lease.but(token_sha256=tokens.digest(token))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, lease, {}))
    ready = {"phase": Phase.ALLOCATED, "endpoint": replicas[0].endpoint, "cache_owner": lease.owner}
    await store.replace_status(worker.with_status(**ready))
    clients = [await replica.connect(token) for replica in replicas for _ in range(3)]
    for streams in clients:
        await streams.echo(b"building")
    registered = {entry.gateway for entry in (await store.get(Worker, *worker.key)).status.gateways}
    assert registered == {"gateway-0", "gateway-1"}

    leases = LeaseService(store=store, mirror=mirrors[2], now=lambda: now)
    await leases.revoke(worker, "by the admin")
    assert await asyncio.gather(*(streams.read_to_end() for streams in clients)) == [b""] * len(clients)
    for replica in replicas:
        assert await (await replica.connect(token)).call() == TOLD
    await changed_until(mirrors[2], lambda: not mirrors[2].workers[worker.key].status.gateways)

    for unsubscribe in feeds:
        unsubscribe()
    for replica in replicas:
        await replica.gateway.close()
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)


async def test_a_replica_whose_watch_says_nothing_cuts_when_it_renews_its_registration(
    store, new_world, worker_lease, now
):
    mirror = Mirror(store)  # it does not run, like a watch that hangs
    feeder = TableFeeder(mirror)
    registry = StoreLeaseRegistry(store, "gateway-1", lambda: now, mirror.apply, hand_on=feeder.hand_on)
    world = await new_world(registry=registry)
    unsubscribe = feeder.start(world.gateway.update)
    token = world.token("a")
    pool = await store.create(Pool(metadata=Metadata(name="p")))
    lease = worker_lease.but(token_sha256=tokens.digest(token))
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, lease, {}))
    ready = worker.with_status(phase=Phase.ALLOCATED, endpoint=world.endpoint, cache_owner=lease.owner)
    await store.replace_status(ready)
    streams = await world.connect(token)
    await streams.echo(b"building")
    await LeaseService(store=store, mirror=Mirror(store), now=lambda: now).revoke(worker, "by the admin")
    await streams.echo(b"still building, as far as this replica knows")
    await world.advance(GatewayLimits().renew_interval)
    assert await streams.read_to_end() == b""
    assert await (await world.connect(token)).call() == TOLD
    unsubscribe()
    await world.gateway.close()
