"""Who waits for a worker is asked again before they get it: their right, and what today's pool says.

The attack: somebody waits, their access is taken away, and then a worker becomes free. They must get no lease.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest
import yaml

from bkpool.allocation import AllocationRequest
from bkpool.allocation.orders import Order
from bkpool.core.cache_owner import cache_owner_digest
from bkpool.core.errors import NotFound
from bkpool.core.names import Key
from bkpool.home.files import write_private
from bkpool.identity.static_tokens import FileTokenReader
from support.api import ALLOCATE, running_api
from support.world import ANN

ALICE, BOB = "alice-has-this-token", "bob-has-this-other-token"
POOL = Key("default", "p")
ONE = {"min": 1, "max": 1}


@pytest.fixture
async def api(tmp_path):
    async with running_api(tmp_path, reader=FileTokenReader()) as api:
        yield api


@pytest.fixture
async def auth(api, tmp_path):
    """The methods of pool p, which alice and bob have a token for."""
    write(tmp_path / "tokens.yaml", alice=ALICE, bob=BOB)
    auth = {"methods": [{"type": "token", "token": {"file": str(tmp_path / "tokens.yaml")}}]}
    await api.world.pool(auth=auth, scaling=ONE)
    return auth


def write(path, **entries):
    path.unlink(missing_ok=True)
    write_private(path, yaml.safe_dump(entries).encode())


@asynccontextmanager
async def waiting_alice(api, bearer=ALICE, **body):
    """Alice waits while the admin has the only worker, which is free after the block. Gives the future answer."""
    status, admins, _ = await api("POST", ALLOCATE, {"poolName": "p"})
    assert status == 200, admins
    asking = asyncio.create_task(api("POST", ALLOCATE, {"poolName": "p", "wait": "60s", **body}, bearer=bearer))
    await api.world.until(lambda: api.world.replicas[0].allocator.waiting(POOL) == 1)
    yield asking
    await api("POST", "/api/v1/workers/release", {"token": admins["token"]})


async def refused(asking, reason):
    status, answer, _ = await asking
    assert (status, answer["error"]["code"]) == (403, "Forbidden"), answer
    assert reason in answer["error"]["message"]


async def test_who_lost_their_token_while_they_waited_gets_no_lease(api, auth, tmp_path):
    async with waiting_alice(api) as asking:
        write(tmp_path / "tokens.yaml", bob=BOB)
        assert (await api("POST", "/api/v1/workers/revoke", {"identity": "alice"}))[0] in {200, 404}
    await refused(asking, "alice may not use pool default/p: the caller has no token of the pool any more")
    status, answer, _ = await api("POST", ALLOCATE, {"poolName": "p", "wait": "60s"}, bearer=BOB)
    assert status == 200, answer


async def test_who_no_rule_names_any_more_gets_no_lease(api, auth):
    async with waiting_alice(api) as asking:
        await api.world.change_spec(auth={**auth, "rbac": {"rules": [{"users": ["bob"]}]}}, scaling=ONE)
    await refused(asking, "no rule in spec.auth.rbac.rules of the pool names this caller")


async def test_who_may_still_use_the_pool_gets_a_lease_by_what_it_says_today(api, auth):
    async with waiting_alice(api) as asking:
        await api.world.change_spec(auth=auth, scaling=ONE, cache={"reuse": "never"}, gateway={"tokenTTL": "7m"})
    status, answer, _ = await asking
    assert status == 200, answer
    (worker,) = api.world.held()
    lease, pool = worker.held_lease, api.world.replicas[0].mirror.pools[POOL]
    assert lease.owner == cache_owner_digest(pool.spec.reuse, lease.tenant, pool.uid, lease.id)
    assert (lease.expires_at - lease.allocated_at).total_seconds() == 7 * 60


@pytest.mark.parametrize(("whose", "most"), [("identity", 1), ("pool", 1)])
async def test_who_has_as_many_leases_as_the_pool_allows_today_gets_no_other(api, auth, whose, most):
    """The limit is lowered while they wait."""
    two = {"min": 2, "max": 2}
    limits = {"identity": {"leases": 2}}
    await api.world.change_spec(auth={**auth, "limits": limits}, scaling=two)
    status, first, _ = await api("POST", ALLOCATE, {"poolName": "p", "wait": "60s"}, bearer=ALICE)
    assert status == 200, first
    async with waiting_alice(api) as asking:
        await api.world.change_spec(auth={**auth, "limits": {**limits, whose: {"leases": most}}}, scaling=two)
    status, answer, _ = await asking
    assert (status, answer["error"]["code"]) == (429, "LimitReached"), answer
    assert answer["error"]["field"] == f"spec.auth.limits.{whose}.leases"


async def test_a_ttl_that_is_too_long_by_now_is_refused(api, auth):
    async with waiting_alice(api, ttl="50m") as asking:
        await api.world.change_spec(auth=auth, scaling=ONE, gateway={"tokenTTL": "5m", "maxTokenTTL": "10m"})
    status, answer, _ = await asking
    assert (status, answer["error"].get("field")) == (400, "ttl"), answer


async def test_a_pool_made_again_under_the_same_name_is_another_one(api, auth):
    pool = api.world.replicas[0].mirror.pools[POOL]
    order = Order(ANN, pool, timedelta(minutes=1), AllocationRequest(POOL, timedelta(minutes=1)), None)
    await order.decide_again(pool)
    with pytest.raises(NotFound, match="deleted and made again"):
        await order.decide_again(pool.but(metadata=pool.metadata.but(uid="another")))


async def test_a_worker_that_is_free_at_once_asks_nothing_more(api, auth, monkeypatch):
    async def never(*_args):
        raise AssertionError

    monkeypatch.setattr("bkpool.allocation.orders.Order.decide_again", never)
    assert (await api("POST", ALLOCATE, {"poolName": "p"}, bearer=ALICE))[0] == 200
