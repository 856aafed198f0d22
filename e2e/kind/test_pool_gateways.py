"""The gateways of pools, made by the appliance's own ServiceAccount with the rights that `bkpool manifests` gives it.

The pods of the gateways need no image here. The tests look at the objects that bkpool writes, and at what it does
when others change them.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import uuid
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from cryptography import x509
from kind.objects import INSTALLED, installed_path

from bkpool.controller.pool_gateways import PoolGateways
from bkpool.core.allowances import Allowances
from bkpool.core.errors import Conflict, Forbidden, NotFound
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker
from bkpool.install import crds
from bkpool.install.manifests import Install, render
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.store.bounds import StoreBounds
from bkpool.store.kubernetes import KubernetesStore
from bkpool.store.mirror import Mirror

NOW = datetime.now(UTC)
NOTHING = Allowances()
SECRETS = ClusterSecrets.create(NOW)
RIGHTS = INSTALLED.keys() - {"FlowSchema", "PriorityLevelConfiguration"}
"""The kinds of the manifests that are the appliance's identity and rights."""


def rights(system, *namespaces):
    docs = yaml.safe_load_all(render(Install(namespace=system, pool_namespaces=namespaces)))
    return [doc for doc in docs if doc and doc["kind"] in RIGHTS]


def rights_to_see_pools(system, namespace):
    """A Role and its binding with only the first rules of those that the manifests have for a pool's namespace."""
    docs = [doc for doc in rights(system, namespace) if doc["metadata"].get("namespace") == namespace]
    for doc in docs:
        if doc["kind"] == "Role":
            doc["rules"] = [rule for rule in doc["rules"] if rule["apiGroups"] == ["buildkit.smrt-devops.net"]]
    return docs


async def until_allowed(api, path):
    """The API server learns of new rights a moment later."""
    async with asyncio.timeout(60):
        while True:
            try:
                await api.list(path)
            except Forbidden:
                await asyncio.sleep(0.1)
            else:
                return


@pytest.fixture
async def store(api, namespace):
    """The custom resources, and a namespace for pools. The pools end with the test."""
    await crds.install(api)
    store = KubernetesStore(api)
    yield store
    for pool in (await store.list(Pool, namespace=namespace)).items:
        await store.delete(Pool, *pool.key)


@asynccontextmanager
async def a_namespace(api, kind):
    name = f"{kind}-{uuid.uuid4().hex[:8]}"
    await api.create(paths.core("namespaces"), {"metadata": {"name": name}})
    yield name
    await api.delete(paths.core("namespaces", name=name))


@pytest.fixture
async def barred(api):
    """A second namespace, in which the appliance has no rights."""
    async with a_namespace(api, "barred") as name:
        yield name


@pytest.fixture
async def system(api):
    """The namespace of the appliance."""
    async with a_namespace(api, "system") as name:
        yield name
        for kind in ("ClusterRoleBinding", "ClusterRole"):
            with suppress(NotFound):
                await api.delete(installed_path({"kind": kind, "metadata": {"name": f"bkpool-tokens-{name}"}}))


@pytest.fixture
async def appliance(api, cluster, system, namespace, tmp_path):
    """The API with the token of the appliance's ServiceAccount, which has rights in the namespace of the test."""
    for doc in rights(system, namespace):
        await api.apply(installed_path(doc), doc)
    account = paths.core("serviceaccounts", system, "buildkit-controller", "token")
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
    token = (await api.create(account, asked))["status"]["token"]
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    for user in config["users"]:
        user["user"] = {"token": token}
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    opened = await KubeApi.connect(ClusterAccess(file))
    await until_allowed(opened, paths.custom(Worker.PLURAL, namespace))
    yield opened
    await opened.close()


class RecordedReasons:
    """A recorder that remembers the reasons."""

    def __init__(self):
        self.reasons = []

    def record(self, about, reason, message, *, warning=False):
        self.reasons.append(reason)


class Workers:
    """The CAs of workers; none is of a former one."""

    def current_authority(self, pool):
        return PoolAuthorities(SECRETS.backend).current(pool)

    def former_authority(self, pool):
        return None

    def on_change(self, callback):
        return lambda: None


@asynccontextmanager
async def running(api, *namespaces, now=lambda: datetime.now(UTC), allowed=NOTHING):
    """Runs the gateways of all pools in these namespaces until the end of the block."""
    mirror = Mirror(KubernetesStore(api, StoreBounds(namespaces)))
    image, recorder = "registry.example.com/bkpool:1", RecordedReasons()
    gateways = PoolGateways(
        api,
        mirror,
        SECRETS.authority,
        Workers(),
        image=image,
        controller="buildkit-controller",
        namespace="system",
        now=now,
        recorder=recorder,
        allowed=allowed,
    )
    gateways.reasons = recorder.reasons
    gateways.changed = asyncio.Event()
    gateways.on_change(lambda _pool: gateways.changed.set())
    tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(gateways.run())]
    try:
        yield gateways
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_gateways(gateways, condition):
    """Waits until the reported endpoints and errors of the gateways fulfil a condition."""
    async with asyncio.timeout(90):
        while not condition(gateways):
            gateways.changed.clear()
            await gateways.changed.wait()


async def becomes(api, path, condition):
    """Watches an object in the cluster until it fulfils a condition, and returns it."""
    collection, _, name = path.rpartition("/")
    async with asyncio.timeout(120):
        while True:
            items, since = await api.list(collection, fieldSelector=f"metadata.name={name}")
            seen = items[0] if items else None
            if condition(seen):
                return seen
            async for event in api.watch(collection, since, fieldSelector=f"metadata.name={name}"):
                seen = None if event["type"] == "DELETED" else event["object"]
                if event["type"] != "BOOKMARK" and condition(seen):
                    return seen


def a_pool(namespace, **spec):
    return Pool(metadata=Metadata(name="p", namespace=namespace), spec=PoolSpec.model_validate(spec))


def at(kind, namespace):
    name = "p"
    names = {
        "Service": ("v1", "services", name),
        "Secret": ("v1", "secrets", f"{name}-gateway"),
        "ServiceAccount": ("v1", "serviceaccounts", f"{name}-gateway"),
        "Deployment": ("apps/v1", "deployments", f"{name}-gateway"),
        "Role": ("rbac.authorization.k8s.io/v1", "roles", f"{name}-gateway"),
        "RoleBinding": ("rbac.authorization.k8s.io/v1", "rolebindings", f"{name}-gateway"),
        "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets", f"{name}-leased"),
        "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies", f"{name}-workers"),
    }
    version, plural, found = names[kind]
    return paths.core(plural, namespace, found) if version == "v1" else paths.group(version, plural, namespace, found)


KINDS = (
    "Service",
    "Secret",
    "ServiceAccount",
    "Deployment",
    "Role",
    "RoleBinding",
    "PodDisruptionBudget",
    "NetworkPolicy",
)


def certificate(secret):
    return x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))


def addresses(secret):
    names = certificate(secret).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(address) for address in names.get_values_for_type(x509.IPAddress)]


async def test_all_objects_are_made_with_a_pool_and_removed_with_it(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        assert gateways.endpoints[pool.key] == f"tcp://p.{namespace}.svc:1235"
        for kind in KINDS:
            made = await api.get(at(kind, namespace))
            assert [owner["uid"] for owner in made["metadata"]["ownerReferences"]] == [pool.uid], kind
        assert not gateways.trouble
        await store.delete(Pool, *pool.key)
        await wait_for_gateways(gateways, lambda g: pool.key not in g.endpoints)
        for kind in KINDS:
            await becomes(api, at(kind, namespace), lambda doc: doc is None)


async def test_objects_that_others_change_or_delete_are_restored(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        await api.patch(at("Deployment", namespace), {"spec": {"replicas": 0}})
        await becomes(api, at("Deployment", namespace), lambda doc: doc and doc["spec"]["replicas"] == 2)
        before = await api.get(at("Secret", namespace))
        await api.patch(at("Secret", namespace), {"data": {"tls.crt": "AAAA"}})
        await becomes(
            api,
            at("Secret", namespace),
            lambda doc: doc and doc["data"]["tls.crt"] not in {"AAAA", before["data"]["tls.crt"]},
        )
        for kind in ("Service", "Secret", "Deployment"):
            gone = await api.get(at(kind, namespace))
            await api.delete(at(kind, namespace))
            await becomes(
                api,
                at(kind, namespace),
                lambda doc, uid=gone["metadata"]["uid"]: doc and doc["metadata"]["uid"] != uid,
            )


async def test_objects_that_were_deleted_while_no_controller_ran_are_made_again(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
    before = certificate(await api.get(at("Secret", namespace))).serial_number
    for kind in ("Role", "NetworkPolicy", "ServiceAccount"):
        await api.delete(at(kind, namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        for kind in KINDS:
            await api.get(at(kind, namespace))
    assert certificate(await api.get(at("Secret", namespace))).serial_number == before, (
        "the certificate was still valid"
    )


async def test_a_pool_that_is_created_again_gets_new_objects(appliance, store, api, namespace):
    first = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: first.key in g.endpoints)
        await store.delete(Pool, *first.key)
        second = await store.create(a_pool(namespace))
        for kind in KINDS:
            await becomes(
                api,
                at(kind, namespace),
                lambda doc: doc and [o["uid"] for o in doc["metadata"]["ownerReferences"]] == [second.uid],
            )


async def test_a_changed_spec_is_applied(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        await becomes(
            api, at("Deployment", namespace), lambda doc: doc and doc["status"].get("unavailableReplicas") == 2
        )
        spec = {"gateway": {"replicas": 3, "drainTimeout": "2h", "port": 443}}
        await api.patch(paths.custom(Pool.PLURAL, *pool.key), {"spec": spec})
        await wait_for_gateways(gateways, lambda g: g.endpoints[pool.key] == f"tcp://p.{namespace}.svc:443")
        deployment = (await api.get(at("Deployment", namespace)))["spec"]
        assert deployment["replicas"] == 3
        assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] == 7230


async def test_callers_get_the_load_balancers_address_and_the_certificate_has_it(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace, gateway={"serviceType": "LoadBalancer"}))
    async with running(appliance, namespace, allowed=Allowances(load_balancers=frozenset({namespace}))) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        assert gateways.endpoints[pool.key] == f"tcp://p.{namespace}.svc:1235", (
            "the address in the cluster, until there is a load balancer"
        )
        status = {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.7"}]}}}
        await api.patch(f"{at('Service', namespace)}/status", status)
        await wait_for_gateways(gateways, lambda g: g.endpoints[pool.key] == "tcp://192.0.2.7:1235")
        assert "192.0.2.7" in addresses(await api.get(at("Secret", namespace)))


async def test_certificates_are_renewed_before_they_expire(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
    first = certificate(await api.get(at("Secret", namespace)))
    later = first.not_valid_after_utc - timedelta(days=1)
    async with running(appliance, namespace, now=lambda: later) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints)
        assert gateways.reasons == ["CertificateRotated"]
    second = certificate(await api.get(at("Secret", namespace)))
    assert second.not_valid_after_utc > first.not_valid_after_utc + timedelta(days=100)
    ssl.create_default_context(
        cadata=base64.b64decode((await api.get(at("Secret", namespace)))["data"]["ca.crt"]).decode()
    )


async def test_missing_rights_in_a_namespace_are_reported_and_other_namespaces_are_served(
    appliance, store, api, system, namespace, barred
):
    poor = await store.create(a_pool(barred))
    fine = await store.create(a_pool(namespace))
    for doc in rights_to_see_pools(system, barred):
        await api.apply(installed_path(doc), doc)
    await until_allowed(appliance, paths.custom(Worker.PLURAL, barred))
    async with running(appliance, namespace, barred) as gateways:
        await wait_for_gateways(gateways, lambda g: fine.key in g.endpoints and poor.key in g.trouble)
        assert f"--pool-namespace {barred}" in gateways.trouble[poor.key]
        assert poor.key not in gateways.endpoints
        for doc in rights(system, barred):
            await api.apply(installed_path(doc), doc)
        await wait_for_gateways(gateways, lambda g: poor.key in g.endpoints and poor.key not in g.trouble)


async def test_an_error_of_the_cluster_is_reported_with_the_field(appliance, store, api, namespace):
    pool = await store.create(a_pool(namespace, gateway={"serviceType": "NodePort", "nodePort": 80}))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.trouble)
        assert "nodePort" in gateways.trouble[pool.key]
        await api.patch(paths.custom(Pool.PLURAL, *pool.key), {"spec": {"gateway": {"nodePort": None}}})
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints and pool.key not in g.trouble)


async def test_an_object_that_bkpool_did_not_make_is_left_alone(appliance, store, api, namespace):
    theirs = {"metadata": {"name": "p"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}
    await api.create(paths.core("services", namespace), theirs)
    pool = await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: pool.key in g.trouble)
        assert f"Service {namespace}/p" in gateways.trouble[pool.key]
        assert (await api.get(at("Service", namespace)))["spec"]["selector"] == {"app": "web"}
        await api.delete(at("Service", namespace))
        await wait_for_gateways(gateways, lambda g: pool.key in g.endpoints and pool.key not in g.trouble)


async def test_a_gateway_has_only_the_rights_that_it_needs(appliance, store, api, namespace):
    await store.create(a_pool(namespace))
    async with running(appliance, namespace) as gateways:
        await wait_for_gateways(gateways, lambda g: Key(namespace, "p") in g.endpoints)
    allowed = {
        ("list", "buildkitpools", ""),
        ("watch", "buildkitworkers", ""),
        ("update", "buildkitworkers/status", ""),
        ("get", "secrets", "p-gateway"),
        ("watch", "secrets", "p-gateway"),
    }
    refused = {
        ("update", "buildkitpools", ""),
        ("update", "buildkitworkers", ""),
        ("get", "secrets", "q-gateway"),
        ("list", "secrets", ""),
        ("list", "pods", ""),
        ("create", "pods", ""),
    }
    for verb, resource, name in allowed | refused:
        plural, _, sub = resource.partition("/")
        group = "buildkit.smrt-devops.net" if plural.startswith("buildkit") else ""
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {
                "user": f"system:serviceaccount:{namespace}:p-gateway",
                "resourceAttributes": {
                    "namespace": namespace,
                    "group": group,
                    "verb": verb,
                    "resource": plural,
                    "subresource": sub,
                    "name": name,
                },
            },
        }
        if (verb, resource, name) in allowed:
            async with asyncio.timeout(60):  # the API server learns of new rights a moment later
                while not await _allows(api, review):
                    pass
        else:
            assert not await _allows(api, review), (verb, resource, name)


async def _allows(api, review):
    answer = await api.create(paths.group("authorization.k8s.io/v1", "subjectaccessreviews"), review)
    return answer["status"]["allowed"]


async def test_the_appliance_reads_no_secret_of_another_namespace(appliance, system, barred):
    with pytest.raises(Forbidden):
        await appliance.list(paths.core("secrets"))
    with pytest.raises(Forbidden):
        await appliance.list(paths.core("secrets", barred))
    with pytest.raises(Forbidden):
        await appliance.get(paths.core("secrets", system, "of-somebody"))
    made = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bkpool-pki"}, "data": {}}
    async with asyncio.timeout(60):
        while True:
            try:
                await appliance.create(paths.core("secrets", system), made)
            except Conflict:
                break
            except Forbidden:  # the API server learns of new rights a moment later
                await asyncio.sleep(0.1)
    await appliance.get(paths.core("secrets", system, "bkpool-pki"))
    with pytest.raises(Forbidden):
        await appliance.delete(paths.core("secrets", system, "bkpool-pki"))
