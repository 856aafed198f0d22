"""What a store in a cluster asks the API server for, and that nothing outside of its bounds exists for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import BkpoolError, Forbidden, Gone, InvalidInput, NotFound, Unavailable
from bkpool.core.names import LABEL_POOL, LABEL_REQUEST, Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.kube import Doc, KubeLimits
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.lease_search import LeaseSearch
from bkpool.store.mirror import Mirror
from bkpool.store.troubles import ISSUERS_HOLD

OURS, OTHERS, SYSTEM = "ours", "others", "system"
INSTALLATION = StoreBounds.of_installation((OURS, "too"), SYSTEM)
GROUP = "/apis/buildkit.smrt-devops.net/v1alpha1"


def path(namespace: str | None, plural: str) -> str:
    return f"{GROUP}/namespaces/{namespace}/{plural}" if namespace else f"{GROUP}/{plural}"


class Recorded:
    """An API server that notes what it is asked for. Its collections are empty unless the test fills them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.items: dict[str, list[Doc]] = {}
        self.faults: dict[str, BkpoolError] = {}
        self.versions: dict[str, str] = {}
        self.limits = KubeLimits()
        self.moved = asyncio.Event()
        self.cut = asyncio.Event()
        """Once it is set, every watch ends at once with a fault."""

    async def list(self, at: str, **params: str) -> tuple[list[Doc], str]:
        self.note("list", at, params)
        if fault := self.faults.get(at):
            raise fault
        return self.items.get(at, []), self.versions.get(at, "7")

    async def watch(self, at: str, since: str, **params: str) -> AsyncGenerator[Doc, None]:
        params.pop("timeoutSeconds")
        self.note("watch", at, params)
        await self.cut.wait()
        raise self.faults.get(at, Gone("the watch is cut"))
        yield {}

    async def get(self, at: str) -> Doc:
        self.note("get", at, {})
        raise NotFound(at)

    async def replace(self, at: str, _body: Doc) -> Doc:
        self.note("replace", at, {})
        raise NotFound(at)

    async def create(self, at: str, _body: Doc) -> Doc:
        self.note("create", at, {})
        raise NotFound(at)

    async def delete(self, at: str, **_conditions: object) -> None:
        self.note("delete", at, {})

    def note(self, verb: str, at: str, params: dict[str, str]) -> None:
        self.asked.append((verb, at, params))
        self.moved.set()

    def places(self, verb: str) -> set[str]:
        return {at for asked, at, _ in self.asked if asked == verb}

    def params(self, verb: str, at: str) -> list[dict[str, str]]:
        return [params for asked, where, params in self.asked if (asked, where) == (verb, at)]

    async def until(self, condition) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.moved.clear()
                await self.moved.wait()


@pytest.fixture
def server() -> Recorded:
    return Recorded()


async def at_once(_seconds: float) -> None:
    await asyncio.sleep(0)


@asynccontextmanager
async def followed(server: Recorded, bounds: StoreBounds, **options):
    """A mirror that has listed everything, and watches."""

    mirror = Mirror(KubernetesStore(server, bounds), pause=at_once, **options)
    running = asyncio.create_task(mirror.run())
    try:
        async with asyncio.timeout(60):
            await mirror.ready.wait()
        yield mirror
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def a_pool(namespace: str, name: str = "p") -> Pool:
    return Pool(
        metadata=Metadata(name=name, namespace=namespace, uid=f"uid-{namespace}-{name}", resource_version="3")
    )


def stored(obj: Pool | Worker) -> Doc:
    return obj.to_json()


async def test_an_installation_lists_and_watches_only_its_own_namespaces(server):
    async with followed(server, INSTALLATION, configs=True):
        expected = {path(namespace, plural) for namespace in (OURS, "too") for plural in (Pool.PLURAL, Worker.PLURAL)}
        issuers = {path(namespace, OIDCConfig.PLURAL) for namespace in (OURS, "too", SYSTEM)}
        await server.until(lambda: len(server.places("watch")) == 7)

    assert server.places("list") == server.places("watch") == expected | issuers
    assert all(params == {} for _, _, params in server.asked)


async def test_without_pool_namespaces_everything_is_followed_in_one_list_and_watch(server):
    async with followed(server, StoreBounds.of_installation((), SYSTEM), configs=True):
        await server.until(lambda: len(server.places("watch")) == 3)

    assert server.places("list") == {path(None, kind.PLURAL) for kind in (Pool, Worker, OIDCConfig)}


async def test_a_gateway_follows_its_pool_and_the_workers_of_that_pool(server):
    async with followed(server, StoreBounds.of_pool(Key(OURS, "p"))):
        await server.until(lambda: len(server.places("watch")) == 2)

    for verb in ("list", "watch"):
        assert server.params(verb, path(OURS, Pool.PLURAL)) == [{"fieldSelector": "metadata.name=p"}]
        assert server.params(verb, path(OURS, Worker.PLURAL)) == [{"labelSelector": f"{LABEL_POOL}=p"}]
    assert len(server.asked) == 4


async def test_labels_that_are_asked_for_are_added_to_that_of_the_pool(server):
    await KubernetesStore(server, StoreBounds.of_pool(Key(OURS, "p"))).list(Worker, labels={LABEL_REQUEST: "r"})

    (asked,) = server.params("list", path(OURS, Worker.PLURAL))
    assert set(asked["labelSelector"].split(",")) == {f"{LABEL_POOL}=p", f"{LABEL_REQUEST}=r"}


async def test_nothing_outside_of_the_bounds_is_asked_for_or_written(server):
    store = KubernetesStore(server, INSTALLATION)
    pool = a_pool(OTHERS)
    worker = new_worker(Slot(OTHERS, "p", 0), pool, None, {})

    for write in (store.replace(pool), store.replace_status(worker), store.delete(Worker, *worker.key)):
        with pytest.raises(NotFound, match="there is no BuildKit"):
            await write
    with pytest.raises(NotFound):
        await store.get(Pool, *pool.key)
    with pytest.raises(InvalidInput, match="no pools in namespace 'others'") as refused:
        await store.create(worker)
    assert refused.value.field == "metadata.namespace"
    assert (await store.list(Worker, namespace=OTHERS)).keys == []
    with pytest.raises(InvalidInput):
        await anext(store.watch(Worker, "7", namespace=OTHERS))
    assert server.asked == []


async def test_an_issuer_beside_the_keys_of_the_appliance_is_its_own(server):
    store = KubernetesStore(server, INSTALLATION)
    with pytest.raises(NotFound):
        await store.get(OIDCConfig, SYSTEM, "issuer")
    with pytest.raises(NotFound):
        await store.get(Pool, SYSTEM, "p")

    assert [at for _, at, _ in server.asked] == [f"{path(SYSTEM, OIDCConfig.PLURAL)}/issuer"]


async def test_a_list_of_all_namespaces_has_the_version_from_which_nothing_is_missed(server):
    pools = [a_pool(OURS), a_pool("too")]
    for pool, version in zip(pools, ("12", "9"), strict=True):
        server.items[path(pool.key.namespace, Pool.PLURAL)] = [stored(pool)]
        server.versions[path(pool.key.namespace, Pool.PLURAL)] = version

    listing = await KubernetesStore(server, INSTALLATION).list(Pool)

    assert listing.keys == [pool.key for pool in pools]
    assert listing.resource_version == "9"


async def test_what_one_namespace_has_reached_says_nothing_of_another(server):
    """A write there may have a lower version than the newest that is known here."""
    server.versions[path(OURS, Pool.PLURAL)] = "1000"
    async with followed(server, INSTALLATION) as mirror:
        newer = a_pool("too").but(metadata=a_pool("too").metadata.but(resource_version="8"))
        mirror.apply(newer)
        assert mirror.pools == {newer.key: newer}
        mirror.apply(a_pool(OTHERS))
        assert mirror.pools == {newer.key: newer}, "of no namespace that is followed"


async def test_a_namespace_that_may_not_be_read_any_more_does_not_stop_the_others(server):
    mine, theirs = a_pool(OURS), a_pool("too")
    for pool in (mine, theirs):
        server.items[path(pool.key.namespace, Pool.PLURAL)] = [stored(pool)]
    async with followed(server, INSTALLATION) as mirror:
        forbidden = Forbidden('buildkitpools is forbidden: User "bkpool" cannot list resource "buildkitpools"')
        server.faults = {path("too", kind.PLURAL): forbidden for kind in (Pool, Worker)}
        ours = path(OURS, Pool.PLURAL)

        async def until_trouble(expected: str | None) -> None:
            server.cut.set()
            await server.until(lambda: mirror.trouble == expected)

        await server.until(lambda: len(server.places("watch")) == 4)
        server.faults[ours] = Unavailable("away")
        await until_trouble("away")
        server.faults[ours] = forbidden
        server.cut.set()
        lacking = {f"bkpool itself may not list buildkitpools in namespace {place!r}" for place in (OURS, "too")}
        await server.until(lambda: mirror.trouble in lacking)  # no namespace is left
        del server.faults[ours]
        server.cut.clear()
        await server.until(lambda: mirror.trouble is None)
        refused = len(server.params("list", path("too", Pool.PLURAL)))
        await server.until(lambda: len(server.params("list", path("too", Pool.PLURAL))) > refused)
        assert mirror.trouble is None, "the pools of one namespace alone stand still"
        assert set(mirror.pools) == {mine.key, theirs.key}, "and stay as they were"


async def test_issuers_that_are_interrupted_for_a_short_time_refuse_nobody(server):
    now = 0.0
    issuers = path(SYSTEM, OIDCConfig.PLURAL)
    async with followed(server, INSTALLATION, configs=True, seconds=lambda: now) as mirror:
        await server.until(lambda: len(server.places("watch")) == 7)
        server.faults[issuers] = Unavailable("away")
        server.cut.set()
        await server.until(lambda: len(server.params("list", issuers)) == 3)
        server.cut.clear()
        await server.until(lambda: mirror.trouble is None)
        now = ISSUERS_HOLD
        assert mirror.trouble == "away"


async def test_a_search_for_a_lease_leaves_out_a_namespace_that_may_not_be_read(server):
    server.faults[path(OURS, Worker.PLURAL)] = Forbidden("buildkitworkers is forbidden")
    worker = new_worker(Slot("too", "p", 0), a_pool("too"), None, {})
    server.items[path("too", Worker.PLURAL)] = [stored(worker)]
    found: list[Key] = []
    search = LeaseSearch(
        KubernetesStore(server, INSTALLATION), lambda worker: found.append(worker.key), pause=at_once
    )

    await search.find("d" * 64)
    assert found == [worker.key]

    server.faults[path("too", Worker.PLURAL)] = Forbidden("buildkitworkers is forbidden")
    with pytest.raises(Forbidden):
        await search.find("e" * 64)  # nothing at all can be said


async def test_a_right_that_is_missing_from_the_beginning_is_an_error(server):
    server.faults[path("too", Worker.PLURAL)] = Forbidden("buildkitworkers is forbidden")
    mirror = Mirror(KubernetesStore(server, INSTALLATION))
    with pytest.raises(BaseExceptionGroup) as failed:
        async with asyncio.timeout(60):
            await mirror.run()
    assert failed.group_contains(Forbidden)
