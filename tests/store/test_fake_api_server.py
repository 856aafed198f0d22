"""The store of a cluster against the fake API server: the contract, which e2e/kind asks of a real server too.

So what other tests and the benchmark see of the fake server is what a real one does, as far as the contract says it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from store.test_contract import *  # noqa: F403 - the contract, with the fixture `store` of this module
from store.test_contract import a_pool, scaled, seen

from bkpool.core.errors import Conflict, Forbidden, Gone, InvalidInput, NotFound
from bkpool.core.names import LABEL_POOL, Slot
from bkpool.core.pool import Pool, PoolStatus
from bkpool.core.worker import Worker, new_worker
from bkpool.install import crds
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.kube.reflector import KubeCollection, Reflector
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror
from support.fake_api_server import Asked, FakeApiServer, fake_api_server
from support.fake_kinds import Refused
from support.forgotten_writers import expect_writers_are_forgotten
from support.world import WAIT


@pytest.fixture
async def server() -> AsyncIterator[FakeApiServer]:
    async with fake_api_server(namespaces=("default", "other")) as running:
        yield running


@pytest.fixture
async def api(server, tmp_path) -> AsyncIterator[KubeApi]:
    connected = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
    yield connected
    await connected.close()


@pytest.fixture
def store(api) -> KubernetesStore:
    return KubernetesStore(api)


async def events_of(api: KubeApi, path: str, since: str, count: int, **params: str) -> list:
    async with asyncio.timeout(WAIT), aclosing(api.watch(path, since, **params)) as watch:
        return [event async for event, _ in _numbered(watch, count)]


async def _numbered(watch, count: int):
    for number in range(count):
        yield await anext(watch), number


# --- objects --------------------------------------------------------------------------------------------------------


async def test_a_list_in_pages_is_of_one_moment(api, store):
    made = [await store.create(a_pool(f"p-{number}")) for number in range(5)]
    first = await api.get(paths.custom(Pool.PLURAL), limit="2")
    await store.create(a_pool("p-later"))
    second = await api.get(paths.custom(Pool.PLURAL), limit="2", **{"continue": first["metadata"]["continue"]})
    third = await api.get(paths.custom(Pool.PLURAL), limit="2", **{"continue": second["metadata"]["continue"]})

    names = [item["metadata"]["name"] for page in (first, second, third) for item in page["items"]]
    assert names == [pool.key.name for pool in made]
    assert {page["metadata"]["resourceVersion"] for page in (first, second, third)} == {
        first["metadata"]["resourceVersion"]
    }
    assert "continue" not in third["metadata"]


async def test_an_update_of_a_custom_resource_must_name_its_version(api, store):
    made = await store.create(a_pool())
    doc = made.to_json()
    del doc["metadata"]["resourceVersion"]
    with pytest.raises(InvalidInput):
        await api.replace(paths.custom(Pool.PLURAL, *made.key), doc)


async def test_a_pod_with_a_node_stays_until_its_node_removes_it(api, server):
    pod = {"metadata": {"name": "x"}, "spec": {"terminationGracePeriodSeconds": 5}}
    await api.create(paths.core("pods", "default"), pod)
    await api.patch(paths.core("pods", "default", "x"), {"spec": {"nodeName": "n"}})

    await api.delete(paths.core("pods", "default", "x"))
    ending = await api.get(paths.core("pods", "default", "x"))
    assert ending["metadata"]["deletionGracePeriodSeconds"] == 5
    server.objects.removed_by_node("default", "x")
    with pytest.raises(NotFound):
        await api.get(paths.core("pods", "default", "x"))

    await api.create(paths.core("pods", "default"), pod)
    await api.delete(paths.core("pods", "default", "x"))
    with pytest.raises(NotFound):
        await api.get(paths.core("pods", "default", "x"))


async def test_patches_of_three_kinds(api):
    path = paths.core("configmaps", "default", "c")
    made = await api.apply(
        path, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "1"}}
    )
    assert made["data"] == {"a": "1"}
    assert (await api.patch(path, {"data": {"b": "2"}}))["data"] == {"a": "1", "b": "2"}
    assert (await api.patch(path, [{"op": "replace", "path": "/data/b", "value": "3"}]))["data"]["b"] == "3"
    again = await api.apply(
        path, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"c": "4"}}
    )
    assert again["data"] == {"b": "3", "c": "4"}, "what the manager applied before and does not apply now goes away"
    with pytest.raises(InvalidInput):
        await api.patch(path, [{"op": "test", "path": "/data/b", "value": "9"}])


async def test_definitions_are_established_at_once(api):
    await crds.install(api)
    await crds.install(api)


async def test_a_dry_run_changes_nothing(api):
    await api.create(paths.core("configmaps", "default"), {"metadata": {"name": "c"}}, dryRun="All")
    with pytest.raises(NotFound):
        await api.get(paths.core("configmaps", "default", "c"))


async def test_an_answer_is_as_long_as_a_real_one(api, store):
    made = await store.create(a_pool(labels={"team": "a"}).but(status=PoolStatus(phase="Ready")))
    doc = json.loads(await api.text(paths.custom(Pool.PLURAL, *made.key)))  # as it is sent
    parts = {entry.get("subresource", ""): entry["fieldsV1"] for entry in doc["metadata"]["managedFields"]}
    assert parts[""]["f:metadata"]["f:labels"] == {".": {}, "f:team": {}}
    assert "f:phase" in parts["status"]["f:status"]


async def test_the_server_forgets_who_wrote_a_worker_and_keeps_it_of_a_pool(api, store):
    await expect_writers_are_forgotten(api, store)


# --- selectors and watches ------------------------------------------------------------------------------------------


async def test_a_watch_with_a_selector_sees_what_comes_and_goes_by_its_labels(api, store):
    pool = await store.create(a_pool())
    since = (await store.list(Worker)).resource_version
    mine = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    path = paths.custom(Worker.PLURAL, "default")
    await api.patch(paths.custom(Worker.PLURAL, *mine.key), {"metadata": {"labels": {LABEL_POOL: "q"}}})
    await api.patch(paths.custom(Worker.PLURAL, *mine.key), {"metadata": {"labels": {LABEL_POOL: "p"}}})

    events = await events_of(api, path, since, 3, labelSelector=f"{LABEL_POOL}=p")

    assert [event["type"] for event in events] == ["ADDED", "DELETED", "ADDED"]
    assert [len(items) for items, _ in [await api.list(path, labelSelector=f"{LABEL_POOL} in (p, x)")]] == [1]
    assert (await api.list(path, labelSelector=f"!{LABEL_POOL}"))[0] == []
    assert (await api.list(path, labelSelector=f"{LABEL_POOL}!=p"))[0] == []


async def test_a_field_selector_knows_the_name_and_refuses_what_has_no_index(api, store):
    await store.create(a_pool("a"))
    await store.create(a_pool("b"))
    found, _ = await api.list(paths.custom(Pool.PLURAL, "default"), fieldSelector="metadata.name=b")
    assert [doc["metadata"]["name"] for doc in found] == ["b"]
    with pytest.raises(InvalidInput, match="not supported"):
        await api.list(paths.custom(Pool.PLURAL, "default"), fieldSelector="spec.scaling.max=3")


async def test_a_watch_that_asks_for_forgotten_history_is_told_so(api, server, store):
    since = (await store.list(Pool)).resource_version
    await store.create(a_pool())
    server.expire_watches()
    with pytest.raises(Gone):
        await seen(store, Pool, since, lambda event: True)


async def test_bookmarks_carry_the_version_forward(tmp_path):
    async with fake_api_server(bookmark_interval=0) as server:
        api = await KubeApi.connect(ClusterAccess(server.write_kubeconfig(tmp_path / "kubeconfig")))
        await api.create(paths.core("configmaps", "default"), {"metadata": {"name": "c"}})
        [bookmark] = await events_of(api, paths.custom(Pool.PLURAL), "1", 1)
        await api.close()
    assert bookmark["type"] == "BOOKMARK"
    assert int(bookmark["object"]["metadata"]["resourceVersion"]) == server.objects.version


async def test_a_mirror_survives_broken_and_expired_watches(server, store):
    mirror = Mirror(store)
    running = asyncio.create_task(mirror.run())
    made = await store.create(a_pool())
    await server.until(lambda: made.key in mirror.pools)

    server.break_watches()
    changed = await store.replace(scaled(made, 3))
    await server.until(lambda: mirror.pools[made.key] == changed)
    lists = server.total("list", Pool.PLURAL)
    server.expire_watches()
    last = await store.replace(scaled(changed, 4))
    await server.until(lambda: mirror.pools[made.key] == last)
    assert server.total("list", Pool.PLURAL) > lists

    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_frozen_watches_get_later_what_they_missed(api, server):
    follower = Reflector(api, KubeCollection("v1", "configmaps"))
    running = asyncio.create_task(follower.run())
    await server.until(lambda: server.watches)
    server.freeze_watches()
    made = await api.create(paths.core("configmaps", "default"), {"metadata": {"name": "c"}})
    assert follower.get(paths.key_of(made)) is None
    server.go_on()
    await server.until(lambda: follower.get(paths.key_of(made)) == made)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# --- hooks and counts -----------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_user_verb_and_resource(api, server, store):
    made = await store.create(a_pool())
    await store.replace_status(made.but(status=PoolStatus(phase="Ready")))
    await store.list(Pool, labels={"a": "b"})

    assert server.counts == {
        ("bkpool", "create", "buildkitpools"): 1,
        ("bkpool", "update", "buildkitpools/status"): 1,
        ("bkpool", "list", "buildkitpools"): 1,
    }
    assert server.asked[-1].params == {"labelSelector": "a=b", "limit": "250"}


async def test_bytes_and_objects_of_watches_are_counted(server, store):
    since = (await store.list(Pool)).resource_version
    await store.create(a_pool())
    await store.create(a_pool("q"))
    await seen(store, Pool, since, lambda event: event.object.key.name == "q")
    assert server.watch_events["bkpool", "buildkitpools"] == 2
    assert server.watch_bytes["bkpool", "buildkitpools"] > 1000


LACKS = 'buildkitpools.buildkit.smrt-devops.net is forbidden: User "bkpool" cannot {verb} resource "buildkitpools"'
QUOTA = "exceeded quota: few, requested: count/buildkitpools=1"


@pytest.mark.parametrize(
    ("reason", "message", "hint"),
    [
        (
            LACKS,
            "bkpool itself may not {verb} buildkitpools in namespace 'default'",
            "`bkpool manifests --pool-namespace default` prints",
        ),
        (
            QUOTA,
            "the cluster refuses a BuildKitPool in namespace 'default': Kubernetes: .*: exceeded quota",
            "cluster",
        ),
    ],
)
async def test_what_the_cluster_refuses_bkpool_is_no_right_of_the_caller(server, store, reason, message, hint):
    made = await store.create(a_pool())
    calls = {
        "get": lambda: store.get(Pool, *made.key),
        "list": lambda: store.list(Pool, namespace=made.key.namespace),
        "create": lambda: store.create(a_pool("q")),
        "update": lambda: store.replace(made),
        "delete": lambda: store.delete(Pool, *made.key),
    }

    async def refuse(asked: Asked) -> None:
        raise Refused(403, "Forbidden", reason.format(verb=asked.verb))

    server.before = refuse
    for verb, call in calls.items():
        with pytest.raises(Forbidden, match=message.format(verb=verb)) as caught:
            await call()
        assert hint in caught.value.hint
        assert (caught.value.status, caught.value.exit_code) == (503, 69)


async def test_a_hook_can_refuse_a_request_and_lose_an_answer(server, store):
    async def refuse(asked: Asked) -> None:
        if asked.verb == "create":
            raise Refused(403, "Forbidden", "pools are forbidden")

    server.before = refuse
    with pytest.raises(Forbidden):
        await store.create(a_pool())

    async def lose(asked: Asked) -> None:
        if asked.verb == "create":
            raise Refused(504, "Timeout", "the answer is lost")

    server.before, server.after = _nothing, lose
    made = await store.create(a_pool())
    assert made.uid, "the write was done, and the store has found that out"
    server.after = _nothing
    with pytest.raises(Conflict):
        await store.create(a_pool())


async def _nothing(_: Asked) -> None:
    pass


async def test_late_events_come_in_order(server, store):
    may_send = asyncio.Event()

    async def wait(_: Asked) -> None:
        await may_send.wait()

    server.before_events = wait
    since = (await store.list(Pool)).resource_version
    watching = asyncio.create_task(seen(store, Pool, since, lambda event: event.object.spec.scaling.max == 4))
    made = await store.create(a_pool())
    await store.replace(scaled(await store.replace(scaled(made, 3)), 4))
    await server.until(lambda: server.watches)
    assert not watching.done()
    may_send.set()
    assert [event.object.spec.scaling.max for event in await watching] == [10, 3, 4]


async def test_kept_objects_can_be_restored_with_their_versions_and_owners(server, store, tmp_path):
    pool = await store.create(a_pool())
    worker = await store.create(new_worker(Slot("default", "p", 0), pool, None, {}))
    async with fake_api_server(namespaces=()) as again:
        again.objects.restore(server.objects.documents())
        api = await KubeApi.connect(ClusterAccess(again.write_kubeconfig(tmp_path / "again")))
        restored = KubernetesStore(api)
        listing = await restored.list(Worker)
        assert listing.items == (worker,)
        await restored.delete(Pool, *pool.key)
        await seen(restored, Worker, listing.resource_version, lambda event: event.type == "DELETED")
        await api.close()
