"""Leasing workers: who gets which worker, in which order, and what a cancelled request leaves behind."""

import asyncio
from datetime import timedelta

import pytest
from cryptography import x509

from bkpool.allocation import allocator
from bkpool.core import tokens
from bkpool.core.errors import InvalidInput, NoCapacity, NotFound, Unavailable, WorkerFailed
from bkpool.core.pool import Pool
from bkpool.core.worker import Phase
from bkpool.identity import Identity
from bkpool.pki.authority import Authority
from bkpool.pki.rotation import ROLLOUT, Former, Rotation
from support.world import ANN, BOB, POOL, WAIT, skip_real_time

CARL, ADMIN = Identity("carl"), Identity("admin", admin=True)
HOUR = 3600.0
NO_LIMITS = {"limits": {"identity": {"leases": 1000, "waiters": 1000}}}
"""A pool of which one caller may have everything."""


def slot_name(grant):
    return grant.worker.key.name


async def test_after_a_rotation_callers_trust_both_cas_and_the_new_one_signs_when_all_gateways_know_it(world):
    await world.pool()
    old, new = Authority.create(world.clock()), Authority.create(world.clock())
    allocator = world.replicas[0].allocator
    allocator._rotation = Rotation(new, Former(old, world.clock()), world.clock)
    for signer in (old, new):
        grant = await world.replicas[0].allocate()
        assert signer.issued(grant.certificate_pem)
        assert grant.ca_pem == new.cert_pem + old.cert_pem
        world.clock.advance(minutes=61)


async def test_without_a_rotation_no_lease_looks_at_all_workers(world, monkeypatch):
    await world.pool()
    mirror, looked_at = world.replicas[0].mirror, []

    class Counted:
        def __iter__(self):
            looked_at.append(1)
            return iter(())

    monkeypatch.setattr(mirror, "all_workers", Counted)
    await world.replicas[0].allocate()
    assert not looked_at
    before = Former(Authority.create(world.clock()), world.clock() - 2 * ROLLOUT)
    world.replicas[0].allocator._rotation = Rotation(world.authority, before, world.clock)
    await world.replicas[0].allocate()
    assert looked_at, "a lease from before it may be there"


async def test_an_empty_pool_creates_a_worker_for_the_lease(world):
    await world.pool()
    grant = await world.replicas[0].allocate()
    worker = (await world.workers())["p-worker-0"]
    assert worker.status.phase is Phase.ALLOCATED
    assert worker.lease.token_sha256 == tokens.digest(grant.token)
    assert grant.token not in str(worker.to_json()), "only the digest is stored"
    leaf = x509.load_pem_x509_certificate(grant.certificate_pem)
    assert leaf.subject.rfc4514_string() == f"CN=alloc:{grant.token}"
    assert leaf.not_valid_after_utc == worker.lease.not_after.replace(microsecond=0)


async def test_an_idle_worker_is_leased_and_another_is_created_to_be_idle(world):
    await world.pool(scaling={"min": 1, "max": 3})
    await world.until(lambda: any(w.status.phase is Phase.IDLE for w in world.replicas[0].mirror.workers.values()))
    grant = await world.replicas[0].allocate()
    assert slot_name(grant) == "p-worker-0"
    await world.until(lambda: len(world.replicas[0].mirror.workers) == 2)


async def test_what_nobody_waits_for_comes_after_an_answer_but_not_after_a_wait(world, monkeypatch):
    await world.pool(scaling={"min": 1, "max": 1}, auth=NO_LIMITS)
    await world.until(lambda: any(w.status.phase is Phase.IDLE for w in world.replicas[0].mirror.workers.values()))
    api = world.replicas[0]
    rush, claim, on = api.mirror.rush, api.allocator._claimer.claim, list[bool]()

    async def noted(*arguments):
        on.append(rush.is_on)
        return await claim(*arguments)

    monkeypatch.setattr(api.allocator._claimer, "claim", noted)
    grant = await api.allocate(ANN)
    assert (on, rush.is_on) == ([True], False)
    waiting = asyncio.create_task(api.allocate(ANN))
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    assert not rush.is_on, "it waits for a worker"
    await api.leases.release(grant.token)
    await waiting
    assert (on, rush.is_on) == ([True, True], False)
    waiting = asyncio.create_task(api.allocate(ANN))
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not rush.is_on


async def test_a_caller_gets_their_cache_back_and_nobody_else_gets_it(world):
    await world.pool(scaling={"max": 2}, auth=NO_LIMITS)
    api = world.replicas[0]
    first = await api.allocate(ANN)
    await api.leases.release(first.token)
    await world.until(lambda: not world.held())
    other = await api.allocate(BOB)
    assert slot_name(other) != slot_name(first), "a new slot before another's cache is wiped"
    again = await api.allocate(ANN)
    assert slot_name(again) == slot_name(first)
    assert world.runtime.wiped == []
    await api.leases.release(other.token)
    await world.until(lambda: len(world.held()) == 1)
    third = await api.allocate(ANN)
    assert world.runtime.wiped == [other.worker.slot], "the pool is full: the least recently used cache is wiped"
    assert world.runtime.daemons[third.worker.slot].cache_owner == third.worker.lease.owner


async def test_with_reuse_never_the_cache_is_wiped_between_leases_of_one_caller(world):
    await world.pool(scaling={"max": 1}, cache={"reuse": "never"})
    api = world.replicas[0]
    first = await api.allocate()
    await api.leases.release(first.token)
    await world.until(lambda: world.runtime.wiped == [first.worker.slot])
    assert slot_name(await api.allocate()) == slot_name(first)


async def test_the_requests_of_one_tenant_are_served_first_come_first_served(world):
    await world.pool(scaling={"max": 1}, auth=NO_LIMITS)
    api = world.replicas[0]
    grant = await api.allocate()
    order = []

    async def wait_in_queue(number):
        mine = await api.allocate()
        order.append(number)
        await api.leases.release(mine.token)

    waiting = []
    for number in range(8):
        waiting.append(asyncio.create_task(wait_in_queue(number)))
        await world.until(lambda: api.allocator.waiting(POOL) == len(waiting))
    await api.leases.release(grant.token)
    await asyncio.gather(*waiting)
    assert order == list(range(8))


async def test_tenants_get_workers_in_turn(world):
    """Ann has asked many times before Bob and Carl ask: they wait for one request of each other tenant."""
    await world.pool(scaling={"max": 1}, auth=NO_LIMITS)
    api = world.replicas[0]
    grant = await api.allocate()
    order, waiting = [], []

    async def wait_in_queue(caller):
        mine = await api.allocate(caller)
        order.append(caller.name)
        await api.leases.release(mine.token)

    for caller in [ANN] * 4 + [BOB] * 2 + [ANN] * 2 + [CARL]:
        waiting.append(asyncio.create_task(wait_in_queue(caller)))
        await world.until(lambda: api.allocator.waiting(POOL) == len(waiting))
    await api.leases.release(grant.token)
    await asyncio.gather(*waiting)
    assert order == ["ann", "bob", "carl", "ann", "bob", "ann", "ann", "ann", "ann"]


async def test_one_caller_cannot_lock_a_pool(world):
    """By default they leave one worker for others, and only some of their requests wait. The admin has no limit."""
    await world.pool(scaling={"max": 3})
    api = world.replicas[0]
    own = [await api.allocate(ANN) for _ in range(2)]
    waiting = [asyncio.create_task(api.allocate(ANN, wait=60)) for _ in range(6)]
    await world.until(lambda: api.allocator.waiting(POOL) == 6)
    with pytest.raises(
        NoCapacity, match=r"identity\.waiters: 6 requests of ann wait already, and at most 6"
    ) as caught:
        await api.allocate(ANN)
    assert (caught.value.code, caught.value.status) == ("LimitReached", 429)
    other = await api.allocate(BOB)
    await api.leases.release(other.token)
    admins = await api.allocate(ADMIN)
    await api.leases.release(admins.token)
    await world.until(lambda: len(world.held()) == 2)
    assert api.allocator.waiting(POOL) == 6

    await api.leases.release(own[0].token)
    await world.until(waiting[0].done)
    assert api.allocator.waiting(POOL) == 5, "one that ended makes room for one"
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_caller_with_all_they_may_have_is_told_so(world):
    await world.pool(scaling={"max": 2})
    api = world.replicas[0]
    await api.allocate(ANN)
    with pytest.raises(NoCapacity, match=r"identity\.leases: ann has 1 of the 2 workers of pool 'p'") as caught:
        await api.allocate(ANN, wait=0.05)
    assert caught.value.code == "LimitReached"


async def test_the_admin_may_have_every_worker(world):
    await world.pool(scaling={"max": 2})
    for _ in range(2):
        await world.replicas[0].allocate(ADMIN)
    with pytest.raises(NoCapacity, match="no worker of pool 'p' became free"):
        await world.replicas[0].allocate(ADMIN, wait=0.05)


async def test_repetitions_of_one_request_take_places_of_their_caller_only(world):
    await world.pool(scaling={"max": 1})
    api = world.replicas[0]
    await api.allocate(ANN)
    again = [asyncio.create_task(api.allocate(BOB, wait=60, job_id="job")) for _ in range(2)]
    await world.until(lambda: api.allocator.waiting(POOL) == 2)
    with pytest.raises(NoCapacity, match="at most 2 may"):
        await api.allocate(BOB, job_id="job")
    for one in again:
        one.cancel()
    await asyncio.gather(*again, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.any_python
async def test_two_hundred_requests_at_once_never_share_a_worker(two_replicas):
    world = two_replicas
    await world.pool(scaling={"max": 4}, auth=NO_LIMITS)
    await world.until(lambda: POOL in world.replicas[1].mirror.pools)
    holders = set()

    async def job(number):
        api = world.replicas[number % 2]
        grant = await api.allocate(wait=300, marked=False)
        assert slot_name(grant) not in holders
        holders.add(slot_name(grant))
        await asyncio.sleep(0)
        holders.remove(slot_name(grant))
        await api.leases.release(grant.token)

    await asyncio.gather(*(job(number) for number in range(200)))
    assert len(await world.workers()) <= 4


async def test_a_request_that_is_cancelled_leaves_the_queue(world):
    await world.pool(scaling={"max": 1})
    api = world.replicas[0]
    held = await api.allocate()
    leaver, stayer = (asyncio.create_task(api.allocate()) for _ in range(2))
    await world.until(lambda: api.allocator.waiting(POOL) == 2)
    leaver.cancel()
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    await api.leases.release(held.token)
    assert slot_name(await stayer) == "p-worker-0"


async def test_a_request_that_is_cancelled_while_its_worker_starts_leaves_no_lease(world):
    await world.pool()
    world.runtime.may_start.clear()
    api = world.replicas[0]
    caller = asyncio.create_task(api.allocate())
    await world.until(world.held)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    await world.until(lambda: not any(w.lease.ended_at is None for w in world.held()))
    world.runtime.may_start.set()
    await world.until(lambda: not world.held())


@pytest.mark.parametrize("steps", range(12))
async def test_a_request_that_is_cancelled_at_any_step_leaves_no_lease(world, steps):
    await world.pool()
    caller = asyncio.create_task(world.replicas[0].allocate(job_id="j"))
    for _ in range(steps):
        await asyncio.sleep(0)
    cut = caller.cancel()
    (result,) = await asyncio.gather(caller, return_exceptions=True)
    if cut:
        assert isinstance(result, asyncio.CancelledError)
    await world.replicas[0].allocator.close()
    await world.until(lambda: not world.held())
    assert not [w for w in (await world.workers()).values() if w.lease and not w.lease.ended_at]


async def test_a_claim_that_is_being_written_is_undone_before_the_service_closes(world, monkeypatch):
    await world.pool()
    begun, may_go_on = asyncio.Event(), asyncio.Event()
    create = world.store.create

    async def slow_create(worker):
        begun.set()
        await may_go_on.wait()
        return await create(worker)

    monkeypatch.setattr(world.store, "create", slow_create)
    allocator = world.replicas[0].allocator
    caller = asyncio.create_task(world.replicas[0].allocate())
    await begun.wait()
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    closing = asyncio.create_task(allocator.close())
    await asyncio.sleep(0)
    assert not closing.done()
    may_go_on.set()
    await closing
    assert not [w for w in (await world.workers()).values() if w.lease and not w.lease.ended_at]


async def test_a_lease_that_has_just_been_given_up_does_not_keep_the_service_from_closing(world, monkeypatch):
    await world.pool()
    api = world.replicas[0]
    worker = (await api.allocate()).worker

    async def at_once(_worker):
        pass

    monkeypatch.setattr(api.leases, "abandon", at_once)
    abandoner = api.allocator._abandoner
    abandoner.abandon(worker)
    await asyncio.sleep(0)  # its task has ended, and the loop has not told anybody yet
    assert abandoner._ending
    await abandoner.close()
    assert not abandoner._ending


async def test_the_error_for_a_full_pool_names_the_pool_and_the_time(world):
    await world.pool(scaling={"max": 1})
    api = world.replicas[0]
    await api.allocate()
    with pytest.raises(NoCapacity, match="no worker of pool 'p' became free within 50ms"):
        await api.allocate(wait=0.05)
    assert api.allocator.waiting(POOL) == 0


@pytest.mark.parametrize("write", ["create", "replace"])
async def test_a_store_that_does_not_write_in_time_is_named_as_the_reason(world, monkeypatch, write):
    await world.pool()
    api = world.replicas[0]
    if write == "replace":
        await api.leases.release((await api.allocate()).token)
        await world.until(lambda: not world.held())
    writing, may_go_on, original = asyncio.Event(), asyncio.Event(), getattr(world.store, write)

    async def slow(worker):
        writing.set()
        await may_go_on.wait()
        return await original(worker)

    monkeypatch.setattr(world.store, write, slow)
    waiting = asyncio.create_task(api.allocate())
    await writing.wait()
    skip_real_time()
    with pytest.raises(
        Unavailable, match="pool 'p' has a free worker, but the store did not write the lease"
    ) as caught:
        await waiting
    assert "locked" in caught.value.hint
    monkeypatch.setattr(allocator, "_SLOW_STORE", HOUR)  # the next one ends long before that
    with pytest.raises(NoCapacity, match="became free within 1ms"):
        await api.allocate(wait=0.001)
    may_go_on.set()
    await api.allocator.close()
    await world.until(lambda: not world.held())


async def test_without_a_wait_a_caller_gets_a_worker_that_is_ready_or_at_once_an_error(world, monkeypatch):
    """Also if its claim takes some time. One that would have to be started or emptied is not ready."""
    monkeypatch.setattr(allocator, "_NOW", HOUR)  # nothing below waits for the end of it
    await world.pool(scaling={"min": 2, "max": 3}, auth=NO_LIMITS)
    api = world.replicas[0]
    await world.until(lambda: [w.status.phase for w in api.mirror.workers.values()] == [Phase.IDLE] * 2)
    world.runtime.may_start.clear()
    grants = [await api.allocate(wait=0), await api.allocate(wait=0)]
    assert {slot_name(grant) for grant in grants} == {"p-worker-0", "p-worker-1"}
    async with asyncio.timeout(WAIT):
        with pytest.raises(NoCapacity, match="no worker of pool 'p' is ready now"):
            await api.allocate(wait=0)
    await api.leases.release(grants[0].token)
    await world.until(lambda: len(world.held()) == 1)
    with pytest.raises(NoCapacity, match="no worker of pool 'p' is ready now"):
        await api.allocate(BOB, wait=0)  # the idle worker has the cache of ann
    assert slot_name(await api.allocate(ANN, wait=0)) == slot_name(grants[0])
    assert api.allocator.waiting(POOL) == 0
    world.runtime.may_start.set()


async def test_without_a_wait_nobody_overtakes_those_who_wait(world):
    await world.pool(scaling={"max": 1})
    api = world.replicas[0]
    grant = await api.allocate(ANN)
    waiting = asyncio.create_task(api.allocate(ANN, wait=60))
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    with pytest.raises(NoCapacity, match="is ready now"):
        await api.allocate(ANN, wait=0)
    await api.leases.release(grant.token)
    await waiting


async def test_a_worker_that_is_not_ready_in_time_is_released(world, monkeypatch):
    await world.pool()
    world.runtime.may_start.clear()
    api, waits = world.replicas[0], asyncio.Event()
    until_ready = api.allocator._workers.until_ready

    async def noted(worker):
        waits.set()
        return await until_ready(worker)

    monkeypatch.setattr(api.allocator._workers, "until_ready", noted)
    waiting = asyncio.create_task(api.allocate())
    await waits.wait()
    skip_real_time()
    with pytest.raises(NoCapacity, match="p-worker-0 of pool 'p' was not ready within 1m") as caught:
        await waiting
    assert caught.value.hint.startswith("Wait longer. `bkpool logs p-worker-0` shows")
    world.runtime.may_start.set()
    await world.until(lambda: not world.held())


async def test_a_caller_reads_why_their_worker_did_not_start_with_the_end_of_its_log(world):
    await world.pool()
    world.runtime.failure = "buildkitd ended with exit code 1"
    world.runtime.log_tail = "buildkitd: no space left on device"
    asking = asyncio.create_task(world.replicas[0].allocate())

    def push():
        world.clock.advance(seconds=2)
        return asking.done()

    await world.until(push)
    with pytest.raises(WorkerFailed, match=r"exit code 1\nThe end of its log:\nbuildkitd: no space left on device"):
        await asking


async def test_the_same_job_gets_the_same_lease(world):
    await world.pool()
    api = world.replicas[0]
    both = await asyncio.gather(api.allocate(job_id="j"), api.allocate(job_id="j"))
    assert both[0].token == both[1].token
    assert (await api.allocate(job_id="j")).token == both[0].token
    assert (await api.allocate(job_id="k")).token != both[0].token
    assert (await api.allocate(BOB, job_id="j")).token != both[0].token, "jobs are per identity"


async def test_the_same_job_at_two_replicas_at_once_gets_one_lease(two_replicas):
    world = two_replicas
    await world.pool()
    await world.until(lambda: POOL in world.replicas[1].mirror.pools)
    grants = await asyncio.gather(*(api.allocate(job_id="j") for api in world.replicas for _ in range(3)))
    assert len({grant.token for grant in grants}) == 1
    await world.until(lambda: len(world.held()) == 1)


async def test_a_repeated_request_gets_the_lease_of_the_first_one(world):
    await world.pool(scaling={"max": 1})
    api = world.replicas[0]
    held = await api.allocate()
    first, second = (asyncio.create_task(api.allocate(job_id="j")) for _ in range(2))
    await world.until(lambda: api.allocator.waiting(POOL) == 2)
    await api.leases.release(held.token)
    assert (await first).token == (await second).token


async def test_one_of_two_requests_of_a_job_may_be_cancelled(world):
    await world.pool()
    world.runtime.may_start.clear()
    api = world.replicas[0]
    first, second = (asyncio.create_task(api.allocate(job_id="j")) for _ in range(2))
    await world.until(world.held)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    world.runtime.may_start.set()
    grant = await second
    assert (await api.leases.lookup(grant.token)).key == grant.worker.key


async def test_an_invalid_request_is_refused_before_anything_is_leased(world):
    await world.pool(gateway={"maxTokenTTL": "2h"})
    api = world.replicas[0]
    with pytest.raises(InvalidInput, match=r"a lease of pool 'p' can run for .* up to 2h, not for 3h"):
        await api.allocate(ttl=timedelta(hours=3))
    with pytest.raises(InvalidInput, match="not for 0s"):
        await api.allocate(ttl=timedelta(0))
    with pytest.raises(InvalidInput) as caught:
        await api.allocate(csr_pem=b"junk")
    assert caught.value.field == "csr"
    await world.until(lambda: not world.held())


async def test_a_missing_pool_and_a_pool_that_is_deleted_while_a_request_waits(world):
    api = world.replicas[0]
    with pytest.raises(NotFound, match="no pool 'p'"):
        await api.allocate()
    await world.pool(scaling={"max": 1})
    await api.allocate()
    waiting = asyncio.create_task(api.allocate())
    await world.until(lambda: api.allocator.waiting(POOL) == 1)
    await world.store.delete(Pool, *POOL)
    with pytest.raises(NotFound, match="there is no pool"):
        await waiting
    await world.until(lambda: not world.runtime.daemons)


async def test_a_cancelled_repetition_does_not_end_the_lease_of_its_job(world, monkeypatch):
    await world.pool()
    api = world.replicas[0]
    grant = await api.allocate(job_id="j")
    world.runtime.may_start.clear()  # the worker dies and is slow to come back: who joins now has to wait
    world.runtime.die(grant.worker.slot)
    await world.until(lambda: world.held()[0].status.endpoint is None)

    looks = iter([None])
    find = api.allocator._jobs.find

    async def looked_too_early(job):
        return next(looks, await find(job))

    monkeypatch.setattr(api.allocator._jobs, "find", looked_too_early)
    late = asyncio.create_task(api.allocate(job_id="j"))
    await world.until(lambda: api.allocator._deliveries)
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    await api.allocator.close()
    assert (await api.leases.lookup(grant.token)).key == grant.worker.key


async def test_who_waits_for_the_lease_of_their_job_gets_a_new_one_when_it_is_released(world):
    await world.pool(scaling={"max": 2})
    api = world.replicas[0]
    grant = await api.allocate(job_id="j")
    world.runtime.may_start.clear()
    world.runtime.die(grant.worker.slot)
    await world.until(lambda: world.held()[0].status.endpoint is None)
    again = asyncio.create_task(api.allocate(job_id="j"))
    await world.until(lambda: api.allocator._deliveries)
    await api.leases.release(grant.token)
    world.runtime.may_start.set()
    assert (await again).token != grant.token


async def test_a_lease_without_a_token_is_completed_by_the_next_request_of_its_job(world):
    await world.pool(scaling={"max": 2})
    api = world.replicas[0]
    first = await api.allocate(job_id="j")
    worker = (await world.workers())["p-worker-0"]
    await world.store.replace(worker.with_lease(worker.held_lease.but(token_sha256="")))
    again = await api.allocate(job_id="j")
    assert again.token == first.token
    assert (await world.workers())["p-worker-0"].held_lease.token_sha256 == tokens.digest(first.token)
