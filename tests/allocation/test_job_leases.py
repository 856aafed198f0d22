"""The lease of a job: what it costs, and what a replica does that knows too little (rule 2, docs/rules.md#r2)."""

import asyncio

import pytest

from bkpool.allocation import job_leases
from bkpool.core.claim_order import Request
from bkpool.core.errors import Unavailable
from bkpool.core.names import LABEL_REQUEST, Key
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import Undelivered, Worker
from support.job_race import ANN
from support.unreadable import spoil
from support.world import TAKEN, skip_real_time

POOL = Key("default", "p")


async def lease_of(replica, job="j"):
    async with replica.ask(POOL, job) as offer:
        offer.answered(TAKEN)
    return offer.grant


def freeze(replica):
    """Its watches say nothing more."""
    replica.connection.flowing.clear()


async def live(race):
    return [w for w in (await race.store.list(Worker)).items if w.lease and not w.lease.ended_at]


async def test_a_warm_lease_of_a_job_costs_one_request(race):
    one = race.replicas[0]
    one.connection.calls.clear()
    async with one.ask(POOL, "j") as offer:
        assert one.connection.calls == ["replace"]
        offer.answered(TAKEN)


async def test_a_repeated_request_reads_the_worker_and_claims_none(race):
    one, other = race.replicas
    given = await lease_of(one)
    key = given.worker.key
    await race.known_to(other, given.worker)
    await race.known_to(other, given.worker, lambda: other.mirror.workers[key].undelivered is None)
    other.connection.calls.clear()
    async with other.ask(POOL, "j") as offer:
        assert offer.grant.token == given.token
        assert other.connection.calls == ["get"]
        offer.answered(TAKEN)


async def test_many_requests_of_one_job_at_one_replica_claim_one_worker(race):
    one = race.replicas[0]
    grants = await asyncio.gather(*(lease_of(one) for _ in range(20)))
    assert len({grant.token for grant in grants}) == 1
    workers = (await race.store.list(Worker)).items
    assert sum(int(w.metadata.generation or 0) > 1 for w in workers) == 1, "no other worker was ever claimed"


async def test_a_lease_that_has_ended_unseen_is_not_given_again(race):
    one, other = race.replicas
    given = await lease_of(one)
    await race.known_to(other, given.worker)
    freeze(other)
    await one.leases.release(given.token)
    again = await lease_of(other)
    assert again.token != given.token
    assert await other.leases.lookup(again.token)


async def test_a_lease_that_the_store_does_not_have_any_more_is_asked_for_seldom(race, monkeypatch):
    """The store was restored from a backup: what it has is older than the copy, so the copy stays as it is."""
    one = race.replicas[0]
    given = await lease_of(one)
    jobs, waited = one.allocator._jobs, []
    request = Request(POOL, given.worker.metadata.labels[LABEL_REQUEST])
    key = given.worker.key
    await race.known_to(one, given.worker, lambda: one.mirror.workers[key].undelivered is None)
    get = race.store.get

    async def before_the_lease(kind, *name):
        worker = await get(kind, *name)
        restored = worker.with_lease(None).but(metadata=worker.metadata.but(resource_version="1"))
        return worker if waited else restored

    async def no_change(_request, seconds):
        waited.append(seconds)
        return False

    monkeypatch.setattr(race.store, "get", before_the_lease)
    monkeypatch.setattr(jobs, "_change_of", no_change)
    one.connection.calls.clear()
    async with asyncio.timeout(60):
        found = await jobs.find(request)
    assert found.held_lease.id == given.worker.held_lease.id
    assert (one.connection.calls, waited) == (["get", "get"], [job_leases.LONGEST_DELAY])


async def test_a_replica_whose_watch_is_silent_asks_the_store_and_gives_up_its_claim(race):
    one, other = race.replicas
    freeze(other)
    given = await lease_of(one)
    other.connection.calls.clear()
    assert (await lease_of(other)).token == given.token
    assert "list" in other.connection.calls
    await race.quiet(other)
    assert [w.key for w in await live(race)] == [given.worker.key]


async def test_a_replica_whose_watch_is_silent_still_leases_workers(race):
    one = race.replicas[0]
    freeze(one)
    one.connection.calls.clear()
    given = await lease_of(one)
    assert one.connection.calls[:2] == ["replace", "list"]
    assert [w.key for w in await live(race)] == [given.worker.key]


async def test_a_claim_that_another_replica_has_taken_over_is_not_ended(race):
    """It gave its claim up because it could not know the order, and the other replica knew it."""
    one, other = race.replicas
    async with one.ask(POOL, "j") as offer:
        claimed = offer.grant.worker
        await race.known_to(other, claimed)
        async with other.ask(POOL, "j") as joined:
            assert joined.grant.worker.key == claimed.key
            one.allocator._abandoner.abandon(claimed)
            await race.quiet(one)
            assert [w.key for w in await live(race)] == [claimed.key]
            joined.answered(TAKEN)
        offer.answered(TAKEN)


async def test_a_lease_that_cannot_be_read_is_still_the_lease_of_its_job(race, tmp_path):
    one, other = race.replicas
    given = await lease_of(one)
    await race.known_to(other, given.worker)
    spoil(tmp_path / "state.db", given.worker.key.name, lambda doc: doc["spec"].update(poolRef=7))
    await race.store.replace_status((await race.free_worker()).with_status(failures=1))
    await race.known_to(other, given.worker, lambda: given.worker.key in other.mirror.unreadable_workers)
    with pytest.raises(UnreadableObject, match="cannot be read"):
        await lease_of(other)


async def test_a_lease_without_a_job_has_no_label_of_an_earlier_one(race):
    one = race.replicas[0]
    for worker in (await race.store.list(Worker)).items:
        labels = {**worker.metadata.labels, LABEL_REQUEST: "earlier"}
        await race.store.replace(worker.but(metadata=worker.metadata.but(labels=labels)))
    given = await lease_of(one, "")
    assert LABEL_REQUEST not in (await race.store.get(Worker, *given.worker.key)).metadata.labels
    assert ANN.name == given.worker.held_lease.requested_by


async def expect_a_slow_store(race, monkeypatch, replica, method):
    """The store does not answer this method, and a request at the replica says so when its time is over."""
    asked = asyncio.Event()

    async def never(*_args, **_narrowed):
        asked.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(race.store, method, never)
    waiting = asyncio.create_task(lease_of(replica))
    await asked.wait()
    skip_real_time()
    with pytest.raises(Unavailable, match="the store is slow: it did not say within 1m which worker"):
        await waiting
    monkeypatch.undo()


async def test_the_reason_of_a_request_that_waits_for_its_watch_is_the_store(race, monkeypatch):
    """There are free workers. The claim is written, and neither the watch nor a list tells of it."""
    freeze(race.replicas[0])
    await expect_a_slow_store(race, monkeypatch, race.replicas[0], "list")


async def test_the_reason_of_a_request_that_reads_the_lease_of_its_job_is_the_store(race, monkeypatch):
    one, other = race.replicas
    given = await lease_of(one)
    await race.known_to(other, given.worker)
    await expect_a_slow_store(race, monkeypatch, other, "get")


async def test_requests_that_wait_for_the_replicas_of_two_claims_share_lists_that_become_rare(race, monkeypatch):
    """Two replicas were killed after their claims, and one list has shown both."""
    one, other = race.replicas
    given = (await lease_of(one)).worker
    lease = given.held_lease
    second = await race.free_worker()
    await race.known_to(other, given)
    freeze(other)
    twin = lease.but(id="twin", undelivered=Undelivered(replica="dead"), token_sha256="t")
    labels = {**second.metadata.labels, LABEL_REQUEST: given.metadata.labels[LABEL_REQUEST]}
    second = await race.store.replace(second.but(metadata=second.metadata.but(labels=labels)).with_lease(twin))
    await one.leases.change(given, lambda lease: lease.but(undelivered=Undelivered(replica="dead")))
    jobs, waited = other.allocator._jobs, []
    request = Request(POOL, given.metadata.labels[LABEL_REQUEST])
    monkeypatch.setattr(jobs, "_first", lambda _request: None)

    async def no_change(_request, seconds):
        waited.append(seconds)
        if len(waited) == 10:
            await race._take_lease_off(second)
        return False

    monkeypatch.setattr(jobs, "_change_of", no_change)
    other.connection.calls.clear()
    found = await asyncio.gather(*(jobs.find(request) for _ in range(5)))
    assert {worker.key for worker in found} == {given.key}
    assert other.connection.calls.count("list") == len(waited) == 10
    assert waited[:2] == [0.05, 0.1]
    assert waited[-1] == 10.0
    assert not jobs._looks
