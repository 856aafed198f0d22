"""The appliance on kind, where others can change its objects: users with kubectl, and a second appliance."""

from __future__ import annotations

import json
import threading

from bkpool.core.names import FINALIZER
from harness import WAIT_TIMEOUT, Certificates, eventually, read_until, really_ran

LOCAL = {"cache": {"backends": [{"type": "local", "local": {"size": "1Gi"}}]}}


def build(appliance, builder, path):
    return appliance.start("docker", "buildx", "build", "--builder", builder, "--progress", "plain", path)


def worker_of(world, name="default-worker-0"):
    return json.loads(world.kubectl("get", "buildkitworker", name, "-o", "json"))


# --- what kubectl shows ---------------------------------------------------------------------------------------------


def test_kubectl_shows_pools_workers_and_events(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 4}, "tls": {"enabled": True}, "gateway": {"replicas": 3}})
    appliance.all_idle()
    lease = appliance.allocate("--job-id", "job-7").lease
    header, row = world.kubectl("get", "buildkitpools").splitlines()
    assert " ".join(header.split()) == "NAME PHASE WORKERS READY IDLE ALLOCATED CONNECTIONS ENDPOINT AGE"
    assert row.split()[1] == "Ready"
    eventually(lambda: "job-7" in world.kubectl("get", "bkworker"), "the job is shown")
    header = world.kubectl("get", "bkworker").splitlines()[0]
    assert " ".join(header.split()) == "NAME POOL PHASE POD JOB EXPIRES AGE"
    body = appliance.pool()["conditions"]
    ignored = next(c["message"] for c in body if c["type"] == "IgnoredFields")
    assert ignored == "spec.gateway.replicas, spec.tls"
    assert worker_of(world, lease["workerName"])["metadata"]["finalizers"] == [FINALIZER]
    appliance.release(lease).ok()
    eventually(
        lambda: not worker_of(world, lease["workerName"])["metadata"].get("finalizers"), "the finalizer is removed"
    )
    events = eventually(
        lambda: (body := world.kubectl("get", "events", "-n", "default")) and "Released" in body and body, "events"
    )
    assert "Allocated" in events
    assert "ScaledUp" in events


def test_a_maximum_beyond_the_host_ports_is_a_condition_of_the_pool(make_appliance, world):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1000}})
    body = eventually(
        lambda: [c for c in appliance.pool()["conditions"] if c["type"] == "Capacity" and c["status"] == "False"],
        "the condition",
    )
    assert "1000" in body[0]["message"]
    assert "kind-config.yaml" in body[0]["message"]


def test_a_waiting_caller_gets_the_error_of_the_image_pull(make_appliance):
    appliance = make_appliance()
    appliance.up_with({"buildkitImage": "registry.invalid/no/such:1"})
    answer = appliance.cli("allocate", "--wait", "15s")
    assert answer.code != 0
    assert "registry.invalid/no/such:1" in answer.err
    assert "pulled" in answer.err


# --- a spec that changes while workers run -------------------------------------------------------------------------


def test_a_changed_spec_reaches_an_idle_pod_and_a_leased_one_after_its_lease(make_appliance, world):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    appliance.all_idle()
    held = appliance.allocate()
    eventually(lambda: appliance.pool()["idle"] == 1, "the floor is filled")
    before = {name: pod_uid(world, name) for name in ("default-worker-0", "default-worker-1")}
    assert worker_of(world)["status"]["specDigest"]

    patch(world, {"spec": {"cache": {"gc": {"keepStorage": "3GB"}}}})
    idle = eventually(lambda: replaced(world, "default-worker-1", before), "the idle pod is another one")
    toml = "cat /etc/bkpool/config/buildkitd.toml"
    assert "3GB" in world.kubectl("exec", idle, "--", "sh", "-c", toml)
    assert pod_uid(world, "default-worker-0") == before["default-worker-0"], "a lease keeps its pod"
    appliance.release(held.lease).ok()
    eventually(lambda: replaced(world, "default-worker-0", before), "the leased pod follows")

    image = world.kubectl("get", "pod", idle, "-o", "jsonpath={.spec.containers[0].image}")
    before = {idle: pod_uid(world, idle)}
    patch(world, {"spec": {"buildkitImage": f"docker.io/{image}" if "docker.io" not in image else image[10:]}})
    eventually(lambda: replaced(world, idle, before), "the same image by another name is another pod")
    patch(world, {"spec": {"scaling": {"max": 3}}})
    before = {idle: pod_uid(world, idle)}
    eventually(lambda: appliance.pool()["max"] == 3, "the maximum is known")
    assert pod_uid(world, idle) == before[idle], "the size of the pool replaces nothing"

    refused = appliance.cli("pool", "delete", "default")
    assert refused.code != 0
    assert "kubectl -n default delete buildkitpool default" in refused.err


def patch(world, change):
    world.kubectl("patch", "buildkitpool", "default", "--type=merge", "-p", json.dumps(change))


def pod_uid(world, name):
    return world.kubectl("get", "pod", name, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")


def replaced(world, name, before):
    """The name, if another pod has it and that is ready; else an empty text."""
    uid = pod_uid(world, name)
    ready = uid and uid != before[name] and worker_of(world, name)["status"]["phase"] == "Idle"
    return name if ready and worker_of(world, name)["status"].get("endpoint") else ""


# --- objects that others delete -------------------------------------------------------------------------------------


def test_a_deleted_pod_is_replaced_and_the_lease_continues(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}, **LOCAL})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "pod")
    appliance.build(builder, context.dockerfile("say kept")).ok()
    before = appliance.workers()
    world.kubectl("delete", "pod", "default-worker-0", "--grace-period=1")
    again = appliance.build(builder, context.path).ok()
    assert not really_ran(again, "kept"), "the cache is on a volume"
    assert appliance.workers() != before


def test_a_deleted_secret_is_created_again(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    certificates = appliance.allocate()
    world.kubectl("delete", "secret", "default-worker-0")
    appliance.build(appliance.builder(certificates, "secret"), context.dockerfile("say a")).ok()
    world.kubectl("delete", "pod", "default-worker-0", "--grace-period=1")  # a new pod needs the Secret again
    appliance.build(appliance.builder(certificates, "secret2"), context.dockerfile("say b")).ok()


def test_a_deleted_worker_object_ends_its_lease_with_the_reason(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "object")
    appliance.build(builder, context.dockerfile("say a")).ok()
    world.kubectl("delete", "buildkitworker", "default-worker-0", "--wait=false")
    refused = eventually(lambda: (a := appliance.build(builder, context.path)).code and a, "the build is refused")
    assert "deleted" in refused.text or "no lease has the token" in refused.text
    eventually(lambda: not appliance.workers(), "the pod is removed")
    appliance.build(appliance.builder(appliance.allocate(name="next"), "next"), context.path).ok()


def test_a_pool_deleted_with_a_lease_lets_the_build_finish_and_can_be_created_again(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 2}})
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "pool")
    running = build(appliance, builder, context.dockerfile("say begun", "sleep 6s"))
    read_until(running, "sleeping")
    world.kubectl("delete", "buildkitpool", "default", "--wait=false")
    out, _ = running.communicate(timeout=WAIT_TIMEOUT)
    assert running.returncode == 0, out
    eventually(lambda: not world.objects("buildkitworkers", "-A"), "its workers are removed", timeout=240)
    eventually(lambda: not appliance.workers(), "and their pods")
    world.kubectl("apply", "-f", str(appliance.base / "objects.yaml"))
    eventually(lambda: appliance.http("GET", "/api/v1/pools/default")[0] == 200, "the pool exists again")
    appliance.build(appliance.builder(appliance.allocate(name="again"), "again"), context.path).ok()


def test_a_lowered_maximum_removes_idle_workers_and_keeps_leased_ones(make_appliance, world):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 3}})
    leases = [appliance.allocate(name=f"c{number}").lease for number in range(2)]
    patch = '{"spec":{"scaling":{"min":0,"max":1}}}'
    world.kubectl("patch", "buildkitpool", "default", "--type=merge", "-p", patch)
    eventually(lambda: appliance.pool()["workers"] == 2, "only the leased ones are left")
    for lease in leases:
        assert appliance.http("POST", "/api/v1/workers/lookup", {"token": lease["token"]})[0] == 200
        appliance.release(lease).ok()
    eventually(lambda: appliance.pool()["workers"] <= 1, "the maximum is kept")


def test_invalid_objects_do_not_block_others(make_appliance, world, context):
    """The pool has max -1. It is stored with an older definition, whose schema allows that."""
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    crd = json.loads(world.kubectl("get", "crd", "buildkitpools.buildkit.smrt-devops.net", "-o", "json"))
    loose = json.loads(json.dumps(crd))
    loose["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    absurd = appliance.base / "absurd.json"
    pool = json.loads((appliance.base / "objects.yaml").read_text())
    absurd.write_text(
        json.dumps({**pool, "metadata": {"name": "absurd"}, "spec": {"scaling": {"max": -1, "min": "many"}}})
    )
    big = appliance.base / "big.json"
    big.write_text(
        json.dumps({**pool, "metadata": {"name": "big", "annotations": {"note": "x" * 250_000}}, "spec": {}})
    )
    definition = appliance.base / "crd.json"
    try:
        definition.write_text(json.dumps({**loose, "status": {}}))
        world.kubectl("replace", "-f", str(definition))
        eventually(lambda: "created" in world.kubectl("create", "-f", str(absurd), check=False), "the absurd pool")
    finally:
        del crd["metadata"]["resourceVersion"]
        definition.write_text(json.dumps({**crd, "status": {}}))
        world.kubectl("replace", "-f", str(definition))
    world.kubectl("create", "-f", str(big))
    certificates = appliance.allocate()
    appliance.build(appliance.builder(certificates, "absurd"), context.dockerfile("say well")).ok()
    eventually(lambda: "big" in [p["name"] for p in appliance.http("GET", "/api/v1/pools")[1]["pools"]], "big")
    appliance.kill()
    appliance.up()  # the list at the start contains it as well
    appliance.build(appliance.builder(certificates, "absurd2"), context.dockerfile("say well again")).ok()
    assert "absurd" in appliance.log


# --- a second appliance ---------------------------------------------------------------------------------------------


def test_two_appliances_that_start_at_once_share_one_authority(make_appliance, world, context):
    world.kubectl("-n", "buildkit-system", "delete", "secret", "bkpool-pki", "--ignore-not-found")
    both = [make_appliance("one"), make_appliance("two")]
    threads = [threading.Thread(target=appliance.up) for appliance in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = both[0].allocate()
    second = both[1].allocate()
    assert first.lease["caCert"] == second.lease["caCert"]
    assert first.lease["workerName"] != second.lease["workerName"]
    crossed = Certificates(first.directory, first.lease)  # a lease from one appliance, used at the other
    both[1].build(both[1].builder(crossed, "crossed"), context.dockerfile("say crossed")).ok()
    for appliance in both:
        appliance.down("--now").ok()


def test_a_missing_authority_is_an_error_while_there_are_leases(make_appliance, world):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"max": 1}})
    appliance.allocate()
    kept = json.loads(world.kubectl("-n", "buildkit-system", "get", "secret", "bkpool-pki", "-o", "json"))
    appliance.kill()
    world.kubectl("-n", "buildkit-system", "delete", "secret", "bkpool-pki")
    answer = appliance.cli("up", "-d", *appliance.world.options())
    assert answer.code == 78, answer.text
    assert "bkpool-pki" in answer.err
    for field in ("uid", "resourceVersion", "creationTimestamp"):
        kept["metadata"].pop(field, None)
    file = appliance.base / "kept.json"
    file.write_text(json.dumps(kept))
    world.kubectl("create", "-f", str(file))
    appliance.up()
