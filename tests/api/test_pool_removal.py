"""A pool is deleted over the API: its leases go on, its access ends, and it is gone when nothing of it is left."""

from __future__ import annotations

import asyncio

import pytest

from bkpool.core.errors import Gone, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool
from bkpool.core.removal import CACHES_KEPT
from bkpool.identity import Identity
from support.api import ALLOCATE, running_api, status_and_code
from support.world import POOL

DELETE = "/api/v1/pools/delete"
ANN = "t" * 20


@pytest.fixture
async def api(tmp_path):
    async with running_api(tmp_path) as api:
        api.authenticator.known[ANN] = (Identity("ann", source="stub"),)
        yield api


async def gone(api) -> bool:
    try:
        await api.world.store.get(Pool, *POOL)
    except NotFound:
        return True
    return False


async def test_a_deleted_pool_drains_and_refuses_and_its_caches_and_itself_go_a_day_after_the_last_lease(api):
    await api.world.pool(scaling={"min": 1, "max": 3})
    held = (await api("POST", ALLOCATE, {"poolName": "p", "jobId": "1"}, bearer=ANN))[1]
    mirror, runtime = api.world.replicas[0].mirror, api.world.runtime

    status, answer, _ = await api("POST", DELETE, {"poolName": "p"})
    assert (status, answer["status"], answer["leases"]) == (200, "removing", 1)
    assert "1 lease goes on" in answer["message"]

    await api.world.until(lambda: len(mirror.workers) == 1 and mirror.pools[POOL].status.phase == "Removing")
    assert (await api("POST", "/api/v1/workers/lookup", {"token": held["token"]}))[0] == 200, "the lease goes on"
    for bearer, refused in ((ANN, (403, "Forbidden")), ("a" * 43, (410, "PoolRemoved"))):
        answer = await api("POST", ALLOCATE, {"poolName": "p"}, bearer=bearer)
        assert status_and_code(answer) == refused
        assert "is being removed" in answer[1]["error"]["message"]
    renewed = await api("POST", "/api/v1/workers/renew", {"token": held["token"]}, bearer=None)
    assert status_and_code(renewed) == (403, "NotRenewable")
    assert (await api("GET", "/api/v1/pools/p", bearer=ANN))[0] == 403, "its access is gone"
    assert (await api("GET", "/api/v1/pools/p"))[1]["phase"] == "Removing"

    api.world.clock.advance(minutes=5)
    await api("POST", "/api/v1/workers/release", {"token": held["token"]}, bearer=None)
    await api.world.until(lambda: not mirror.workers)
    ended = api.world.clock.now
    await api.world.until(lambda: mirror.pools[POOL].status.last_lease_at == ended)
    assert len(runtime.cache_owners) == 1, "the cache that somebody has used"
    api.world.clock.advance(seconds=CACHES_KEPT.total_seconds() - 1)
    assert not runtime.wiped[1:]
    api.world.clock.advance(seconds=2)
    await api.world.until(lambda: POOL not in mirror.pools)
    assert await gone(api)


async def test_with_now_leases_are_revoked_and_nothing_is_kept(api):
    await api.world.pool(scaling={"max": 3})
    held = (await api("POST", ALLOCATE, {"poolName": "p"}, bearer=ANN))[1]
    answer = await api("POST", DELETE, {"poolName": "p", "now": True})
    assert (answer[0], answer[1]["leases"]) == (200, 0)
    mirror = api.world.replicas[0].mirror
    await api.world.until(lambda: POOL not in mirror.pools)
    assert await gone(api)
    assert status_and_code(await api("POST", "/api/v1/workers/lookup", {"token": held["token"]}))[0] in {404, 410}


async def test_only_the_admin_may_delete_a_pool(api):
    await api.world.pool()
    assert status_and_code(await api("POST", DELETE, {"poolName": "p"}, bearer=ANN)) == (403, "Forbidden")
    assert (await api("POST", DELETE, {"poolName": "p"}, bearer=None))[0] == 401
    assert status_and_code(await api("POST", DELETE, {"poolName": "other"})) == (404, "NotFound")
    assert status_and_code(await api("POST", DELETE, {"poolName": "p", "nwo": True}))[0] == 400
    assert api.world.replicas[0].mirror.pools[Key("default", "p")].status.phase != "Removing"


async def test_where_pools_are_custom_resources_the_answer_says_how(tmp_path):
    async with running_api(tmp_path, only_files=False) as api:
        await api.world.pool()
        answer = await api("POST", DELETE, {"poolName": "p"})
        assert status_and_code(answer) == (409, "CustomResource")
        assert "kubectl -n default delete buildkitpool p" in answer[1]["error"]["hint"]


async def test_requests_that_wait_are_told_when_their_pool_is_deleted(api):
    await api.world.pool(scaling={"max": 1})
    await api("POST", ALLOCATE, {"poolName": "p"})
    task = asyncio.create_task(api.world.replicas[0].allocate(wait=30))
    await api.world.until(lambda: api.world.replicas[0].allocator.waiting(POOL) == 1)
    await api("POST", DELETE, {"poolName": "p"})
    with pytest.raises(Gone, match="is being removed"):
        async with asyncio.timeout(60):
            await task
