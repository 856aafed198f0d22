"""Revoking leases by what they have in common: who may, which leases are found, and what becomes of their workers."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from bkpool.allocation import LeaseSelector, LeaseService, OwnLease, Revoker
from bkpool.api.revocation_models import RevokeAnswer
from bkpool.core.errors import Conflict, Forbidden, Gone, NotFound, Unavailable
from bkpool.core.names import Key
from bkpool.core.worker import EndReason, GatewayRegistration, Phase, Worker
from bkpool.identity import Identity, Scope
from bkpool.store.mirror import Mirror
from support.captured_logs import capture_logs
from support.world import ANN, BOB, POOL

ADMIN = Identity("admin", admin=True)
CY = Identity("cy", tenant_name="team", tenant_claim="repository")


@pytest.fixture
async def leased(world):
    """One lease of each caller, and one of ann's, by the caller's name."""
    await world.pool(scaling={"max": 5})
    return [await world.replicas[0].allocate(caller) for caller in (ANN, BOB, CY, ANN)]


@pytest.fixture
def revoker(world):
    return Revoker(store=world.store, mirror=world.replicas[0].mirror, leases=world.replicas[0].leases)


def names(revocation):
    return sorted(worker.held_lease.requested_by for worker in revocation.revoked)


async def live(world):
    return [w for w in (await world.workers()).values() if w.lease and not w.lease.ended(world.clock())]


@pytest.mark.parametrize(
    ("selector", "ended"),
    [
        (LeaseSelector(identity="ann"), ["ann", "ann"]),
        (LeaseSelector(identity="nobody"), []),
        (LeaseSelector(tenant="team"), ["cy"]),
        (LeaseSelector(tenant="bob"), ["bob"]),
        (LeaseSelector(tenant="cy"), []),
        (LeaseSelector(identity="bob", namespace="other"), []),
        (LeaseSelector(pool=POOL), ["ann", "ann", "bob", "cy"]),
        (LeaseSelector(worker=Key("default", "p-worker-1")), ["bob"]),
    ],
    ids=str,
)
async def test_the_admin_ends_exactly_the_selected_leases(world, leased, revoker, selector, ended):
    done = await revoker.revoke(selector, (ADMIN,))
    assert (names(done), done.failed) == (ended, ())
    assert len(await live(world)) == len(leased) - len(ended)
    for worker in done.revoked:
        assert (worker.lease.end_reason, worker.lease.end_message) == (EndReason.REVOKED, "by the admin")


async def test_a_lease_is_ended_by_its_id(world, leased, revoker):
    lease_id = leased[2].worker.held_lease.id
    assert names(await revoker.revoke(LeaseSelector(lease_id=lease_id), (ADMIN,))) == ["cy"]


@pytest.mark.parametrize(
    "selector", [LeaseSelector(pool=POOL), LeaseSelector(identity="ann"), LeaseSelector(tenant="ann")], ids=str
)
async def test_a_caller_ends_their_own_leases_and_nobody_elses(world, leased, revoker, selector):
    done = await revoker.revoke(selector, (ANN,))
    assert names(done) == ["ann", "ann"]
    assert {worker.lease.end_message for worker in done.revoked} == {"by its maker"}
    assert {w.lease.requested_by for w in await live(world)} == {"bob", "cy"}


async def test_the_leases_of_others_cannot_be_told_from_none(world, leased, revoker):
    elsewhere = dataclasses.replace(ANN, scope=Scope("other"))
    another = dataclasses.replace(ANN, authority="https://other.issuer")
    bobs, nowhere = Key("default", "p-worker-1"), Key("default", "p-worker-9")
    for callers in ((ANN,), (elsewhere,), (another,)):
        told = []
        for worker in (bobs, nowhere):
            with pytest.raises(NotFound) as caught:
                await revoker.revoke(LeaseSelector(worker=worker), callers)
            told.append(caught.value.message.replace(worker.name, ""))
        assert told[0] == told[1]
        with pytest.raises(NotFound):
            await revoker.revoke(LeaseSelector(lease_id=leased[1].worker.held_lease.id), callers)
        assert (await revoker.revoke(LeaseSelector(identity="bob"), callers)).revoked == ()
        assert (await revoker.revoke(LeaseSelector(pool=Key("default", "no-such-pool")), callers)).revoked == ()
    assert (await revoker.revoke(LeaseSelector(identity="ann"), (another,))).revoked == ()
    assert len(await live(world)) == len(leased)


async def test_what_does_not_exist_is_said_to_the_admin(world, leased, revoker):
    for selector, message in (
        (
            LeaseSelector(worker=Key("default", "p-worker-9")),
            "there is no worker 'p-worker-9' in namespace",
        ),
        (LeaseSelector(lease_id="no-such-id"), "there is no lease with the id 'no-such-id'"),
        (LeaseSelector(pool=Key("default", "nope")), "there is no pool 'nope' in namespace 'default'"),
    ):
        with pytest.raises(NotFound) as caught:
            await revoker.revoke(selector, (ADMIN,))
        assert caught.value.message.startswith(message)
    worker = leased[1].worker.key
    await revoker.revoke(LeaseSelector(worker=worker), (ADMIN,))
    await world.until(lambda: len(world.held()) == 3)
    with pytest.raises(NotFound, match=r"there is no lease on worker 'p-worker-1'.*nothing was ended"):
        await revoker.revoke(LeaseSelector(worker=worker), (ADMIN,))


async def test_a_lease_that_another_replica_has_just_made_is_found(two_replicas):
    """The copy in memory of the replica that is asked may be old, so it is not asked."""
    world = two_replicas
    await world.pool()
    _, second = world.replicas
    never_ran = Mirror(world.store)
    leases = LeaseService(store=world.store, mirror=never_ran, now=world.clock)
    revoker = Revoker(store=world.store, mirror=never_ran, leases=leases)
    grant = await second.allocate(BOB)
    (ended,) = (await revoker.revoke(LeaseSelector(identity="bob"), (ADMIN,))).revoked
    assert ended.key == grant.worker.key


async def test_a_released_lease_whose_builds_still_run_is_revoked_and_a_second_time_is_no_error(
    world, leased, revoker
):
    bobs, leases = leased[1], world.replicas[0].leases
    entry = GatewayRegistration(gateway="g", lease_id=bobs.worker.held_lease.id, renewed_at=world.clock())
    await world.store.replace_status((await world.store.get(Worker, *bobs.worker.key)).with_status(gateways=(entry,)))
    await leases.release(bobs.token)
    await world.until(lambda: Phase.DRAINING in {w.status.phase for w in world.held()})
    assert world.runtime.stopped_at_once == [], "release lets builds finish"
    for _ in range(2):
        assert names(await revoker.revoke(LeaseSelector(identity="bob"), (ADMIN,))) == ["bob"]
    await world.until(lambda: world.runtime.stopped_at_once)
    assert world.runtime.stopped_at_once == [bobs.worker.slot]
    assert len(world.held()) == 4, "a gateway is registered"
    world.clock.advance(minutes=2)
    await world.until(lambda: len(world.held()) == 3)
    with pytest.raises(Gone, match=r"revoked.*by the admin"):
        await leases.lookup(bobs.token)
    await leases.release(bobs.token)
    await leases.release(bobs.token, now=True)


async def test_the_worker_of_a_revoked_lease_is_restarted_before_the_next_lease_and_keeps_its_owners_cache(
    world, leased, revoker
):
    slot, owner = leased[1].worker.slot, leased[1].worker.held_lease.owner
    with capture_logs() as lines:
        await revoker.revoke(LeaseSelector(identity="bob"), (ADMIN,))
        await world.until(lambda: len(world.held()) == 3)
    assert world.runtime.stopped_at_once == [slot]
    assert world.runtime.cache_owners[slot] == owner
    again = await world.replicas[0].allocate(BOB)
    assert (again.worker.slot, world.runtime.wiped) == (slot, [])
    assert [line["by"] for line in lines if line["event"] == "lease.revoked"] == ["by the admin"]
    assert "the lease of bob was revoked by the admin" in [line.get("message") for line in lines]


@pytest.mark.parametrize("how", ["token", "maker", "admin"])
async def test_release_now_is_a_revocation_by_whoever_may_release(world, leased, revoker, how):
    bobs, leases = leased[1], world.replicas[0].leases
    named = {
        "token": bobs.token,
        "maker": OwnLease(bobs.worker.key, (BOB,)),
        "admin": OwnLease(bobs.worker.key, (ADMIN,)),
    }
    with pytest.raises(NotFound):
        await leases.release(OwnLease(bobs.worker.key, (ANN,)), now=True)
    worker = await leases.release(named[how], now=True)
    by = {"token": "with its token", "maker": "by its maker", "admin": "by the admin"}[how]
    assert (worker.lease.end_reason, worker.lease.end_message) == (EndReason.REVOKED, by)
    await world.until(lambda: world.runtime.stopped_at_once == [bobs.worker.slot])


async def test_a_caller_who_waits_for_a_worker_is_told_that_the_lease_was_revoked(world, revoker):
    await world.pool()
    world.runtime.may_start.clear()
    waiting = asyncio.create_task(world.replicas[0].allocate(BOB))
    await world.until(lambda: any(w.lease.token_sha256 for w in world.held()))
    await revoker.revoke(LeaseSelector(identity="bob"), (ADMIN,))
    with pytest.raises(Gone, match=r"revoked.*by the admin"):
        await waiting
    world.runtime.may_start.set()


async def test_a_lease_that_cannot_be_revoked_does_not_save_the_others(world, leased, revoker, monkeypatch):
    stubborn, replace = leased[1].worker.key, world.store.replace

    async def fails_for_bob(worker):
        if worker.key == stubborn:
            raise Conflict("changed")
        return await replace(worker)

    monkeypatch.setattr(world.store, "replace", fails_for_bob)
    done = await revoker.revoke(LeaseSelector(pool=POOL), (ADMIN,))
    assert names(done) == ["ann", "ann", "cy"]
    ((worker, error),) = done.failed
    assert worker.key == stubborn
    assert error.message == "too many requests change p-worker-1 at once"
    with pytest.raises(Conflict):
        await revoker.revoke(LeaseSelector(identity="bob"), (ADMIN,))


async def test_a_namespace_that_may_not_be_read_is_named_and_does_not_save_the_others(world, leased, monkeypatch):
    """Leases by an identity, a tenant or an id may be in any namespace."""
    lists = world.store.list

    async def not_in_bad(kind, *, namespace=None, labels=None):
        if namespace in {None, "bad"}:
            raise Forbidden("buildkitworkers is forbidden")
        return await lists(kind, namespace=namespace, labels=labels)

    monkeypatch.setattr(world.store, "scopes", lambda _kind: ("bad", "default"))
    monkeypatch.setattr(world.store, "list", not_in_bad)
    revoker = Revoker(store=world.store, mirror=world.replicas[0].mirror, leases=world.replicas[0].leases)

    done = await revoker.revoke(LeaseSelector(identity="ann"), (ADMIN,))
    assert names(done) == ["ann", "ann"]
    assert [(view.namespace, view.reason) for view in RevokeAnswer.of(done).failed] == [
        ("bad", "bkpool may not read the workers in namespace 'bad'")
    ]
    done = await revoker.revoke(LeaseSelector(lease_id=leased[1].worker.held_lease.id), (ADMIN,))
    assert (names(done), done.refused) == (["bob"], ()), "no other lease has this id"
    for selector in (LeaseSelector(identity="nobody"), LeaseSelector(lease_id="unknown")):
        with pytest.raises(Unavailable, match="may not read the workers in namespace 'bad'"):
            await revoker.revoke(selector, (ADMIN,))
