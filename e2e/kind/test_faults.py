"""The store and the mirror behind an API server that misbehaves: nothing is lost or doubled, and all recovers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
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
from bkpool.kube import ClusterAccess, KubeApi, watching
from bkpool.kube import client as kube_client
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

P = Key("default", "p")

# The proxy cuts connections at any moment; one that aiohttp was just making complains when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def proxy(cluster: Cluster, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(cluster.kubeconfig, tmp_path) as running:
        yield running


@pytest.fixture
async def behind(proxy: FaultProxy) -> AsyncIterator[KubernetesStore]:
    """The store as it looks through the proxy; `store` looks past it."""
    api = await KubeApi.connect(ClusterAccess(proxy.kubeconfig))
    yield KubernetesStore(api)
    await api.close()


@pytest.fixture
async def mirror(store: KubernetesStore, behind: KubernetesStore) -> AsyncIterator[Mirror]:
    mirror = Mirror(behind)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(10):
        await mirror.ready.wait()
    yield mirror
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> None:
    """Waits for what lies beyond the loop: a thread's switch, another process."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - the condition is another thread's
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


async def test_while_the_server_is_down_the_copy_says_so_and_then_it_knows_what_happened(store, proxy, mirror):
    await store.create(a_pool("doomed"))
    pool = await store.create(a_pool())
    await eventually(lambda: len(mirror.pools) == 2, "both pools are known")
    assert mirror.trouble is None

    proxy.down()
    await eventually(lambda: mirror.trouble, "it knows that it is cut off")
    assert "API server" in mirror.trouble
    pool = await store.replace(scaled(pool, 3))
    await store.delete(Pool, "default", "doomed")
    await store.create(a_pool("born"))
    assert len(mirror.pools) == 2, "it shows what it last knew"

    proxy.up()
    await eventually(lambda: mirror.trouble is None, "it follows again")
    assert {key.name for key in mirror.pools} == {"p", "born"}
    assert mirror.pools[P] == pool


async def test_writing_while_the_server_is_down_says_what_to_look_at(store, proxy, behind):
    pool = await store.create(a_pool())
    proxy.down()

    for attempt in (behind.get(Pool, *P), behind.replace(pool), behind.create(a_pool("q")), behind.list(Pool)):
        with pytest.raises(Unavailable, match="the API server does not answer") as body:
            await attempt
        assert "kubectl" in body.value.hint


async def test_lost_history_is_listed_again(store, proxy, mirror):
    await eventually(lambda: proxy.watches == 2, "pools and workers are watched")
    proxy.expire_watches()
    pool = await store.create(a_pool())

    await eventually(lambda: P in mirror.pools, "the pool is known")
    await eventually(lambda: proxy.watches == 2 and mirror.trouble is None, "it follows again")
    assert mirror.pools[P] == pool


async def test_a_watch_whose_history_is_lost_is_gone(store, proxy, behind):
    since = (await behind.list(Pool)).resource_version
    proxy._expiring = 1
    with pytest.raises(Gone):
        await seen(behind, Pool, since, lambda e: True)


async def test_a_frozen_watch_is_noticed_and_begun_again(store, proxy, behind, monkeypatch):
    monkeypatch.setattr(kube_client, "SILENCE_TIMEOUT", 0.3)
    proxy.frozen = True
    mirror = Mirror(behind)
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(10):
        await mirror.ready.wait()

    pool = await store.create(a_pool())

    await eventually(lambda: P in mirror.pools, "it has listed again, though no watch says anything")
    assert mirror.pools[P] == pool
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_watch_that_the_server_ends_in_good_order_goes_on_where_it_was(store, proxy, behind, monkeypatch):
    monkeypatch.setattr(watching, "WATCH_SECONDS", 1)
    pool = await store.create(a_pool())
    since = pool.metadata.resource_version
    task = asyncio.create_task(seen(behind, Pool, since, lambda e: e.object.spec.scaling.max == 4))
    await eventually(lambda: proxy.watches == 1, "the watch is open")
    pool = await store.replace(scaled(pool, 3))
    await eventually(lambda: sum("watch=true" in line for line in proxy.seen) > 1, "it has been opened again")
    await store.replace(scaled(pool, 4))

    assert [e.object.spec.scaling.max for e in await task] == [3, 4]
    assert not any("limit=" in line for line in proxy.seen), "without listing"


async def test_of_claims_that_meet_exactly_one_holds_however_slow_the_server(store, proxy, behind):
    pool = await store.create(a_pool())
    proxy.slow = 0.3

    outcomes = await asyncio.gather(*(behind.replace(scaled(pool, n)) for n in range(20, 40)), return_exceptions=True)

    won = [outcome for outcome in outcomes if isinstance(outcome, Pool)]
    assert len(won) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 19
    assert await store.get(Pool, *P) == won[0]


async def test_a_busy_server_is_asked_again_but_not_for_ever(store, proxy, behind, monkeypatch):
    monkeypatch.setattr(kube_client, "_LONGEST_PAUSE", 0.05)
    pool = await store.create(a_pool())
    proxy.refuse(429, times=1, path="/buildkitpools")
    pool = await behind.replace(scaled(pool, 3))
    assert pool.spec.scaling.max == 3

    proxy.refuse(429, times=100, path="/buildkitpools")
    with pytest.raises(Unavailable, match="429"):
        await behind.replace(scaled(pool, 4))
    proxy.stop_refusing()
    assert (await behind.replace(scaled(pool, 4))).spec.scaling.max == 4


async def test_a_server_that_has_just_come_back_and_knows_nothing_yet_is_waited_for(store, proxy, mirror):
    await eventually(lambda: proxy.watches == 2, "pools and workers are watched")
    for status in (403, 404, 401):
        proxy.refuse(status, path="/buildkitpools")
    proxy.expire_watches()
    await eventually(lambda: mirror.trouble, "it knows that it is cut off")
    await store.create(a_pool())

    await eventually(lambda: P in mirror.pools and mirror.trouble is None, "it follows again")
    assert not any(rule.times for rule in proxy._rules), "it was refused each time"


async def test_a_write_whose_answer_is_lost_is_seen_to_have_happened(store, proxy, behind):
    pool = await store.create(a_pool())
    ready = pool.but(status=PoolStatus(phase="Ready"))

    for write, wanted, of_it in (
        (behind.replace, scaled(pool, 3), lambda p: p.spec.scaling.max == 3),
        (behind.replace_status, ready, lambda p: p.status.phase == "Ready"),
    ):
        current = await store.get(Pool, *P)
        proxy.lose(method="PUT")
        written = await write(wanted.but(metadata=current.metadata))
        assert of_it(written)
        assert written == await store.get(Pool, *P)
    proxy.lose(method="POST")
    born = await behind.create(a_pool("born"))
    assert born == await store.get(Pool, "default", "born")
    assert (await store.list(Worker)).items == ()
