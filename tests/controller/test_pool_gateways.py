"""The gateways of pools against a cluster in memory: what is applied, and what happens when others change it.

The same against a real API server: e2e/kind/test_pool_gateways.py.
"""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from bkpool.controller import gateway_rights, pool_gateways
from bkpool.controller.pool_gateways import PoolGateways
from bkpool.core import wall_clock
from bkpool.core.allowances import Allowances, read_allowances
from bkpool.core.errors import Forbidden, InvalidInput, NotFound, Unavailable
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.subscribers import Subscribers
from bkpool.kube import KubeLimits
from bkpool.pki.authority import Authority, expires_at, has_name
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.rotation import Former
from bkpool.store import Listing, WatchEvent, heartbeats
from bkpool.store.events import LogRecorder
from bkpool.store.mirror import Mirror
from support.no_store import NoStore
from support.objects import lease, worker

Doc = dict[str, Any]
NOW = datetime(2026, 5, 1, tzinfo=UTC)
SECRETS = ClusterSecrets.create(NOW)
P = Key("team", "p")
SERVICE = "/api/v1/namespaces/team/services/p"
SECRET = "/api/v1/namespaces/team/secrets/p-gateway"
DEPLOYMENT = "/apis/apps/v1/namespaces/team/deployments/p-gateway"


class Cluster:
    """An API server in memory. A watch can be cut, and then opens again only when it is allowed to."""

    def __init__(self) -> None:
        self.objects: dict[str, Doc] = {}
        self.version = 10
        self.limits = KubeLimits()
        self.applied: list[str] = []
        self.errors: dict[str, Exception] = {}
        self.reachable = asyncio.Event()
        self.reachable.set()
        self._watches: defaultdict[str, set[asyncio.Queue[Doc | None]]] = defaultdict(set)

    async def get(self, path: str) -> Doc:
        if path not in self.objects:
            raise NotFound(path)
        return self.objects[path]

    async def apply(self, path: str, body: Doc) -> Doc:
        self.applied.append(path)
        if path in self.errors:
            raise self.errors[path]
        return self.put(path, {**self.objects.get(path, {}), **body})

    async def list(self, path: str, **_params: str) -> tuple[list[Doc], str]:
        await self.reachable.wait()
        return [doc for where, doc in self.objects.items() if where.rpartition("/")[0] == path], str(self.version)

    async def watch(self, path: str, since: str, **_params: str) -> AsyncGenerator[Doc, None]:
        queue: asyncio.Queue[Doc | None] = asyncio.Queue()
        self._watches[path].add(queue)
        try:
            while (event := await queue.get()) is not None:
                if int(event["object"]["metadata"]["resourceVersion"]) > int(since):
                    yield event
        finally:
            self._watches[path].discard(queue)
        raise Unavailable("the watch was cut")

    def put(self, path: str, doc: Doc) -> Doc:
        self.version += 1
        kind = "MODIFIED" if path in self.objects else "ADDED"
        self.objects[path] = {**doc, "metadata": {**doc["metadata"], "resourceVersion": str(self.version)}}
        self._send(path, {"type": kind, "object": self.objects[path]})
        return self.objects[path]

    def change(self, path: str, **parts: object) -> None:
        self.put(path, {**self.objects[path], **parts})

    def remove(self, path: str) -> None:
        self.version += 1
        doc = self.objects.pop(path)
        gone = {**doc, "metadata": {**doc["metadata"], "resourceVersion": str(self.version)}}
        self._send(path, {"type": "DELETED", "object": gone})

    def cut(self) -> None:
        """Ends all watches, and answers no list until `reachable` is set."""
        self.reachable.clear()
        for queues in self._watches.values():
            for queue in queues:
                queue.put_nowait(None)

    def _send(self, path: str, event: Doc) -> None:
        for queue in self._watches[path.rpartition("/")[0]]:
            queue.put_nowait(event)

    @property
    def watched(self) -> int:
        return sum(map(len, self._watches.values()))

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - several things may make it true
                await asyncio.sleep(0.005)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def mirror(monkeypatch) -> Mirror:
    monkeypatch.setattr(pool_gateways, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(pool_gateways, "_LONGEST_PAUSE", 0.05)
    found = Mirror(NoStore())
    found.ready.set()
    return found


def a_pool(name: str = "p", version: int = 1, generation: int = 1, **spec: Any) -> Pool:
    metadata = Metadata(
        name=name, namespace="team", uid=f"uid-{name}", resource_version=str(version), generation=generation
    )
    return Pool(metadata=metadata, spec=PoolSpec.model_validate(spec))


class Workers:
    """The CAs of workers. Some workers may be of a former one."""

    def __init__(self) -> None:
        self.authorities = PoolAuthorities(SECRETS.backend)
        self.former: Authority | None = None
        self.subscribers: Subscribers[[Slot]] = Subscribers()

    def current_authority(self, pool: Key) -> Authority:
        return self.authorities.current(pool)

    def former_authority(self, _pool: Key) -> Authority | None:
        return self.former

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        return self.subscribers.add(callback)


@asynccontextmanager
async def running(
    cluster: Cluster, mirror: Mirror, workers: Workers | None = None, **options: Any
) -> AsyncIterator[PoolGateways]:
    gateways = PoolGateways(
        cluster,
        mirror,
        SECRETS.authority,
        workers or Workers(),
        image="bkpool:1",
        controller="buildkit-controller",
        namespace="system",
        recorder=LogRecorder(),
        **{"now": lambda: NOW, **options},
    )
    task = asyncio.create_task(gateways.run())
    yield gateways
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def settled(cluster: Cluster, gateways: PoolGateways, pool: Key = P) -> None:
    """Waits until the pool's gateway has been applied and the watches are open, then forgets what was applied."""
    await cluster.until(lambda: pool in gateways.endpoints and cluster.watched == 3)
    await asyncio.sleep(0.02)
    cluster.applied.clear()


async def test_a_pool_gets_its_objects_once_and_its_endpoint(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: P in gateways.endpoints)
        assert {SERVICE, SECRET, DEPLOYMENT} <= set(cluster.objects)
        assert gateways.endpoints[P] == "tcp://p.team.svc:1235"
        await asyncio.sleep(0.05)
        assert len(cluster.applied) == len(set(cluster.applied)), "its own writes are no reason to write again"


@pytest.mark.parametrize("path", [SERVICE, SECRET, DEPLOYMENT])
async def test_a_deleted_object_is_applied_again(cluster, mirror, path):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        cluster.remove(path)
        await cluster.until(lambda: path in cluster.objects)
        assert set(cluster.applied) == {path}


@pytest.mark.parametrize("path", [SERVICE, SECRET, DEPLOYMENT])
async def test_an_object_that_was_deleted_while_no_watch_was_open_is_applied_again(cluster, mirror, path):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        cluster.cut()
        await cluster.until(lambda: cluster.watched == 0)
        cluster.remove(path)
        cluster.reachable.set()
        await cluster.until(lambda: path in cluster.objects)
        assert set(cluster.applied) == {path}


async def test_an_object_that_was_made_and_deleted_while_no_watch_was_open_is_applied_again(cluster, mirror):
    mirror.apply(a_pool())
    cluster.cut()
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: P in gateways.endpoints)
        cluster.applied.clear()
        cluster.remove(DEPLOYMENT)
        cluster.reachable.set()
        await cluster.until(lambda: DEPLOYMENT in cluster.objects)
        assert set(cluster.applied) == {DEPLOYMENT}


async def test_a_gateway_gets_the_right_to_write_heartbeats_when_the_controller_follows_them(cluster):
    """Before that, nobody could read them. The manifests of this version may be applied later than its image."""
    may_ask = asyncio.Event()

    class Store(NoStore):
        refusal: Exception | None = Forbidden("no right", hint="")

        async def list(self, kind, **_narrowed):
            if self.refusal is not None:
                raise self.refusal
            return Listing((), "1")

        async def watch(self, kind, since, **_narrowed):
            await asyncio.Event().wait()
            yield

    async def pause(_seconds):
        await may_ask.wait()

    def rights():
        role = cluster.objects["/apis/rbac.authorization.k8s.io/v1/namespaces/team/roles/p-gateway"]
        return {resource for rule in role["rules"] for resource in rule["resources"]}

    store = Store()
    mirror = Mirror(store, heartbeats=True, pause=pause)
    mirror.ready.set()
    mirror.apply(a_pool())
    following = asyncio.create_task(mirror.heartbeats.run())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        assert "buildkitgateways" not in rights()
        Store.refusal = None
        may_ask.set()
        await cluster.until(lambda: "buildkitgateways" in rights())
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_a_pool_gets_its_gateway_although_heartbeats_are_never_answered(cluster, monkeypatch):
    """It gets the right to write them when they are."""
    monkeypatch.setattr(heartbeats, "_KNOWN_WITHIN", 0.01)
    mirror = Mirror(NoStore(), heartbeats=True)
    mirror.ready.set()
    mirror.apply(a_pool())
    with capture_logs() as logs:
        async with running(cluster, mirror) as gateways:
            await settled(cluster, gateways)
            assert not may_write_heartbeats(cluster)
            mirror.heartbeats._note(None, followed=True)
            await cluster.until(lambda: may_write_heartbeats(cluster))
    assert "heartbeats.not_known" in [line["event"] for line in logs]


@asynccontextmanager
async def unfollowed_later(cluster: Cluster, *pools: Pool) -> AsyncIterator[tuple[PoolGateways, Callable[[], None]]]:
    """Pools whose gateways may write heartbeats, and a function after which those are not followed any more."""
    mirror = Mirror(NoStore(), heartbeats=True)
    mirror.ready.set()
    for pool in pools:
        mirror.apply(pool)
    mirror.heartbeats._note(None, followed=True)
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: len(gateways.endpoints) == len(pools))
        yield gateways, lambda: mirror.heartbeats._note(None, followed=False)


def may_write_heartbeats(cluster: Cluster, pool: str = "p") -> bool:
    role = cluster.objects[f"/apis/rbac.authorization.k8s.io/v1/namespaces/team/roles/{pool}-gateway"]
    return any("buildkitgateways" in rule["resources"] for rule in role["rules"])


async def test_a_gateway_loses_the_right_to_write_heartbeats_although_its_service_is_refused(cluster):
    async with unfollowed_later(cluster, a_pool()) as (_, unfollow):
        assert may_write_heartbeats(cluster)
        cluster.errors[SERVICE] = InvalidInput("422: the Service is invalid", hint="")
        cluster.remove(SERVICE)
        await cluster.until(lambda: SERVICE in cluster.applied[-3:])
        unfollow()
        await cluster.until(lambda: not may_write_heartbeats(cluster))


async def test_all_rights_are_taken_away_before_anything_else_is_done(cluster, monkeypatch):
    """Pools are applied few at a time, and one may take long."""
    names = [f"p{number}" for number in range(20)]
    never = asyncio.Event()

    async def stuck(*_args):
        await never.wait()

    async with unfollowed_later(cluster, *(a_pool(name) for name in names)) as (_, unfollow):
        monkeypatch.setattr(PoolGateways, "_apply", stuck)
        unfollow()
        await cluster.until(lambda: not any(may_write_heartbeats(cluster, name) for name in names))


async def test_a_right_that_cannot_be_taken_away_is_tried_again_soon(cluster, monkeypatch):
    monkeypatch.setattr(gateway_rights, "_FIRST_PAUSE", 0.01)
    role = "/apis/rbac.authorization.k8s.io/v1/namespaces/team/roles/p-gateway"

    async def stuck(*_args):
        await asyncio.Event().wait()

    async with unfollowed_later(cluster, a_pool()) as (_, unfollow):
        monkeypatch.setattr(PoolGateways, "_apply", stuck)
        cluster.errors[role] = Unavailable("the server is weak")
        before = cluster.applied.count(role)
        unfollow()
        await cluster.until(lambda: cluster.applied.count(role) > before + 2)
        assert may_write_heartbeats(cluster)
        del cluster.errors[role]
        await cluster.until(lambda: not may_write_heartbeats(cluster))


async def test_a_role_whose_answer_was_lost_is_applied_again_although_it_is_wanted_as_before(cluster):
    role = "/apis/rbac.authorization.k8s.io/v1/namespaces/team/roles/p-gateway"
    apply = cluster.apply

    async def lost(path, body):
        made = await apply(path, body)
        if path == role:
            raise Unavailable("no answer")
        return made

    mirror = Mirror(NoStore(), heartbeats=True)
    mirror.ready.set()
    mirror.apply(a_pool())
    mirror.heartbeats._note(None, followed=False)
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        cluster.apply = lost
        mirror.heartbeats._note(None, followed=True)
        await cluster.until(lambda: may_write_heartbeats(cluster))
        cluster.apply = apply
        mirror.heartbeats._note(None, followed=False)
        await cluster.until(lambda: not may_write_heartbeats(cluster))


async def test_the_certificates_have_the_life_of_the_settings(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror, server_life=timedelta(days=9)) as gateways:
        await settled(cluster, gateways)
        certificate = base64.b64decode(cluster.objects[SECRET]["data"]["tls.crt"])
        assert expires_at(certificate) == NOW + timedelta(days=9)


async def test_certificates_that_somebody_changed_are_replaced(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        before = cluster.objects[SECRET]["data"]
        cluster.change(SECRET, data={**before, "tls.crt": "bm9uZQ=="})
        await cluster.until(lambda: cluster.objects[SECRET]["data"].keys() == before.keys() and cluster.applied)
        await cluster.until(lambda: cluster.objects[SECRET]["data"]["tls.crt"] != "bm9uZQ==")
        after = cluster.objects[SECRET]["data"]
        assert after["tls.crt"] != before["tls.crt"], "issued again: somebody may have read the key, too"
        assert after["ca.crt"] == before["ca.crt"]


async def test_a_status_of_the_deployment_becomes_the_trouble_of_the_pool_and_nothing_is_written(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        bad = {"type": "Progressing", "status": "False", "message": "it has timed out progressing."}
        cluster.change(DEPLOYMENT, status={"conditions": [bad]})
        await cluster.until(lambda: P in gateways.trouble)
        assert gateways.trouble[P].startswith("gateway: it has timed out progressing. See: kubectl -n team")
        assert cluster.applied == []


async def test_an_error_of_one_pool_stays_with_it_and_names_what_to_do(cluster, mirror):
    cluster.errors["/api/v1/namespaces/team/serviceaccounts/q-gateway"] = Forbidden("no right", hint="")
    mirror.apply(a_pool("q"))
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: P in gateways.endpoints and Key("team", "q") in gateways.trouble)
        assert "--pool-namespace team" in gateways.trouble[Key("team", "q")]
        cluster.errors.clear()
        await cluster.until(lambda: Key("team", "q") in gateways.endpoints and not gateways.trouble)


async def test_a_service_of_this_name_that_is_not_bkpools_is_left_alone(cluster, mirror):
    cluster.put(SERVICE, {"kind": "Service", "metadata": {"name": "p", "namespace": "team"}, "spec": {"mine": True}})
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: P in gateways.trouble)
        assert "Service team/p exists and was not made by bkpool" in gateways.trouble[P]
        assert cluster.objects[SERVICE]["spec"] == {"mine": True}


async def test_with_the_last_pool_of_a_namespace_its_watches_end(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        mirror._pools.event(WatchEvent("DELETED", a_pool(version=9)))
        await cluster.until(lambda: cluster.watched == 0)
        assert dict(gateways.endpoints) == {}


API = "buildkit-controller.buildkit-system.svc"


def served(cluster: Cluster) -> bytes:
    return base64.b64decode(cluster.objects[SECRET]["data"]["tls.crt"])


def named(hostname: str, **more: Any) -> Pool:
    return a_pool(networking={"external": {"hostname": hostname}}, **more)


@pytest.mark.parametrize("hostname", [API, "build.example.com"])
async def test_an_author_gets_no_certificate_for_a_name_that_is_not_allowed(cluster, mirror, hostname):
    mirror.apply(named(hostname))
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        assert not has_name(served(cluster), hostname)
        assert has_name(served(cluster), "p.team.svc"), "the pool is served inside of the cluster"
        assert gateways.endpoints[P] == "tcp://p.team.svc:1235"


async def test_a_name_that_is_allowed_is_in_the_certificate(cluster, mirror):
    mirror.apply(named("build.example.com"))
    async with running(cluster, mirror, allowed=read_allowances(hosts=["team=build.example.com"])) as gateways:
        await settled(cluster, gateways)
        assert has_name(served(cluster), "build.example.com")
        assert gateways.endpoints[P] == "tcp://build.example.com:1235"


async def test_certificates_and_endpoint_of_before_stay_until_the_operator_has_decided(cluster, mirror):
    mirror.apply(named("build.example.com"))
    async with running(cluster, mirror, allowed=read_allowances(hosts=["team=build.example.com"])) as gateways:
        await settled(cluster, gateways)
    before = cluster.objects[SECRET]["data"]
    async with running(cluster, mirror) as gateways:  # after an upgrade: nothing is allowed yet
        await settled(cluster, gateways)
        assert cluster.objects[SECRET]["data"] == before
        assert gateways.endpoints[P] == "tcp://build.example.com:1235"
        mirror.apply(named("other.example.com", version=2, generation=2))
        await cluster.until(lambda: gateways.endpoints.get(P) == "tcp://p.team.svc:1235")
        assert cluster.objects[SECRET]["data"] == before, "another name that is not allowed changes nothing"


async def test_a_load_balancer_and_annotations_that_are_not_allowed_are_not_made(cluster, mirror):
    mirror.apply(a_pool(networking={"serviceType": "LoadBalancer", "annotations": {"a": "b"}}))
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        service = cluster.objects[SERVICE]
        assert service["spec"]["type"] == "ClusterIP"
        assert "annotations" not in service["metadata"]


async def test_a_load_balancer_of_before_stays_as_it_is(cluster, mirror):
    mirror.apply(a_pool(networking={"serviceType": "LoadBalancer"}))
    address = {"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}, {"hostname": API}]}}
    async with running(cluster, mirror, allowed=Allowances(load_balancers=frozenset({"team"}))) as gateways:
        await settled(cluster, gateways)
        cluster.change(SERVICE, status=address)
        await cluster.until(lambda: gateways.endpoints.get(P) == "tcp://192.0.2.7:1235")
        assert not has_name(served(cluster), API), "whoever gave the load balancer this name"
    before = cluster.objects[SERVICE], cluster.objects[SECRET]
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        assert gateways.endpoints[P] == "tcp://192.0.2.7:1235"
        assert (cluster.objects[SERVICE]["spec"], cluster.objects[SECRET]["data"]) == (
            before[0]["spec"],
            before[1]["data"],
        )


async def test_a_gateway_image_that_is_not_allowed_is_not_run(cluster, mirror):
    mirror.apply(a_pool(gatewayImage="evil.example.com/gateway:1"))
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
        (container,) = cluster.objects[DEPLOYMENT]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "bkpool:1"


async def test_a_gateway_has_a_certificate_for_workers_of_its_own_pool_only(cluster, mirror):
    mirror.apply(a_pool())
    mirror.apply(a_pool("q"))
    async with running(cluster, mirror) as gateways:
        await cluster.until(lambda: {P, Key("team", "q")} <= gateways.endpoints.keys())
    pools = PoolAuthorities(SECRETS.backend)
    certificate = base64.b64decode(cluster.objects[SECRET]["data"]["dialler.crt"])
    assert pools.current(P).issued(certificate)
    assert not pools.current(Key("team", "q")).issued(certificate)
    assert not SECRETS.backend.issued(certificate)


async def test_certificates_for_workers_are_renewed_without_touching_the_one_for_clients(cluster, mirror):
    mirror.apply(a_pool())
    async with running(cluster, mirror) as gateways:
        await settled(cluster, gateways)
    before = cluster.objects[SECRET]["data"]
    async with running(cluster, mirror, now=lambda: NOW + timedelta(days=2)) as gateways:
        await settled(cluster, gateways)
    after = cluster.objects[SECRET]["data"]
    assert after["tls.crt"] == before["tls.crt"]
    assert after["dialler.crt"] != before["dialler.crt"]


async def test_certificates_that_came_due_while_the_machine_slept_are_renewed(cluster, mirror, monkeypatch):
    monkeypatch.setattr(wall_clock, "LONGEST_SLEEP", 0.01)
    now = NOW
    mirror.apply(a_pool())
    async with running(cluster, mirror, now=lambda: now) as gateways:
        await settled(cluster, gateways)
        before = cluster.objects[SECRET]["data"]
        now += timedelta(days=2)
        await cluster.until(lambda: cluster.objects[SECRET]["data"]["dialler.crt"] != before["dialler.crt"])


async def test_the_way_to_workers_of_a_former_ca_goes_with_the_last_of_them(cluster, mirror):
    workers = Workers()
    workers.former = SECRETS.backend
    mirror.apply(a_pool())
    async with running(cluster, mirror, workers) as gateways:
        await settled(cluster, gateways)
        assert "backend.crt" in cluster.objects[SECRET]["data"]
        server = served(cluster)
        workers.former = None
        workers.subscribers.notify(Slot("team", "p", 0))
        await cluster.until(lambda: "backend.crt" not in cluster.objects[SECRET]["data"])
        assert served(cluster) == server


async def test_after_a_rotation_the_former_ca_signs_until_the_last_lease_of_before_has_ended(cluster, mirror):
    old = Authority.create(NOW)
    mirror.apply(a_pool())
    holder = worker(0, lease(now=NOW))
    mirror.apply(holder)
    options = {"former": Former(old, NOW), "now": lambda: NOW + timedelta(hours=2)}
    async with running(cluster, mirror, **options) as gateways:
        await settled(cluster, gateways)
        trusted = base64.b64decode(cluster.objects[SECRET]["data"]["ca.crt"])
        assert trusted == old.cert_pem + SECRETS.authority.cert_pem
        assert old.issued(served(cluster))
        free = holder.with_lease(None)
        mirror.apply(free.but(metadata=free.metadata.but(resource_version="2")))
        await cluster.until(lambda: SECRETS.authority.issued(served(cluster)))
        trusted = base64.b64decode(cluster.objects[SECRET]["data"]["ca.crt"])
        assert trusted == SECRETS.authority.cert_pem
