"""Workers as pods of a real cluster: the objects of a start, the owners of caches, and the messages to users."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import Conflict, Unavailable, WorkerFailed
from bkpool.core.names import (
    ANNOTATION_CACHE_OWNER,
    ANNOTATION_ISOLATION,
    ANNOTATION_WORKER_UID,
    LABEL_LEASED,
    Key,
    Slot,
)
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.kube import Doc, KubeApi, paths
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.worker_tls import worker_context
from bkpool.workers import DaemonState
from bkpool.workers.pods import pod_spec, pod_view
from bkpool.workers.pods.runtime import Deadlines, PodRuntime
from bkpool.workers.probe import probe_tls
from kind_cluster import E2eCluster, Kubectl

NOW = datetime.now(UTC)
MASTER = Authority.create(NOW)
AUTHORITIES = PoolAuthorities(MASTER)
LOCAL = {"backends": [{"type": "local", "local": {"size": "64Mi"}}]}

Make = Callable[..., Awaitable[PodRuntime]]


def backend(namespace: str) -> Authority:
    """Returns the CA of the workers of the pool in a namespace."""
    return AUTHORITIES.current(Key(namespace, "p"))


def dialler(namespace: str, authority: Authority | None = None) -> ssl.SSLContext:
    leaf = (authority or backend(namespace)).issue_dialler("test", NOW, NOW + timedelta(hours=1))
    return worker_context(leaf.cert_pem, leaf.key_pem, backend(namespace).cert_pem)


def a_pool(namespace: str, isolation: str = "rootless", **spec: object) -> Pool:
    """Returns a pool that is not stored. Otherwise its objects could be garbage-collected during a test."""
    metadata = Metadata(name="p", namespace=namespace, annotations={ANNOTATION_ISOLATION: isolation})
    return Pool(metadata=metadata, spec=PoolSpec.model_validate(spec))


class WaitingReports(list[str]):
    async def __call__(self, message: str) -> None:
        self.append(message)


@pytest.fixture
def slot(namespace: str) -> Slot:
    return Slot(namespace, "p", 0)


@pytest.fixture
async def make_runtime(api: KubeApi, cluster: E2eCluster, namespace: str) -> AsyncIterator[Make]:
    made: list[PodRuntime] = []

    async def make(**options: object) -> PodRuntime:
        given = {"image": cluster.buildkit_image, "host_ports": cluster.worker_ports, **options}
        runtime = PodRuntime(api, authorities=AUTHORITIES, namespaces=[namespace], **given)
        made.append(runtime)
        await runtime.adopt()
        return runtime

    yield make
    try:
        if made:  # the ports are to be free for the next test
            await asyncio.gather(*(made[-1].daemons.stop(slot) for slot in made[-1].daemons.observe()))
    finally:
        for runtime in made:
            await runtime.close(stop_workers=True)


@pytest.fixture
async def runtime(make_runtime: Make) -> PodRuntime:
    return await make_runtime()


async def pod_of(api: KubeApi, slot: Slot) -> Doc:
    return await api.get(paths.core("pods", *slot.worker))


async def uids(api: KubeApi, namespace: str, plural: str = "pods") -> set[str]:
    docs, _ = await api.list(paths.core(plural, namespace), labelSelector=pod_spec.SELECTOR)
    return {doc["metadata"]["uid"] for doc in docs}


async def seen(runtime: PodRuntime, condition: Callable[[], object], seconds: float = 90) -> None:
    """Waits for a change after which the condition is true."""
    changed = asyncio.Event()
    runtime.daemons.on_change(lambda _slot: changed.set())
    async with asyncio.timeout(seconds):
        while not condition():
            await changed.wait()
            changed.clear()


async def in_pod(kubectl: Kubectl, slot: Slot, script: str) -> str:
    return await asyncio.to_thread(kubectl, "exec", "-n", slot.namespace, slot.worker.name, "--", "sh", "-c", script)


def address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


# --- up and down ----------------------------------------------------------------------------------------------------

BUILD = r"""
cd /dev/shm
printf 'FROM scratch\nCOPY buildctl /b\nRUN ["/b", "--version"]\n' >Dockerfile
buildctl build --progress plain --frontend dockerfile.v0 --local dockerfile=. --local context=/usr/bin 2>&1
"""


async def test_a_pod_builds_in_every_isolation(runtime, slot, kubectl, api):
    async def run(number: int, isolation: str) -> None:
        place, reports = slot._replace(number=number), WaitingReports()
        endpoint = await runtime.daemons.start(place, "uid-1", "anna", a_pool(slot.namespace, isolation), reports)
        assert reports == [] or reports[-1] == "", "a slow start is reported, and so is its end"
        await probe_tls(*address(endpoint), dialler(slot.namespace), "uid-1")
        output = await in_pod(kubectl, place, BUILD)
        assert "buildctl github.com/moby/buildkit" in output  # what the RUN step says

    able = await has_user_namespaces(api)
    possible = [one for one in pod_spec.Isolation if able or one is not pod_spec.Isolation.USERNS]
    await asyncio.gather(*(run(number, isolation) for number, isolation in enumerate(possible)))


async def test_a_node_that_cannot_make_user_namespaces_gets_no_privileged_pod_and_says_why(make_runtime, slot, api):
    if await has_user_namespaces(api):
        pytest.skip("this node can make them; the test above builds in one")
    runtime = await make_runtime(deadlines=Deadlines(creating=20))
    with pytest.raises(WorkerFailed, match="user namespaces"):
        await runtime.daemons.start(slot, "uid-1", "anna", a_pool(slot.namespace, "userns"), WaitingReports())


async def has_user_namespaces(api: KubeApi) -> bool:
    """Whether the container runtime of the node makes user namespaces for pods."""
    [node], _ = await api.list(paths.core("nodes"))
    return any(handler["features"].get("userNamespaces") for handler in node["status"].get("runtimeHandlers", ()))


async def test_a_second_start_makes_no_second_pod_and_a_stop_leaves_nothing(runtime, slot, api, namespace):
    pool = a_pool(namespace)
    endpoint = await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    first = await uids(api, namespace)
    assert await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports()) == endpoint
    assert await runtime.daemons.start(slot, "uid-1", None, pool, WaitingReports()) == endpoint
    assert await uids(api, namespace) == first
    observed = runtime.daemons.observe()[slot]
    assert (observed.worker_uid, observed.state, observed.endpoint) == ("uid-1", DaemonState.READY, endpoint)
    assert (observed.cache_owner, observed.ephemeral_cache, observed.protected) == ("anna", True, True)
    assert (observed.pod_name, runtime.caches.owners()) == (slot.worker.name, {})

    await runtime.daemons.stop(slot)
    assert runtime.daemons.observe() == {}
    assert await uids(api, namespace) == await uids(api, namespace, "secrets") == set()
    await runtime.daemons.stop(slot)  # nothing there: nothing happens


async def test_the_next_runtime_adopts_the_ready_pod(make_runtime, runtime, slot):
    endpoint = await runtime.daemons.start(slot, "uid-1", "anna", a_pool(slot.namespace), WaitingReports())
    await runtime.close(stop_workers=True)
    after = await make_runtime()
    assert after.daemons.observe()[slot] == runtime.daemons.observe()[slot]
    assert after.daemons.observe()[slot].endpoint == endpoint


# --- owners of caches -----------------------------------------------------------------------------------------------


async def test_an_unused_pod_gets_one_owner_and_never_another(runtime, slot, api, namespace):
    pool = a_pool(namespace)
    await runtime.daemons.start(slot, "uid-1", None, pool, WaitingReports())
    assert (runtime.daemons.observe()[slot].cache_owner, runtime.daemons.observe()[slot].protected) == (None, False)
    await runtime.caches.own(slot, "anna")
    assert (runtime.daemons.observe()[slot].cache_owner, runtime.daemons.observe()[slot].protected) == ("anna", True)
    metadata = (await pod_of(api, slot))["metadata"]
    assert metadata["annotations"][ANNOTATION_CACHE_OWNER] == "anna"
    assert metadata["annotations"][pod_spec.ANNOTATION_EVICT] == "false"
    with pytest.raises(Conflict, match="another owner"):
        await runtime.caches.own(slot, "bert")

    await runtime.daemons.start(slot, "uid-1", "bert", pool, WaitingReports())
    after = (await pod_of(api, slot))["metadata"]
    assert after["uid"] != metadata["uid"]
    assert after["annotations"][ANNOTATION_CACHE_OWNER] == runtime.daemons.observe()[slot].cache_owner == "bert"


async def test_a_volume_outlives_its_pods_and_is_removed_for_another_owner(runtime, slot, api, namespace):
    pool = a_pool(namespace, cache=LOCAL)
    await runtime.daemons.start(slot, "uid-1", None, pool, WaitingReports())
    assert (runtime.caches.owners(), runtime.daemons.observe()[slot].ephemeral_cache) == ({slot: None}, False)
    await runtime.caches.own(slot, "anna")
    assert runtime.caches.owners() == {slot: "anna"}
    assert ANNOTATION_CACHE_OWNER not in (await pod_of(api, slot))["metadata"]["annotations"]
    await runtime.daemons.stop(slot)
    first = await uids(api, namespace, "persistentvolumeclaims")

    await runtime.daemons.start(slot, "uid-2", "anna", pool, WaitingReports())
    assert await uids(api, namespace, "persistentvolumeclaims") == first
    assert runtime.daemons.observe()[slot].cache_owner == "anna"
    await runtime.daemons.start(slot, "uid-3", "bert", pool, WaitingReports())
    assert not await uids(api, namespace, "persistentvolumeclaims") & first
    assert runtime.caches.owners() == {slot: "bert"}
    await runtime.caches.wipe(slot)
    assert runtime.caches.owners() == {}
    assert await uids(api, namespace, "persistentvolumeclaims") == set()


async def test_a_leased_worker_is_protected_from_eviction(runtime, slot, api):
    await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace), WaitingReports())
    for held in (True, False):
        await runtime.daemons.protect(slot, held=held)
        assert runtime.daemons.observe()[slot].protected is held
        metadata = (await pod_of(api, slot))["metadata"]
        assert metadata["labels"].get(LABEL_LEASED) == ("true" if held else None)
        assert metadata["annotations"][pod_spec.ANNOTATION_EVICT] == ("false" if held else "true")


# --- messages to users ----------------------------------------------------------------------------------------------


async def test_the_reason_that_a_pod_does_not_start_is_reported_at_once_and_fails_at_the_deadline(make_runtime, slot):
    runtime = await make_runtime(deadlines=Deadlines(scheduling=4, pulling=1))

    async def run(number: int, expected: str, field: str | None, **spec: object) -> None:
        messages = WaitingReports()
        with pytest.raises(WorkerFailed, match=expected) as failure:
            await runtime.daemons.start(
                slot._replace(number=number), "uid-1", None, a_pool(slot.namespace, **spec), messages
            )
        assert re.match(expected, messages[0])
        assert failure.value.field == field

    huge = {"buildkit": {"requests": {"cpu": "1000"}}}
    unscheduled = "waiting for a node: 0/1 nodes are available: 1 Insufficient cpu"
    unpulled = "the image localhost:1/none:1 cannot be pulled on node"
    unnamed = "spec.buildkitImage: 'NO IMAGE' is not the name of an image"
    await asyncio.gather(
        run(0, unscheduled, None, resources=huge),
        run(1, unpulled, "spec.buildkitImage", buildkit_image="localhost:1/none:1"),
        run(2, unnamed, "spec.buildkitImage", buildkit_image="NO IMAGE"),
    )
    await seen(runtime, lambda: not runtime.daemons.observe())


async def test_an_error_of_the_api_server_names_the_field_of_the_pool(runtime, slot, kubectl):
    limits = {"buildkit": {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}}
    with pytest.raises(WorkerFailed, match=r"^spec.resources.buildkit: the pod is not admitted") as failure:
        await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace, resources=limits), WaitingReports())
    assert "must be less than or equal to memory limit" in failure.value.message
    kubectl("label", "namespace", slot.namespace, "pod-security.kubernetes.io/enforce=baseline")
    with pytest.raises(WorkerFailed, match="violates PodSecurity") as failure:
        await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace), WaitingReports())
    assert ANNOTATION_ISOLATION in failure.value.hint

    wanted = pod_spec.PodRequest(slot, "uid-1", None, a_pool(slot.namespace, "baseline"), "an/image")
    assert "created" in kubectl("apply", "--dry-run=server", "-f", "-", stdin=json.dumps(pod_spec.pod(wanted)))


async def test_a_start_that_fails_reports_the_end_of_buildkitds_log(runtime, slot):
    with pytest.raises(WorkerFailed, match=r"exit code 1$") as failure:
        await runtime.daemons.start(
            slot,
            "uid-1",
            "anna",
            a_pool(slot.namespace, buildkit_config="debug = 3"),
            WaitingReports(),
        )
    assert "toml" in failure.value.log_tail


OOM_TRIES = 5
"""The kernel may kill a child of the container's first process. Then the first process ends with an exit code, and
the cluster does not know that memory was the reason."""


async def test_the_error_names_a_memory_limit_that_is_too_low(runtime, slot):
    limits = {"buildkit": {"limits": {"memory": "10Mi"}}}
    for _ in range(OOM_TRIES):
        with pytest.raises(WorkerFailed) as failure:
            await runtime.daemons.start(
                slot, "uid-1", None, a_pool(slot.namespace, resources=limits), WaitingReports()
            )
        if "OOMKilled" in failure.value.message:
            break
    assert "OOMKilled; the limit is 10Mi" in failure.value.message
    assert failure.value.field == "spec.resources.buildkit.limits.memory"


async def test_an_object_that_bkpool_did_not_make_is_left_alone(runtime, slot, api):
    body = {
        "metadata": {"name": slot.worker.name},
        "spec": {"containers": [{"name": "c", "image": "none"}], "schedulerName": "nobody"},
    }
    await api.create(paths.core("pods", slot.namespace), body)
    with pytest.raises(WorkerFailed, match="it is not bkpool's"):
        await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace), WaitingReports())
    assert ANNOTATION_WORKER_UID not in (await pod_of(api, slot))["metadata"].get("annotations", {})


# --- host ports -----------------------------------------------------------------------------------------------------


async def test_used_host_ports_are_skipped_and_it_is_an_error_if_none_is_left(make_runtime, slot, api, cluster):
    first, second = cluster.worker_ports[:2]
    blocker = {
        "metadata": {"name": "blocker"},
        "spec": {
            "containers": [
                {
                    "name": "c",
                    "image": cluster.buildkit_image or pod_spec.ROOTLESS_IMAGE,
                    "ports": [{"containerPort": 1, "hostPort": first}],
                }
            ]
        },
    }
    await api.create(paths.core("pods", slot.namespace), blocker)
    runtime = await make_runtime(host_ports=(first, second))
    assert runtime.daemons.capacity.workers == 2
    endpoint = await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace), WaitingReports())
    assert address(endpoint)[1] == second

    one = await make_runtime(host_ports=(second,))
    with pytest.raises(
        WorkerFailed, match=rf"all 1 host ports for workers \({second} to {second}\) are in use"
    ) as full:
        await one.daemons.start(slot._replace(number=1), "uid-2", None, a_pool(slot.namespace), WaitingReports())
    assert "kind-config.yaml" in full.value.hint


# --- pods that end --------------------------------------------------------------------------------------------------


async def test_a_pod_that_ends_is_observed_with_its_reason_and_started_again(runtime, slot, kubectl, api):
    pool = a_pool(slot.namespace)
    await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    before = (await pod_of(api, slot))["metadata"]["uid"]
    await in_pod(kubectl, slot, "kill -TERM 1")
    await seen(runtime, lambda: runtime.daemons.observe()[slot].state is DaemonState.EXITED)
    assert "buildkitd ended with exit code" in runtime.daemons.observe()[slot].message
    await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    assert runtime.daemons.observe()[slot].state is DaemonState.READY
    assert (await pod_of(api, slot))["metadata"]["uid"] != before


async def test_a_deleted_pod_ends_and_is_started_again(runtime, slot, kubectl):
    pool = a_pool(slot.namespace)
    await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    kubectl("delete", "pod", "-n", slot.namespace, slot.worker.name, "--wait=false")
    await seen(runtime, lambda: not runtime.daemons.observe())
    assert (await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())).startswith("tcp://")


async def test_a_deleted_pod_waits_for_its_connections(runtime, slot, kubectl):
    endpoint = await runtime.daemons.start(slot, "uid-1", "anna", a_pool(slot.namespace), WaitingReports())
    _, writer = await asyncio.open_connection(*address(endpoint), ssl=dialler(slot.namespace))
    kubectl("delete", "pod", "-n", slot.namespace, slot.worker.name, "--wait=false")
    async with asyncio.timeout(60):
        await runtime._slots.pods.until(slot.worker, pod_view.deleted)
    for _ in range(3):
        await probe_tls(*address(endpoint), dialler(slot.namespace), "uid-1")
        await in_pod(kubectl, slot, "sleep 1")  # longer than buildkitd takes to end
    assert runtime.daemons.observe()[slot].state is DaemonState.READY
    writer.transport.abort()
    await seen(runtime, lambda: not runtime.daemons.observe())


# --- identities -----------------------------------------------------------------------------------------------------


async def test_only_a_dialler_is_accepted_and_another_worker_is_detected(runtime, slot):
    place = address(await runtime.daemons.start(slot, "uid-1", "anna", a_pool(slot.namespace), WaitingReports()))
    clients, worker = Authority.create(NOW), backend(slot.namespace).issue_worker("uid-2", NOW)
    strangers = [
        dialler(slot.namespace, clients),  # a lease's certificate is of that authority too
        dialler(slot.namespace, backend("another")),  # the gateway of another pool
        dialler(slot.namespace, MASTER),
        worker_context(worker.cert_pem, worker.key_pem, backend(slot.namespace).cert_pem),
    ]
    for stranger in strangers:
        with pytest.raises(Unavailable, match=r"(?i)alert|certificate"):
            await probe_tls(*place, stranger, "uid-1")
    with pytest.raises(WorkerFailed, match="not the worker with uid uid-2") as wrong:
        await probe_tls(*place, dialler(slot.namespace), "uid-2")
    assert wrong.value.code == "WrongWorker"


# --- kill -9 --------------------------------------------------------------------------------------------------------

VICTIM = """
import asyncio, json, os, pathlib, signal, sys
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.kube import ClusterAccess, KubeApi
from bkpool.pki.authority import Authority
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.workers.pods.runtime import PodRuntime

given = json.load(sys.stdin)
real, left = KubeApi._request, 0

async def deadly(self, method, *args):
    global left
    answer = await real(self, method, *args)
    if method != "GET" and left:
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
    return answer

async def no_report(message):
    pass

async def main():
    global left
    KubeApi._request = deadly
    api = await KubeApi.connect(ClusterAccess(pathlib.Path(given["kubeconfig"])))
    authorities = PoolAuthorities(Authority(given["cert"].encode(), given["key"].encode()))
    pool = Pool.model_validate(given["pool"])
    slot = Slot(pool.key.namespace, "p", given["number"])
    runtime = PodRuntime(
        api,
        authorities=authorities,
        image=given["image"],
        host_ports=[given["port"]],
        namespaces=[slot.namespace],
    )
    await runtime.adopt()
    left = given["writes"] if given["what"] == "start" else 0
    await runtime.daemons.start(slot, "uid-1", None if given["what"] == "own" else "anna", pool, no_report)
    left = given["writes"]
    await (runtime.caches.own(slot, "anna") if given["what"] == "own" else runtime.caches.wipe(slot))

asyncio.run(main())
"""


def die(cluster: E2eCluster, pool: Pool, number: int, what: str, writes: int) -> None:
    """Runs a program on a slot. It kills itself after this number of writes to the API server."""
    given = {
        "kubeconfig": str(cluster.kubeconfig),
        "image": cluster.buildkit_image,
        "port": cluster.worker_ports[number],
        "number": number,
        "cert": MASTER.cert_pem.decode(),
        "key": MASTER.key_pem.decode(),
        "pool": pool.to_json(),
        "what": what,
        "writes": writes,
    }
    done = subprocess.run(
        [sys.executable, "-c", VICTIM],
        input=json.dumps(given),
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("cache", "crashes"),
    [
        # the configuration, the key and the pod are there; the pod is owned; the pod is to end
        ({}, [("start", 1), ("start", 2), ("start", 3), ("own", 1), ("wipe", 1)]),
        # the volume claim is there; it is owned, the pod not; the pod is to end, the key is gone, the claim is to go
        (LOCAL, [("start", 1), ("own", 1), ("wipe", 1), ("wipe", 2), ("wipe", 3)]),
    ],
    ids=["ephemeral", "volume"],
)
async def test_the_next_runtime_recovers_from_a_crash_after_any_write(
    make_runtime, slot, api, cluster, cache, crashes
):
    pool = a_pool(slot.namespace, cache=cache)
    deaths = [(slot._replace(number=number), *crash) for number, crash in enumerate(crashes)]
    await asyncio.gather(
        *(asyncio.to_thread(die, cluster, pool, dead.number, what, writes) for dead, what, writes in deaths)
    )
    runtime = await make_runtime()

    async def mend(dead: Slot, what: str) -> None:
        owner = "bert" if what == "wipe" else "anna"
        await runtime.daemons.start(dead, "uid-1", owner, pool, WaitingReports())
        observed = runtime.daemons.observe()[dead]
        assert (observed.state, observed.cache_owner, observed.protected) == (DaemonState.READY, owner, True)
        assert not cache or runtime.caches.owners()[dead] == owner

    await asyncio.gather(*(mend(dead, what) for dead, what, _ in deaths))
    counts = {"pods": len(deaths), "secrets": len(deaths), "persistentvolumeclaims": len(deaths) if cache else 0}
    for plural, count in counts.items():
        assert len(await uids(api, slot.namespace, plural)) == count
    await asyncio.gather(*(runtime.caches.wipe(dead) for dead, _, _ in deaths))
    for plural in counts:
        assert await uids(api, slot.namespace, plural) == set()


async def test_a_pod_that_hangs_is_noticed_goes_on_after_a_stall_and_can_be_ended(runtime, slot, kubectl, api):
    """The kernel accepts connections for a stopped process, so a TCP probe would say that all is well."""

    async def signal_buildkitd(name: str) -> None:
        script = (
            f"for p in /proc/[0-9]*; do read -r c <$p/comm; [ $c = buildkitd ] && kill -{name} ${{p#/proc/}}; done"
        )
        await in_pod(kubectl, slot, f"{script}; true")

    pool = a_pool(slot.namespace)
    await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    before = await uids(api, slot.namespace)
    await signal_buildkitd("STOP")
    assert not await runtime.daemons.answers(slot, "uid-1", fresh=False)
    assert runtime.daemons.observe()[slot].silence is not None
    await signal_buildkitd("CONT")
    assert await runtime.daemons.answers(slot, "uid-1", fresh=False)
    assert runtime.daemons.observe()[slot].silence is None
    await signal_buildkitd("STOP")
    await runtime.daemons.stop(slot, at_once=True)
    await runtime.daemons.start(slot, "uid-1", "anna", pool, WaitingReports())
    assert await runtime.daemons.answers(slot, "uid-1", fresh=False)
    assert not before & await uids(api, slot.namespace)
