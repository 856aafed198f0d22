"""The store and the mirror with a failing API server: nothing is lost or doubled, and both recover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kind.faults import FaultProxy
from store.test_contract import a_pool, scaled, seen

from bkpool.core.errors import Conflict, Gone, Unavailable
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.worker import Worker
from bkpool.kind.lifecycle import Cluster
from bkpool.kube import ClusterAccess, KubeApi
from bkpool.kube import client as kube_client
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

P = Key("default", "p")

# The proxy cuts connections at any moment. aiohttp warns about one that it was just opening when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def proxy(cluster: Cluster, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(cluster.kubeconfig, tmp_path) as running:
        yield running


@pytest.fixture
async def proxied_api(proxy: FaultProxy) -> AsyncIterator[KubeApi]:
    api = await KubeApi.connect(ClusterAccess(proxy.kubeconfig))
    yield api
    await api.close()


@pytest.fixture
def proxied_store(proxied_api: KubeApi) -> KubernetesStore:
    """The store that uses the proxy. The fixture `store` does not use it."""
    return KubernetesStore(proxied_api)


@pytest.fixture
async def mirror(store: KubernetesStore, proxied_store: KubernetesStore) -> AsyncIterator[Mirror]:
    mirror = Mirror(proxied_store)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(60):
        await mirror.ready.wait()
    yield mirror
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Waits for a condition that another thread or process makes true."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - another thread makes it true
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


async def test_the_mirror_reports_that_the_server_is_down_and_then_has_the_changes(store, proxy, mirror):
    await store.create(a_pool("doomed"))
    pool = await store.create(a_pool())
    await eventually(lambda: len(mirror.pools) == 2, "both pools are known")
    assert mirror.trouble is None

    proxy.down()
    await eventually(lambda: mirror.trouble, "the mirror reports the outage")
    assert "API server" in mirror.trouble
    pool = await store.replace(scaled(pool, 3))
    await store.delete(Pool, "default", "doomed")
    await store.create(a_pool("born"))
    assert len(mirror.pools) == 2, "the mirror keeps its last state"

    proxy.up()
    await eventually(lambda: mirror.trouble is None, "the mirror follows the server again")
    assert {key.name for key in mirror.pools} == {"p", "born"}
    assert mirror.pools[P] == pool


async def test_the_error_of_a_write_while_the_server_is_down_says_what_to_check(store, proxy, proxied_store):
    pool = await store.create(a_pool())
    proxy.down()

    for attempt in (
        proxied_store.get(Pool, *P),
        proxied_store.replace(pool),
        proxied_store.create(a_pool("q")),
        proxied_store.list(Pool),
    ):
        with pytest.raises(Unavailable, match="the API server does not answer") as body:
            await attempt
        assert "kubectl" in body.value.hint


async def test_after_lost_history_the_mirror_lists_again(store, proxy, mirror):
    await eventually(lambda: proxy.watches == 2, "pools and workers are watched")
    proxy.expire_watches()
    pool = await store.create(a_pool())

    await eventually(lambda: P in mirror.pools, "the pool is known")
    await eventually(lambda: proxy.watches == 2 and mirror.trouble is None, "the mirror follows the server again")
    assert mirror.pools[P] == pool


async def test_a_watch_whose_history_is_lost_raises_gone(store, proxy, proxied_store):
    since = (await proxied_store.list(Pool)).resource_version
    proxy._expiring = 1
    with pytest.raises(Gone):
        await seen(proxied_store, Pool, since, lambda e: True)


async def test_a_frozen_watch_is_detected_and_replaced(store, proxy, proxied_store, proxied_api):
    proxied_api.limits = replace(proxied_api.limits, watch_silence=0.3)
    proxy.frozen = True
    mirror = Mirror(proxied_store)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(60):
        await mirror.ready.wait()

    pool = await store.create(a_pool())

    await eventually(lambda: P in mirror.pools, "the mirror has listed again, although no watch sends anything")
    assert mirror.pools[P] == pool
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_that_the_server_ends_continues_at_the_same_version(store, proxy, proxied_store, proxied_api):
    proxied_api.limits = replace(proxied_api.limits, watch_duration=1)
    pool = await store.create(a_pool())
    since = pool.metadata.resource_version
    task = asyncio.create_task(seen(proxied_store, Pool, since, lambda e: e.object.spec.scaling.max == 4))
    await eventually(lambda: proxy.watches == 1, "the watch is open")
    pool = await store.replace(scaled(pool, 3))
    await eventually(lambda: sum("watch=true" in line for line in proxy.seen) > 1, "the watch has been opened again")
    await store.replace(scaled(pool, 4))

    assert [e.object.spec.scaling.max for e in await task] == [3, 4]
    assert not any("limit=" in line for line in proxy.seen), "it has not listed again"


async def test_exactly_one_of_several_simultaneous_claims_succeeds(store, proxy, proxied_store):
    pool = await store.create(a_pool())
    proxy.slow = 0.3

    outcomes = await asyncio.gather(
        *(proxied_store.replace(scaled(pool, n)) for n in range(20, 40)), return_exceptions=True
    )

    won = [outcome for outcome in outcomes if isinstance(outcome, Pool)]
    assert len(won) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19
    assert await store.get(Pool, *P) == won[0]


async def test_requests_to_a_busy_server_are_retried_a_limited_number_of_times(
    store, proxy, proxied_store, monkeypatch
):
    monkeypatch.setattr(kube_client, "_LONGEST_PAUSE", 0.05)
    pool = await store.create(a_pool())
    proxy.refuse(429, times=1, path="/buildkitpools")
    pool = await proxied_store.replace(scaled(pool, 3))
    assert pool.spec.scaling.max == 3

    proxy.refuse(429, times=100, path="/buildkitpools")
    with pytest.raises(Unavailable, match="429"):
        await proxied_store.replace(scaled(pool, 4))
    proxy.stop_refusing()
    assert (await proxied_store.replace(scaled(pool, 4))).spec.scaling.max == 4


async def test_the_mirror_retries_while_a_restarted_server_is_not_ready(store, proxy, mirror):
    await eventually(lambda: proxy.watches == 2, "pools and workers are watched")
    for status in (403, 404, 401):
        proxy.refuse(status, path="/buildkitpools")
    proxy.expire_watches()
    await eventually(lambda: mirror.trouble, "the mirror reports the outage")
    await store.create(a_pool())

    await eventually(lambda: P in mirror.pools and mirror.trouble is None, "the mirror follows the server again")
    assert not any(rule.times for rule in proxy._rules), "the server has refused each time"


async def test_a_write_whose_answer_is_lost_is_found_to_be_done(store, proxy, proxied_store):
    pool = await store.create(a_pool())
    ready = pool.but(status=PoolStatus(phase="Ready"))

    for write, wanted, of_it in (
        (proxied_store.replace, scaled(pool, 3), lambda p: p.spec.scaling.max == 3),
        (proxied_store.replace_status, ready, lambda p: p.status.phase == "Ready"),
    ):
        current = await store.get(Pool, *P)
        proxy.lose(method="PUT")
        written = await write(wanted.but(metadata=current.metadata))
        assert of_it(written)
        assert written == await store.get(Pool, *P)
    proxy.lose(method="POST")
    born = await proxied_store.create(a_pool("born"))
    assert born == await store.get(Pool, "default", "born")
    assert (await store.list(Worker)).items == ()
