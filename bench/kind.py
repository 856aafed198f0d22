"""The same table on kind: what bkpool adds to a pod, beside kubectl port-forward and buildx's kubernetes driver.

usage: nox -s bench_kind [-- --runs N] [-- --only PART]     It is no test: it judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.appliance import AT_ONCE, CONTEXT_MB, api_of, warm_allocate_on, with_context
from bench.kind_writes import beside_writes
from bench.table import spread
from bkpool.core.names import Slot
from bkpool.core.observation import DaemonState, Observation, Snapshot
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.reconcile.decide import decide
from bkpool.core.resource import Metadata
from bkpool.core.worker import Phase, new_worker
from bkpool.kube import ClusterAccess, KubeApi, paths
from bkpool.pki.bundle import ClusterSecrets
from bkpool.pki.pool_authority import PoolAuthorities
from bkpool.pki.worker_tls import worker_context
from bkpool.toolchain import Tool, Toolchain, default_cache
from bkpool.workers.pods import pod_view
from bkpool.workers.probe import probe_tls
from harness import Appliance, eventually, free_port
from kind_cluster import e2e_cluster
from worlds import SYSTEM, Pods

BARE = "bench-bare"


@contextmanager
def appliance(world: Pods, tools: dict[str, Path], spec: dict[str, Any]) -> Iterator[Appliance]:
    made = Appliance(Path(tempfile.mkdtemp(prefix="bkpool-bench-")), tools, world=world)
    try:
        made.up_with(spec)
        yield made
    finally:
        made.finish()
        shutil.rmtree(made.base)


def warm_allocate(world: Pods, tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures whole HTTP calls with warm workers, one at a time and 20 at once, and bare writes beside them."""
    with appliance(world, tools, {"scaling": {"min": AT_ONCE, "max": AT_ONCE}}) as running:
        eventually(lambda: running.pool()["idle"] == AT_ONCE, f"{AT_ONCE} workers", timeout=300)
        table = warm_allocate_on(running, runs)
        base, bearer = api_of(running)
        return table | asyncio.run(beside_writes(base, bearer, world.cluster.kubeconfig, max(runs, 5)))


def cold_allocate(world: Pods, tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures a call without a worker until its answer, and the same pod made by hand, alternately."""
    ours, bare = [], []
    with appliance(world, tools, {"scaling": {"max": 1, "scaleDownDelay": "0s"}}) as running:
        for number in range(max(runs, 5) + 1):
            begin = time.perf_counter()
            status, lease = running.http("POST", "/api/v1/workers/allocate", {"poolName": "default"})
            took = time.perf_counter() - begin
            assert status == 200, lease
            alone = asyncio.run(_pod_alone(world, lease["workerName"]))
            running.http("POST", "/api/v1/workers/release", {"token": lease["token"]})
            eventually(lambda: running.pool()["workers"] == 0 and not world.pods(), "the pod is gone")
            if number:
                ours.append(took * 1000)
                bare.append(alone * 1000)
    return {
        "the pod alone, created to first answer, ms": spread(bare),
        "cold allocate, ms": spread(ours),
        "cold allocate beyond the pod, ms": spread([a - b for a, b in zip(ours, bare, strict=True)]),
    }


async def _pod_alone(world: Pods, worker: str) -> float:
    """Copies the worker's pod on another host port. Returns the seconds from its creation to its first answer."""
    api = await KubeApi.connect(ClusterAccess(world.cluster.kubeconfig))
    try:
        found = await api.get(paths.core("secrets", SYSTEM, "bkpool-pki"))
        secrets = ClusterSecrets.of_data({k: base64.b64decode(v) for k, v in found["data"].items()})
        now = datetime.now(UTC)
        pod = await api.get(paths.core("pods", "default", worker))
        authority = PoolAuthorities(secrets.backend).current(pod_view.pool_of(pod))
        leaf = authority.issue_dialler("bench", now, now + timedelta(hours=1))
        context = worker_context(leaf.cert_pem, leaf.key_pem or b"", authority.cert_pem)
        uid = pod["metadata"]["annotations"]["buildkit.smrt-devops.net/worker-uid"]
        pod["metadata"] = {"name": BARE}
        del pod["status"]
        pod["spec"].pop("nodeName", None)
        port = world.cluster.worker_ports[-1]
        for container in pod["spec"]["containers"]:
            for published in container["ports"]:
                published["hostPort"] = port
        begin = time.perf_counter()
        await api.create(paths.core("pods", "default"), pod)
        while True:
            try:
                async with asyncio.timeout(1):
                    await probe_tls("127.0.0.1", port, context, uid)
                break
            except Exception:  # noqa: BLE001 - after any error it is asked again
                await asyncio.sleep(0.01)
        took = time.perf_counter() - begin
        await api.delete(paths.core("pods", "default", BARE), grace=1)
        return took
    finally:
        await api.close()


def build_four_ways(world: Pods, tools: dict[str, Path], runs: int) -> dict[str, Any]:
    """Measures a build with 200 MB of new context: gateway, the pod's port, kubectl port-forward, buildx's driver."""
    image = world.cluster.buildkit_image or "moby/buildkit:v0.34.2-rootless"
    port, forwarded = world.cluster.worker_ports[-1], free_port()
    took: dict[str, list[float]] = {"gateway": [], "direct": [], "forward": [], "driver": []}
    with appliance(world, tools, {"scaling": {"max": 1}}) as running, _plain_pod(world, image, port):
        running.extra_env["KUBECONFIG"] = str(world.cluster.kubeconfig)
        running.builder(running.allocate(), "gateway")
        running.buildx("create", "--name", "direct", "--driver", "remote", f"tcp://127.0.0.1:{port}").ok()
        running.buildx("create", "--name", "forward", "--driver", "remote", f"tcp://127.0.0.1:{forwarded}").ok()
        options = f"image={image},namespace=default,rootless=true"
        running.buildx("create", "--name", "driver", "--driver", "kubernetes", "--driver-opt", options).ok()
        forward = subprocess.Popen(
            ["kubectl", "--kubeconfig", world.cluster.kubeconfig, "port-forward", f"pod/{BARE}", f"{forwarded}:1234"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert forward.stdout is not None
        forward.stdout.readline()
        try:
            for number in range(max(runs, 5) + 1):
                for name, into in took.items():
                    with with_context(running.base) as context:
                        answer = running.build(name, context)
                    if answer.code:
                        print(f"{name} failed: {answer.text[-300:]}", file=sys.stderr)
                    elif number:
                        into.append(answer.seconds)
        finally:
            forward.kill()
            forward.communicate()
            running.buildx("rm", "driver")
    table = {f"build with {CONTEXT_MB} MB of context: {name}, s": spread(v) for name, v in took.items() if v}
    for name in ("gateway", "forward", "driver"):
        if took[name]:
            pairs = zip(took[name], took["direct"], strict=False)
            table[f"ratio {name} / direct"] = spread([a / b for a, b in pairs])
    return table


@contextmanager
def _plain_pod(world: Pods, image: str, port: int) -> Iterator[None]:
    """Runs a rootless buildkitd without TLS at a host port."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": BARE},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "buildkitd",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "args": ["--addr", "tcp://0.0.0.0:1234", "--oci-worker-no-process-sandbox"],
                    "ports": [{"containerPort": 1234, "hostPort": port}],
                    "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
                    "volumeMounts": [{"name": "state", "mountPath": "/home/user/.local/share/buildkit"}],
                }
            ],
            "volumes": [{"name": "state", "emptyDir": {}}],
        },
    }
    world.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    world.kubectl("wait", "--for=condition=Ready", f"pod/{BARE}", "--timeout=60s")
    yield
    world.kubectl("delete", "pod", BARE)


def a_thousand_workers(world: Pods, tools: dict[str, Path], _runs: int) -> dict[str, Any]:
    """Measures the memory of an appliance with 1,000 worker objects, and the time of one decision."""
    table: dict[str, Any] = {}
    with appliance(world, tools, {"scaling": {"max": 1}}) as running:
        before = _resident(running.described["pid"])
        running.kill()  # otherwise it would start a pod for each worker before its status is written
        asyncio.run(_stored(world, 1000))
        running.up()
        eventually(lambda: running.pool("many")["workers"] == 1000, "1,000 workers are known", timeout=300)
        table["resident memory with 0 / 1,000 workers, MiB"] = f"{before} / {_resident(running.described['pid'])}"
        running.kill()
    for count in (10, 100, 1000):
        table[f"one decision over {count} workers, ms"] = spread(_decisions(count))
    return table


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) // 1024


def _pool_of(count: int) -> Pool:
    return Pool(metadata=Metadata(name="many", uid="u"), spec=PoolSpec.model_validate({"scaling": {"max": count}}))


async def _stored(world: Pods, count: int) -> None:
    from bkpool.store.kubernetes import KubernetesStore  # noqa: PLC0415

    api = await KubeApi.connect(ClusterAccess(world.cluster.kubeconfig))
    store = KubernetesStore(api)
    pool = await store.create(_pool_of(count).but(metadata=Metadata(name="many")))
    later = datetime.now(UTC) + timedelta(hours=1)
    for begin in range(0, count, 50):
        made = [new_worker(Slot("default", "many", n), pool, None, {}) for n in range(begin, begin + 50)]
        status = {"failures": 5, "failed_at": later, "phase": Phase.FAILED, "message": "made for a benchmark"}
        await asyncio.gather(*(store.create(worker.with_status(**status)) for worker in made))
    await api.close()


def _decisions(count: int) -> list[float]:
    pool, now = _pool_of(count), datetime.now(UTC)
    workers, observed = [], {}
    for number in range(count):
        slot = Slot("default", "many", number)
        worker = new_worker(slot, pool, None, {})
        worker = worker.but(metadata=worker.metadata.but(uid=f"u{number}", creation_timestamp=now))
        workers.append(worker.with_status(phase=Phase.IDLE, endpoint="tcp://127.0.0.1:1"))
        observed[slot] = Observation(f"u{number}", DaemonState.READY, "tcp://127.0.0.1:1", None)
    snapshot = Snapshot(pool, tuple(workers), observed, {})
    return [_timed(lambda: decide(snapshot, now)) * 1000 for _ in range(20)]


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


PARTS = (warm_allocate, cold_allocate, build_four_ways, a_thousand_workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="interleaved runs of each figure")
    parser.add_argument("--only", choices=[part.__name__ for part in PARTS])
    options = parser.parse_args()
    tools = {str(tool): path for tool, path in Toolchain(default_cache()).ensure_all([Tool.BUILDX]).items()}
    print(f"load before: {os.getloadavg()[0]:.2f}, cores: {os.cpu_count()}", file=sys.stderr)
    with e2e_cluster() as cluster:
        world = Pods(cluster)
        for part in PARTS:
            if options.only in {None, part.__name__}:
                print(f"measuring: {(part.__doc__ or '').splitlines()[0]}", file=sys.stderr)
                for name, value in part(world, tools, options.runs).items():
                    print(f"{name:<60}  {value}", flush=True)


if __name__ == "__main__":
    main()
