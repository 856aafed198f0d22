"""An API server that is down, slow or loses its history, and an appliance that is killed between any two writes.

The appliance runs with --backend kubernetes behind a proxy in front of the real API server. It reaches pods at their
own addresses, for which these tests add a route to the node.
"""

from __future__ import annotations

import time

import pytest
from kind.faults import FaultProxy
from kind.pod_route import routed_pods

from harness import eventually, read_until, really_ran

DOWN = 60.0  # seconds


@pytest.fixture(scope="module")
def pod_addresses(world):
    with routed_pods(world):
        yield


class ProxiedWorld:
    """The world of an appliance that runs outside the cluster and reaches it through the proxy."""

    def __init__(self, world, proxy):
        self._world = world
        self._proxy = proxy

    def __getattr__(self, name):
        return getattr(self._world, name)

    def options(self):
        return ["--backend", "kubernetes", "--kubeconfig", str(self._proxy.kubeconfig), *self._world.image]


@pytest.fixture
def faulty(make_appliance, world, tmp_path, pod_addresses):
    with FaultProxy(world.cluster.kubeconfig, tmp_path) as proxy:
        appliance = make_appliance(world=ProxiedWorld(world, proxy))
        yield appliance, proxy
        proxy.up()
        proxy.stop_refusing()
        proxy.slow, proxy.frozen = 0.0, False
        appliance.stop()  # while it still reaches the API server


def ready(appliance):
    return appliance.http("GET", "/ready")[0] == 200


def test_builds_continue_while_the_api_server_is_down_for_a_minute(faulty, context):
    appliance, proxy = faulty
    appliance.up_with({"scaling": {"max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "down")
    appliance.build(builder, context.dockerfile("say before")).ok()
    running = appliance.start(
        *("docker", "buildx", "build", "--builder", builder, "--progress", "plain"),
        context.dockerfile("say begun", "sleep 50s"),
    )
    read_until(running, "sleeping")
    begun = time.monotonic()
    proxy.down()
    eventually(lambda: not ready(appliance), "/ready says no")
    refused = appliance.cli("allocate", "--wait", "2s")
    assert refused.code == 69, refused.text
    assert "Traceback" not in refused.text
    appliance.build(builder, context.dockerfile("say while-it-is-down")).ok()  # a registered lease continues
    out, _ = running.communicate(timeout=DOWN + 60)
    assert running.returncode == 0, out
    eventually(lambda: time.monotonic() - begun >= DOWN, "a minute has passed", timeout=DOWN + 5)
    proxy.up()
    eventually(lambda: ready(appliance), "the appliance recovers without help")
    appliance.build(appliance.builder(appliance.allocate(name="after"), "after"), context.path).ok()
    appliance.release(certificates.lease).ok()
    eventually(lambda: appliance.pool()["allocated"] == 1, "and catches up")


def test_conflicts_refusals_and_lost_answers_change_nothing_for_the_caller(faulty, context):
    appliance, proxy = faulty
    appliance.up_with({"scaling": {"min": 1, "max": 3}})
    appliance.all_idle()
    proxy.refuse(409, times=2, method="PUT", path="/buildkitworkers/")
    first = appliance.allocate(name="conflict")
    proxy.refuse(429, times=2, method="PUT", path="/buildkitworkers/")
    second = appliance.allocate(name="busy")
    assert first.lease["workerName"] != second.lease["workerName"]
    proxy.slow = 0.5
    third = appliance.allocate(name="slow")
    proxy.slow = 0.0
    names = {lease.lease["workerName"] for lease in (first, second, third)}
    assert len(names) == 3
    appliance.build(appliance.builder(third, "slow"), context.dockerfile("say well")).ok()


def test_the_appliance_recovers_from_lost_history_and_frozen_watches(faulty, world, context):
    appliance, proxy = faulty
    appliance.up_with({"scaling": {"max": 2}})
    certificates = appliance.allocate()
    proxy.expire_watches()
    appliance.build(appliance.builder(certificates, "expired"), context.dockerfile("say a")).ok()
    proxy.frozen = True
    appliance.release(certificates.lease).ok()  # the appliance knows its own writes at once
    proxy.frozen = False
    eventually(lambda: appliance.pool()["allocated"] == 0, "the release has been carried out")


# Each kind of write: the method and a part of its path. The proxy either carries it out and drops the answer, or
# refuses it. Then the appliance is killed.
WRITES = [
    ("POST", "/buildkitworkers"),
    ("PUT", "/buildkitworkers/default-worker-0"),
    ("PATCH", "/configmaps/default-buildkitd"),
    ("PATCH", "/secrets/default-worker-0"),
    ("POST", "/pods"),
    ("PATCH", "/pods/default-worker-0"),
    ("PUT", "/buildkitworkers/default-worker-0/status"),
    ("DELETE", "/pods/default-worker-0"),
]


@pytest.mark.parametrize("moment", ["lost", "refused"])
@pytest.mark.parametrize(("method", "path"), WRITES, ids=[f"{m}-{p.split('/')[-1]}" for m, p in WRITES])
def test_everything_converges_after_a_kill_at_any_write(faulty, world, context, method, path, moment):
    appliance, proxy = faulty
    owning = method == "PATCH" and "/pods/" in path
    appliance.up_with({"scaling": {"max": 1, "min": int(owning)}})
    if owning:  # an idle worker gets its owner
        appliance.all_idle()
    if method == "DELETE":
        appliance.release(appliance.allocate().lease).ok()
        appliance.all_idle()
    seen = len(proxy.seen)

    def reached():
        return any(line.startswith(method) and path in line for line in proxy.seen[seen:])

    if moment == "lost":
        proxy.lose(times=1000, method=method, path=path)
    else:
        proxy.refuse(503, times=1000, method=method, path=path)
    if method == "DELETE":
        world.kubectl(
            "patch", "buildkitpool", "default", "--type=merge", "-p", '{"spec":{"scaling":{"scaleDownDelay":"0s"}}}'
        )
    else:
        appliance.start(*appliance.program, "allocate", "--job-id", "job-1", "--wait", "2m")
    eventually(reached, f"{method} {path}")
    appliance.kill()
    proxy.stop_refusing()
    appliance.up()
    certificates = appliance.allocate("--job-id", "job-1")
    appliance.build(appliance.builder(certificates, "converged"), context.dockerfile("say converged")).ok()
    assert len(appliance.workers()) == 1, "no second pod"
    assert len(world.objects("buildkitworkers", "-A")) == 1, "no worker is orphaned"
    secrets = world.objects("secrets", "-A", "-l", "app.kubernetes.io/managed-by=bkpool")
    assert sum(s["metadata"]["name"] == "bkpool-pki" for s in secrets) == 1
    assert really_ran(
        appliance.build(appliance.builder(certificates, "c2"), context.dockerfile("say once-more")).ok(), "once-more"
    )
