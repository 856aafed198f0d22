"""The pods of an untrusted pool: a NetworkPolicy limits what they reach, each lease has a new pod, and pods have no
credentials of the cluster.

The network plugin enforces policies. That is tested with kind's default plugin (kindnet). The CNI of e2e/airgap does
not enforce them.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from kind.test_pods import BUILD, WaitingReports, a_pool, in_pod, make_runtime, pod_of, runtime, slot  # noqa: F401 - fixtures

from bkpool.core.errors import NotFound, WorkerFailed
from bkpool.kube import paths
from bkpool.workers.pods.egress import egress_key, egress_policy
from harness import eventually

NETWORKING = "networking.k8s.io/v1"


async def policy_of(api, pool):
    return await api.get(paths.group(NETWORKING, "networkpolicies", *egress_key(pool)))


async def test_the_policy_exists_before_the_pod_and_follows_the_spec(runtime, slot, api):  # noqa: F811
    untrusted = a_pool(slot.namespace, untrusted=True)
    await runtime.daemons.start(slot, "uid-1", None, untrusted, WaitingReports())
    made, pod = await policy_of(api, untrusted), await pod_of(api, slot)
    assert made["spec"] == egress_policy(untrusted)["spec"]
    assert int(made["metadata"]["resourceVersion"]) < int(pod["metadata"]["resourceVersion"])
    assert made["metadata"]["creationTimestamp"] <= pod["metadata"]["creationTimestamp"]
    selected = made["spec"]["podSelector"]["matchLabels"]
    assert selected.items() <= pod["metadata"]["labels"].items()

    listed = a_pool(
        slot.namespace, untrusted=True, networking={"egress": {"policy": "listed", "allowedCIDRs": ["10.9.0.1/16"]}}
    )
    await runtime.daemons.follow(listed)
    assert (await policy_of(api, listed))["spec"] == egress_policy(listed)["spec"]
    for _ in range(2):
        await runtime.daemons.follow(a_pool(slot.namespace))
        with pytest.raises(NotFound):
            await policy_of(api, listed)
    await runtime.daemons.follow(listed)
    assert (await policy_of(api, listed))["metadata"]["labels"]


async def test_a_policy_that_bkpool_did_not_make_is_left_alone(runtime, slot, api):  # noqa: F811
    pool = a_pool(slot.namespace, untrusted=True)
    body = {"metadata": {"name": egress_key(pool).name}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
    await api.create(paths.group(NETWORKING, "networkpolicies", slot.namespace), body)
    for other in (pool, a_pool(slot.namespace)):
        with pytest.raises(WorkerFailed, match=r"NetworkPolicy .*: another object has this name"):
            await runtime.daemons.start(slot, "uid-1", None, other, WaitingReports())
    assert (await policy_of(api, pool))["spec"]["policyTypes"] == ["Ingress"]
    assert runtime.daemons.observe() == {}


async def test_an_untrusted_pod_builds_and_has_no_credentials_of_the_cluster(runtime, slot, kubectl):  # noqa: F811
    await runtime.daemons.start(slot, "uid-1", "lease", a_pool(slot.namespace, untrusted=True), WaitingReports())
    assert "buildctl github.com/moby/buildkit" in await in_pod(kubectl, slot, BUILD)
    assert "absent" in await in_pod(kubectl, slot, "ls /var/run/secrets/kubernetes.io 2>&1 || echo absent")


async def test_private_addresses_are_out_of_reach_where_policies_are_enforced(runtime, slot, kubectl, cluster):  # noqa: F811
    """It connects to the API server from a pool without limits and from one with limits."""
    server = json.loads(kubectl("get", "endpointslices", "-n", "default", "kubernetes", "-o", "json"))
    host, port = server["endpoints"][0]["addresses"][0], server["ports"][0]["port"]
    attempt = f"buildctl --timeout 5 --addr tcp://{host}:{port} debug workers 2>&1; true"
    await runtime.daemons.start(slot, "uid-1", None, a_pool(slot.namespace), WaitingReports())
    opened = await in_pod(kubectl, slot, attempt)
    await runtime.daemons.follow(a_pool(slot.namespace, untrusted=True))
    fenced = await in_pod(kubectl, slot, attempt)
    assert "connection refused" not in opened
    if enforced(kubectl):
        async with asyncio.timeout(60):  # the plugin learns of the policy a moment later
            while fenced == opened:
                fenced = await in_pod(kubectl, slot, attempt)
    else:
        pytest.skip(f"this cluster's network plugin enforces no NetworkPolicy: {opened!r}, {fenced!r}")


def enforced(kubectl):
    return "kindnet" in kubectl("get", "daemonsets", "-n", "kube-system")


def test_each_lease_has_a_new_pod(make_appliance, world, context):
    appliance = make_appliance()
    appliance.up_with({"untrusted": True, "scaling": {"max": 1}, "cache": {"backends": [{"type": "local"}]}})
    pods = []
    for number in range(2):
        certificates = appliance.allocate(name=f"lease-{number}")
        pods += appliance.workers()
        built = appliance.build(appliance.builder(certificates, f"b-{number}"), context.dockerfile("say ran"))
        assert "ran" in built.ok().text
        assert "CACHED" not in built.text
        appliance.release(certificates.lease).ok()
        before = pods[-1]
        eventually(lambda before=before: before not in appliance.workers(), "the pod of the lease is gone")
    assert len({uid for _, uid in pods}) == 2
    assert {name for name, _ in pods} == {"default-worker-0"}
    assert json.loads(world.kubectl("get", "pvc", "-n", "default", "-o", "json"))["items"] == []
    policy = json.loads(world.kubectl("get", "networkpolicy", "-n", "default", "default-egress", "-o", "json"))
    assert policy["metadata"]["ownerReferences"][0]["kind"] == "BuildKitPool"


def test_existing_pods_follow_a_changed_spec(make_appliance, world):
    appliance = make_appliance()
    appliance.up_with({"scaling": {"min": 1, "max": 1}})
    appliance.all_idle()
    before = appliance.workers()
    patch = json.dumps({"spec": {"networking": {"egress": {"policy": "public"}}}})
    world.kubectl("patch", "buildkitpool", "default", "--type=merge", "-p", patch)
    eventually(lambda: "default-egress" in world.kubectl("get", "networkpolicy"), "the policy is made")
    world.kubectl("patch", "buildkitpool", "default", "--type=merge", "-p", patch.replace("public", "open"))
    eventually(lambda: "default-egress" not in world.kubectl("get", "networkpolicy"), "the policy is gone")
    assert appliance.workers() == before
