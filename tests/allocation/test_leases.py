"""Renewing, releasing, expiring and losing leases, and the answer to a client that comes too late."""

import asyncio
import dataclasses
from datetime import timedelta

import pytest

from bkpool.allocation import LeaseService, OwnLease
from bkpool.controller import controller
from bkpool.core.errors import Conflict, Gone, InvalidInput, NotFound, WorkerFailed
from bkpool.core.names import Key
from bkpool.core.registrations import REGISTRATION_LIFE
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import GatewayRegistration, Phase, Worker
from bkpool.identity import Identity, Scope
from bkpool.store.mirror import Mirror
from support.captured_logs import capture_logs
from support.unreadable import spoil
from support.world import ANN, BOB, POOL


@pytest.fixture
async def grant(world):
    await world.pool(scaling={"max": 1}, gateway={"tokenTTL": "1h", "maxTokenTTL": "3h"})
    return await world.replicas[0].allocate()


async def still_allowed(_worker, _pool):
    """Today's rules allow the pool to the caller who made the lease."""


@pytest.fixture
def leases(world):
    return world.replicas[0].leases


async def test_renew_moves_the_end_but_never_beyond_the_certificate(world, grant, leases):
    world.clock.advance(minutes=30)
    worker = await leases.renew(grant.token, None, still_allowed)
    assert worker.held_lease.expires_at == world.clock() + timedelta(hours=1)
    world.clock.advance(minutes=59)
    await leases.renew(grant.token, timedelta(hours=3), still_allowed)
    worker = await leases.lookup(grant.token)
    assert worker.lease.expires_at == worker.lease.not_after
    with pytest.raises(InvalidInput):
        await leases.renew(grant.token, timedelta(hours=4), still_allowed)


async def test_an_expired_lease_ends_and_the_error_says_expired(world, grant, leases):
    world.clock.advance(hours=1)
    with pytest.raises(Gone, match="expired"):
        await leases.renew(grant.token, None, still_allowed)
    await world.until(lambda: not world.held())
    with pytest.raises(Gone, match="expired"):
        await leases.lookup(grant.token)
    await leases.release(grant.token)  # nothing to do, and no error


async def test_a_lease_may_be_released_several_times(world, grant, leases):
    await leases.release(grant.token)
    await leases.release(grant.token)
    await world.until(lambda: not world.held())
    await leases.release(grant.token)
    with pytest.raises(Gone, match="released"):
        await leases.renew(grant.token, None, still_allowed)


@pytest.mark.parametrize("token", ["x" * 43, "", "alloc:", "\0", "é" * 43, "x" * 10_000])
async def test_an_unknown_or_malformed_token_is_not_found(grant, leases, token):
    for ask in (leases.lookup, leases.release):
        with pytest.raises(NotFound) as caught:
            await ask(token)
        assert token not in caught.value.message or not token


async def test_forged_tokens_cost_one_list_together_and_each_only_once(world, grant, monkeypatch):
    lists, pauses, list_workers = [], [], world.store.list

    async def counted(kind, **filters):
        lists.append(kind)
        return await list_workers(kind, **filters)

    async def pause(seconds):
        pauses.append(seconds)
        await asyncio.sleep(0)

    mirror = world.replicas[0].mirror
    leases = LeaseService(store=world.store, mirror=mirror, now=world.clock, pause=pause)
    monkeypatch.setattr(world.store, "list", counted)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)

    async def ask(numbers):
        asked = await asyncio.gather(*(leases.lookup(f"{n:043}") for n in numbers), return_exceptions=True)
        assert all(isinstance(error, NotFound) for error in asked)

    await ask(range(100))
    assert (lists, pauses) == ([Worker], [0])
    await ask(range(100))
    assert (await leases.lookup(grant.token)).key == grant.worker.key
    assert (lists, pauses) == ([Worker], [0])
    await ask(range(100, 200))
    assert (lists, pauses) == ([Worker] * 2, [0, 1])


async def test_a_lease_of_which_the_copy_knows_nothing_is_searched_for_in_the_store(world, grant):
    leases = LeaseService(store=world.store, mirror=Mirror(world.store), now=world.clock)
    assert (await leases.lookup(grant.token)).key == grant.worker.key


async def test_a_lease_on_a_worker_that_cannot_be_read_is_known_and_left_alone(world, grant, tmp_path):
    spoil(tmp_path / "state.db", grant.worker.key.name, lambda document: document["status"].update(phase="Later"))
    leases = LeaseService(store=world.store, mirror=Mirror(world.store), now=world.clock)
    for _ in range(2):  # found in the store, then in memory
        with pytest.raises(UnreadableObject):
            await leases.lookup(grant.token)


async def test_a_worker_that_dies_is_restarted_with_its_lease_and_cache(world, grant, leases):
    world.runtime.die(grant.worker.slot)
    await world.until(lambda: any(w.status.failures == 1 for w in world.held()))
    world.clock.advance(seconds=5)
    await world.until(lambda: world.held()[0].status.phase is Phase.ALLOCATED and world.held()[0].status.endpoint)
    assert (await leases.lookup(grant.token)).lease.id == grant.worker.lease.id
    assert world.runtime.wiped == []


async def test_a_worker_that_keeps_dying_loses_the_lease_with_the_reason(world, grant, leases):
    world.runtime.failure = "exec format error"
    world.runtime.die(grant.worker.slot)

    def push():
        world.clock.advance(seconds=30)
        return not world.held()

    await world.until(push)
    with pytest.raises(Gone, match=r"lost.*exec format error"):
        await leases.lookup(grant.token)


async def test_the_log_tail_of_a_failed_start_is_left_out_once_nobody_holds_the_worker(world, grant, leases):
    await leases.release(grant.token)
    await world.until(lambda: not world.held())
    world.runtime.failure, world.runtime.log_tail = "buildkitd ended with exit code 1", "a step of the last build"

    def restarted():
        world.clock.advance(seconds=5)
        workers = world.replicas[0].mirror.workers.values()
        return any(worker.status.message == "buildkitd ended with exit code 1" for worker in workers)

    with capture_logs() as lines:
        world.runtime.die(grant.worker.slot)
        await world.until(restarted)
    events = [line["message"] for line in lines if line["event"] == "object.event"]
    assert "buildkitd ended with exit code 1" in events
    assert not any("a step of the last build" in message for message in events)


async def test_a_lease_stays_while_a_gateway_is_registered(world, grant, leases):
    worker = await leases.lookup(grant.token)
    entry = GatewayRegistration(gateway="g", lease_id=worker.lease.id, renewed_at=world.clock())
    await world.store.replace_status(worker.with_status(gateways=(entry,)))
    await leases.release(grant.token)
    await world.until(lambda: world.held() and world.held()[0].status.phase is Phase.DRAINING)
    world.clock.advance(seconds=REGISTRATION_LIFE.total_seconds() - 1)
    assert world.held()
    world.clock.advance(seconds=2)
    await world.until(lambda: not world.held())


async def test_the_history_of_a_shared_cache_is_cleared_before_the_lease_leaves_the_worker(world, monkeypatch):
    await world.pool(scaling={"max": 1}, cache={"reuse": "pool"})
    replica = world.replicas[0]
    held_then = []

    async def clear_history(slot):
        held_then.append([worker.held_lease.requested_by for worker in world.held()])

    monkeypatch.setattr(world.runtime, "clear_history", clear_history)
    waiting = (await replica.allocate(ANN)).token, asyncio.create_task(replica.allocate(BOB))
    await replica.leases.release(waiting[0])
    bobs = await waiting[1]
    assert held_then == [["ann"]]
    assert world.runtime.wiped == [], "the cache is shared"
    await replica.leases.release(bobs.token)
    await world.until(lambda: not world.held())
    assert held_then == [["ann"], ["bob"]]


@pytest.mark.parametrize("cache", [{}, {"reuse": "pool", "keepHistory": True}])
async def test_another_history_is_not_cleared(world, cache):
    await world.pool(scaling={"max": 1}, cache=cache)
    grant = await world.replicas[0].allocate(ANN)
    await world.replicas[0].leases.release(grant.token)
    await world.until(lambda: not world.held())
    assert world.runtime.cleared == []


async def test_a_history_that_cannot_be_cleared_keeps_the_lease_on_the_worker(world, monkeypatch):
    """A crash at this moment, too, leaves the lease where it is: the next controller begins again."""
    await world.pool(scaling={"max": 1}, cache={"reuse": "pool"})
    monkeypatch.setattr(controller, "PAUSE", 0)
    outcomes = [WorkerFailed("it does not end"), Conflict("another writer"), None]

    async def clear_history(slot):
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    monkeypatch.setattr(world.runtime, "clear_history", clear_history)
    grant = await world.replicas[0].allocate(ANN)
    await world.replicas[0].leases.release(grant.token)
    await world.until(lambda: not world.held())
    assert outcomes == []


async def test_idle_workers_are_removed_after_the_delay_and_the_cache_stays(world, grant, leases):
    await leases.release(grant.token)
    await world.until(lambda: not world.held())
    world.clock.advance(minutes=16)
    await world.until(lambda: not world.replicas[0].mirror.workers and not world.runtime.daemons)
    assert world.runtime.cache_owners[grant.worker.slot] == grant.worker.lease.owner


async def test_the_pools_status_is_updated(world, grant):
    def up_to_date():
        pool = world.replicas[0].mirror.pools[POOL]
        return (pool.status.workers, pool.status.allocated, pool.status.phase) == (1, 1, "Ready")

    await world.until(up_to_date)


async def test_a_daemon_without_a_worker_is_stopped(world, grant):
    await world.store.delete(Worker, *grant.worker.key)
    await world.until(lambda: not world.runtime.daemons)


async def test_only_the_caller_of_a_lease_may_renew_and_release_it_by_its_worker(world, grant, leases):
    key = grant.worker.key
    mine, others = OwnLease(key, (BOB, ANN)), OwnLease(key, (BOB,))
    nowhere = OwnLease(Key(key.namespace, "p-worker-7"), (ANN,))
    elsewhere = OwnLease(key, (dataclasses.replace(ANN, scope=Scope("other")),))
    world.clock.advance(minutes=30)
    assert (await leases.renew(mine, None, still_allowed)).held_lease.expires_at == world.clock() + timedelta(hours=1)
    for named in (others, nowhere, elsewhere):
        for ask in (leases.release(named), leases.renew(named, None, still_allowed)):
            with pytest.raises(NotFound, match=r"there is no lease of yours on worker .p-worker-"):
                await ask
    await leases.release(mine)
    await leases.release(mine)
    await world.until(lambda: not world.held())
    with pytest.raises(NotFound):
        await leases.renew(mine, None, still_allowed)


async def test_the_admin_may_release_every_lease(world, grant, leases):
    await leases.release(OwnLease(grant.worker.key, (Identity("root", admin=True),)))
    await world.until(lambda: not world.held())


async def test_a_lowered_maximum_limits_existing_leases(world, grant, leases):
    await world.change_spec(gateway={"tokenTTL": "30m", "maxTokenTTL": "50m"})
    world.clock.advance(minutes=40)
    made = grant.worker.held_lease.allocated_at
    assert (await leases.renew(grant.token, None, still_allowed)).held_lease.expires_at == made + timedelta(
        minutes=50
    )
    await leases.change((await leases.lookup(grant.token)), lambda lease: lease.but(expires_at=lease.not_after))
    world.clock.advance(minutes=15)
    with pytest.raises(InvalidInput, match="has already run for the pool's maximum of 50m"):
        await leases.renew(grant.token, None, still_allowed)
    assert (await leases.lookup(grant.token)).held_lease.expires_at == made + timedelta(hours=3), (
        "it is not cut short"
    )


async def test_each_event_of_a_lease_is_logged_with_its_identity(world, grant, leases):
    with capture_logs() as lines:
        await leases.renew(grant.token, None, still_allowed)
        await leases.release(grant.token)
        await world.until(lambda: not world.held())
        second = await world.replicas[0].allocate(BOB)
        world.clock.advance(hours=1)
        await world.until(lambda: not world.held())
        third = await world.replicas[0].allocate(BOB)
        world.runtime.failure = "exec format error"
        world.runtime.die(third.worker.slot)

        def push():
            world.clock.advance(seconds=30)
            return not world.held()

        await world.until(push)
    found = [
        (line["event"], line["identity"], line["allocation"], line.get("reason"))
        for line in lines
        if line["event"].startswith("lease.")
    ]
    ids = [made.worker.held_lease.id for made in (grant, second, third)]
    assert found == [
        ("lease.renewed", "ann", ids[0], None),
        ("lease.released", "ann", ids[0], None),
        ("lease.ended", "ann", ids[0], "released"),
        ("lease.claimed", "bob", ids[1], None),
        ("lease.ended", "bob", ids[1], "expired"),
        ("lease.claimed", "bob", ids[2], None),
        ("lease.lost", "bob", ids[2], found[6][3]),
        ("lease.ended", "bob", ids[2], "lost"),
    ]
    assert "exec format error" in found[6][3]
    assert all(line["pool"] == "default/p" for line in lines if line["event"].startswith("lease."))
    assert not any(made.token in str(lines) for made in (grant, second, third))
