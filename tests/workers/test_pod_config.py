"""What is written to the cluster for a worker: its configuration, and nothing that its pool may not ask for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from bkpool.core.allowances import Allowances, read_allowances
from bkpool.core.errors import NotFound, WorkerFailed
from bkpool.core.names import ANNOTATION_ISOLATION, ANNOTATION_SPEC_DIGEST
from bkpool.core.pool import CacheGC, Pool
from bkpool.core.resource import Metadata
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.pods.pod_spec import ROOTLESS_IMAGE, PodRequest
from bkpool.workers.pods.runtime import PodRuntime
from support.objects import pool, slot

AUTHORITIES = PoolAuthorities(ClusterSecrets.create(datetime.now(UTC)).backend)
PRIVILEGED = read_allowances(privileged=["default"], images=["default=registry.example.com/*"])


def isolated(isolation: str, **spec: object) -> Pool:
    return pool(**spec).but(metadata=Metadata(name="p", uid="u", annotations={ANNOTATION_ISOLATION: isolation}))


def runtime_of(api: Cluster, allowed: Allowances | None = None) -> PodRuntime:
    return PodRuntime(api, authorities=AUTHORITIES, allowed=allowed)


async def no_report(_message: str) -> None:
    pass


class Cluster:
    """A KubeApi without objects, that notes what is applied. It drops fields that it does not know."""

    def __init__(self, *unknown: str) -> None:
        self.applied: dict[str, dict] = {}
        self.created: list[dict] = []
        self.unknown = unknown

    async def get(self, path: str) -> dict:
        raise NotFound(path)

    async def apply(self, path: str, body: dict) -> dict:
        self.applied[body["kind"]] = body
        return body

    async def create(self, _path: str, body: dict, **params: str) -> dict:
        body = body | {"spec": {key: value for key, value in body["spec"].items() if key not in self.unknown}}
        if not params:
            self.created.append(body)
        return body | {"metadata": body["metadata"] | {"resourceVersion": "1", "uid": "uid"}}


async def test_the_operators_defaults_of_the_collection_reach_the_pods_configuration():
    api = Cluster()
    runtime = PodRuntime(
        api,
        authorities=PoolAuthorities(ClusterSecrets.create(datetime.now(UTC)).backend),
        gc_defaults=CacheGC(keep_storage="40%", reserved_space="1GB", min_free_space="3GB"),
    )
    await runtime.daemons._writes.make(PodRequest(slot(0), "uid-1", None, pool(), ROOTLESS_IMAGE))
    (text,) = api.applied["ConfigMap"]["data"].values()
    assert 'maxUsedSpace = "40%"' in text


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        (isolated("privileged"), "--allow-privileged default"),
        (isolated("rootless", buildkit_image="evil.example.com/b:1"), "--allow-image default=evil.example.com/b:1"),
    ],
)
async def test_an_author_gets_no_pod_that_the_operator_has_not_allowed(asked, option):
    api = Cluster()
    with pytest.raises(WorkerFailed, match=option) as refused:
        async with asyncio.timeout(60):
            await runtime_of(api, Allowances()).daemons.start(slot(0), "uid-1", None, asked, no_report)
    assert refused.value.field in refused.value.message
    assert (api.created, api.applied) == ([], {}), "not even a Secret"


async def test_what_the_operator_allows_is_made():
    asked = isolated("privileged", buildkit_image="registry.example.com/b:1")
    for allowed in (PRIVILEGED, None):
        api = Cluster()
        await runtime_of(api, allowed).daemons._make(slot(0), "uid-1", None, asked, set())
        (made,) = api.created
        assert made["spec"]["containers"][0]["image"] == "registry.example.com/b:1"


async def test_a_cluster_that_drops_the_user_namespace_gets_no_pod_with_roots_rights():
    request = PodRequest(slot(0), "uid-1", None, isolated("userns"), ROOTLESS_IMAGE)
    old = Cluster("hostUsers")
    with pytest.raises(WorkerFailed, match="cannot have user namespaces"):
        await runtime_of(old).daemons._writes.make(request)
    assert (old.created, old.applied) == ([], {})
    new = Cluster()
    await runtime_of(new).daemons._writes.make(request)
    assert [made["spec"]["hostUsers"] for made in new.created] == [False]


PLAIN = isolated("rootless")


@pytest.mark.parametrize(
    ("today", "outdated"),
    [
        (PLAIN, False),
        (isolated("rootless", scaling={"max": 3}, auth={"rbac": {"enabled": False}}), False),
        (isolated("rootless", networking={"egress": {"policy": "public"}}), False),  # a NetworkPolicy changes at once
        (isolated("rootless", cache={"gc": {"keepStorage": "3GB"}}), True),
        (isolated("rootless", buildkit_config="debug = true"), True),
        (isolated("rootless", buildkit_image="registry.example.com/b:1"), True),
        (isolated("rootless", resources={"buildkit": {"limits": {"cpu": 2}}}), True),
        (isolated("rootless", cache={"backends": [{"type": "local"}]}), True),
        (isolated("baseline"), True),
        (isolated("nonsense"), False),  # no pod can be made with it, so those that run stay
        (isolated("rootless", buildkit_config="= no TOML"), False),
    ],
)
async def test_a_pod_of_another_spec_is_outdated(today, outdated):
    api = Cluster()
    runtime = runtime_of(api)
    await runtime.daemons._make(slot(0), "uid-1", None, PLAIN, set())
    (made,) = api.created
    made["metadata"] |= {"uid": "pod", "resourceVersion": "7"}
    runtime._slots.pods.apply(made)
    seen = runtime.daemons.observe()[slot(0)]
    assert seen.spec_digest
    assert not seen.outdated, "nothing is known of the pool's spec of today"
    await runtime.daemons.follow(today)
    assert runtime.daemons.observe()[slot(0)].outdated is outdated
    await runtime.daemons.follow(PLAIN)
    assert runtime.daemons.observe()[slot(0)].outdated is False


async def test_a_pod_of_an_earlier_version_is_outdated_unless_no_other_could_be_made():
    for allowed, outdated in ((None, True), (Allowances(), False)):
        api = Cluster()
        runtime = runtime_of(api)
        asked = isolated("privileged")
        await runtime.daemons._make(slot(0), "uid-1", None, asked, set())
        (made,) = api.created
        made["metadata"] |= {"uid": "pod", "resourceVersion": "7"}
        del made["metadata"]["annotations"][ANNOTATION_SPEC_DIGEST]
        later = runtime_of(api, allowed)
        later._slots.pods.apply(made)
        await later.daemons.follow(asked)
        assert later.daemons.observe()[slot(0)].outdated is outdated
