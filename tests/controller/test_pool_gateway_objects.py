"""The documents of a pool's objects. The tests that apply them to a cluster are in e2e/kind."""

from dataclasses import replace

import pytest

from bkpool.controller.pool_documents import is_of_a_pool, path_of
from bkpool.controller.pool_gateway_objects import GatewayDefaults, pool_objects, secret
from bkpool.controller.pool_service import endpoint_of, node_address, outside_hosts
from bkpool.core.names import Key
from bkpool.core.pool import Pool

SETTING = GatewayDefaults("registry.example.com/bkpool:1", "buildkit-system", "buildkit-controller")


def pool(**spec):
    return Pool.model_validate({"metadata": {"name": "p", "namespace": "team", "uid": "uid-of-p"}, "spec": spec})


def made(kind, name=None, **spec):
    (doc,) = (
        doc
        for doc in pool_objects(pool(**spec), SETTING)
        if (doc["kind"], name or doc["metadata"]["name"]) == (kind, doc["metadata"]["name"])
    )
    return doc


def container(**spec):
    return made("Deployment", **spec)["spec"]["template"]["spec"]["containers"][0]


def service_with(ingress=(), node_port=None):
    return {"spec": {"ports": [{"nodePort": node_port}]}, "status": {"loadBalancer": {"ingress": list(ingress)}}}


def test_every_object_is_owned_by_its_pool_and_labelled():
    docs = [*pool_objects(pool(), SETTING), secret(pool(), {"tls.crt": "eA=="})]
    for doc in docs:
        metadata = doc["metadata"]
        assert metadata["namespace"] == "team"
        assert [owner["uid"] for owner in metadata["ownerReferences"]] == ["uid-of-p"]
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "bkpool"
        assert metadata["labels"]["buildkit.smrt-devops.net/pool"] == "p"
        assert metadata["labels"]["buildkit.smrt-devops.net/purpose"] == "gateway"
        assert "/namespaces/team/" in path_of(doc)
    assert len({path_of(doc) for doc in docs}) == len(docs)
    assert docs[0]["kind"] == "Service"
    assert docs[-2]["kind"] == "Deployment", "pods come last: what they need is there before"


@pytest.mark.parametrize(
    ("metadata", "ours"),
    [
        ({}, False),
        ({"labels": {"app.kubernetes.io/managed-by": "Helm"}}, False),
        ({"labels": {"app.kubernetes.io/managed-by": "bkpool"}}, True),
        ({"ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment"}]}, False),
        ({"ownerReferences": [{"apiVersion": "buildkit.smrt-devops.net/v1alpha1", "kind": "BuildKitPool"}]}, True),
    ],
)
def test_an_object_that_is_not_of_a_pool_is_recognized(metadata, ours):
    assert is_of_a_pool({"metadata": metadata}) == ours


def test_the_service_has_the_pools_name_and_selects_only_its_gateway():
    service = made("Service")
    assert service["metadata"]["name"] == "p"
    assert service["spec"]["type"] == "ClusterIP"
    assert service["spec"]["ports"] == [{"name": "gateway", "port": 1235, "targetPort": "gateway", "protocol": "TCP"}]
    labels = made("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["selector"]["buildkit.smrt-devops.net/purpose"] == "gateway"


def test_the_service_is_as_the_spec_says():
    spec = {
        "networking": {
            "serviceType": "NodePort",
            "port": 444,
            "annotations": {"a": "1", "b": "1"},
            "allowedCIDRs": ["10.0.0.0/8"],
            "external": {"hostname": "build.example.com", "annotations": {"b": "2"}},
        },
        "gateway": {"serviceType": "LoadBalancer", "port": 443, "nodePort": 30443, "loadBalancerClass": "inner"},
    }
    service = made("Service", **spec)
    assert service["metadata"]["annotations"] == {"a": "1", "b": "2"}
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["loadBalancerClass"] == "inner"
    assert service["spec"]["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
    assert (service["spec"]["ports"][0]["port"], service["spec"]["ports"][0]["nodePort"]) == (443, 30443)
    (clients, _metrics) = made("NetworkPolicy", "p-gateway", **spec)["spec"]["ingress"]
    assert "from" not in clients, "the load balancer limits it; its nodes have other addresses"


@pytest.mark.parametrize(("kind", "policy"), [("ClusterIP", None), ("NodePort", "Local")])
def test_allowed_networks_become_a_policy_unless_a_load_balancer_limits_them(kind, policy):
    spec = {"networking": {"serviceType": kind, "allowedCIDRs": ["10.0.0.0/8"]}}
    (clients, metrics) = made("NetworkPolicy", "p-gateway", **spec)["spec"]["ingress"]
    assert clients["from"] == [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    assert "from" not in metrics
    assert made("Service", **spec)["spec"].get("externalTrafficPolicy") == policy


@pytest.mark.parametrize(
    ("spec", "live", "node", "endpoint"),
    [
        ({}, None, None, "tcp://p.team.svc:1235"),
        ({"networking": {"port": 99}}, None, None, "tcp://p.team.svc:99"),
        ({"networking": {"external": {"hostname": "b.example.com"}}}, None, None, "tcp://b.example.com:1235"),
        (
            {"networking": {"external": {"hostname": "b.example.com", "enabled": False}}},
            None,
            None,
            "tcp://p.team.svc:1235",
        ),
        ({"gateway": {"serviceType": "LoadBalancer"}}, service_with(), "10.0.0.9", "tcp://p.team.svc:1235"),
        (
            {"gateway": {"serviceType": "LoadBalancer", "port": 443}},
            service_with([{"hostname": "lb.example.com", "ip": "192.0.2.1"}]),
            None,
            "tcp://lb.example.com:443",
        ),
        (
            {"gateway": {"serviceType": "LoadBalancer"}},
            service_with([{"ip": "2001:db8::1"}]),
            None,
            "tcp://[2001:db8::1]:1235",
        ),
        ({"gateway": {"serviceType": "NodePort"}}, service_with(node_port=31000), None, "tcp://p.team.svc:1235"),
        ({"gateway": {"serviceType": "NodePort"}}, service_with(node_port=31000), "10.0.0.9", "tcp://10.0.0.9:31000"),
        (
            {"gateway": {"serviceType": "NodePort"}, "networking": {"external": {"hostname": "b.example.com"}}},
            service_with(node_port=31000),
            "10.0.0.9",
            "tcp://b.example.com:31000",
        ),
    ],
)
def test_callers_get_an_endpoint_that_they_can_reach(spec, live, node, endpoint):
    asked = pool(**spec)
    assert endpoint_of(asked, live, outside_hosts(asked, live, node)) == endpoint


def test_all_names_that_callers_may_use_are_listed():
    spec = {"gateway": {"serviceType": "LoadBalancer"}, "networking": {"external": {"hostname": "b.example.com"}}}
    live = service_with([{"ip": "192.0.2.1"}, {"hostname": "lb.example.com"}])
    assert outside_hosts(pool(**spec), live, "10.0.0.9") == ["b.example.com", "192.0.2.1", "lb.example.com"]


def test_a_node_address_stays_while_that_node_runs_a_gateway():
    def pod(address, ready="True"):
        return {"metadata": {}, "status": {"hostIP": address, "conditions": [{"type": "Ready", "status": ready}]}}

    assert node_address([], None) is None
    assert node_address([pod("10.0.0.2"), pod("10.0.0.1")], None) == "10.0.0.1"
    assert node_address([pod("10.0.0.2"), pod("10.0.0.1")], "10.0.0.2") == "10.0.0.2"
    assert node_address([pod("10.0.0.2"), pod("10.0.0.1", "False")], "10.0.0.1") == "10.0.0.2"
    assert node_address([pod("10.0.0.1", "False")], "10.0.0.1") == "10.0.0.1", "better than none"


def test_gateways_drain_before_they_stop_and_a_rollout_never_reduces_them():
    doc = made("Deployment", gateway={"drainTimeout": "90m"})
    assert doc["spec"]["replicas"] == 2
    assert doc["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert doc["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 90 * 60 + 30
    assert "--drain-timeout=1h30m" in container(gateway={"drainTimeout": "90m"})["args"]
    assert made("Deployment", gateway={"replicas": 1})["spec"]["replicas"] == 1
    assert made("PodDisruptionBudget", "p-gateway")["spec"]["maxUnavailable"] == 1


def test_a_gateway_gets_its_pool_and_its_role_only():
    args = container()["args"]
    assert args[:4] == ["up", "--backend=kubernetes", "--roles=gateway", "--pool=team/p"]
    assert [entry["name"] for entry in container()["env"]][:2] == ["POD_NAME", "POD_NAMESPACE"]
    assert container()["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "metrics"}


@pytest.mark.parametrize(
    ("given", "image"),
    [
        (None, SETTING.image),
        ("registry.example.com/mine:2", "registry.example.com/mine:2"),
        ("ghcr.io/someone/buildkit-controller/gateway:latest", SETTING.image),
    ],
)
def test_the_image_is_bkpools_unless_the_pool_sets_a_compatible_one(given, image):
    assert container(**({"gatewayImage": given} if given else {}))["image"] == image


@pytest.mark.parametrize(
    ("given", "resources"),
    [
        ({}, {"requests": {"cpu": "100m", "memory": "128Mi"}}),
        ({"cpu": "500m"}, {"requests": {"memory": "128Mi"}, "limits": {"cpu": "500m"}}),
        (
            {"memory": "1Gi", "limits": {"memory": "2Gi"}, "requests": {"cpu": 1}},
            {"requests": {"cpu": 1}, "limits": {"memory": "2Gi"}},
        ),
    ],
)
def test_resources_are_used_as_given(given, resources):
    assert container(gateway={"resources": given})["resources"] == resources


def test_a_gateway_may_read_one_secret_and_write_only_registrations():
    rules = made("Role")["rules"]
    secrets = [rule for rule in rules if "secrets" in rule["resources"]]
    assert [rule["resourceNames"] for rule in secrets] == [["p-gateway"]]
    written = {(res, verb) for rule in rules for res in rule["resources"] for verb in rule["verbs"]}
    written = {(res, verb) for res, verb in written if verb not in {"get", "list", "watch"}}
    assert written == {
        ("buildkitworkers/status", "update"),
        ("buildkitworkers/status", "patch"),
        ("events", "create"),
    }
    (subject,) = made("RoleBinding")["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": "p-gateway", "namespace": "team"}


def test_a_gateway_may_write_its_heartbeat_only_where_the_controller_follows_it():
    """An earlier definition or right is missing, and to grant a right that one does not have is refused."""
    granted = [rule["resources"] for rule in made("Role")["rules"]]
    assert not [one for one in granted if "buildkitgateways" in str(one)]
    (role,) = (doc for doc in pool_objects(pool(), replace(SETTING, heartbeats=True)) if doc["kind"] == "Role")
    written = {(res, verb) for rule in role["rules"] for res in rule["resources"] for verb in rule["verbs"]}
    assert {(res, verb) for res, verb in written if res.startswith("buildkitgateways")} == {
        ("buildkitgateways", "get"),
        ("buildkitgateways", "create"),
        ("buildkitgateways/status", "update"),
    }


def test_only_gateways_and_the_appliance_may_reach_workers():
    policy = made("NetworkPolicy", "p-workers")["spec"]
    assert policy["podSelector"]["matchLabels"]["buildkit.smrt-devops.net/purpose"] == "worker"
    (rule,) = policy["ingress"]
    assert [port["port"] for port in rule["ports"]] == [1234]
    gateways, appliance = rule["from"]
    assert set(gateways) == {"podSelector"}, "of this namespace"
    assert appliance["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "buildkit-system"}
    assert appliance["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "buildkit-controller"}


def test_no_leased_worker_is_evicted():
    budget = made("PodDisruptionBudget", "p-leased")["spec"]
    assert budget["maxUnavailable"] == 0
    assert budget["selector"]["matchLabels"]["buildkit.smrt-devops.net/leased"] == "true"


def test_pools_of_the_same_name_share_no_object():
    other = pool().but(metadata=pool().metadata.but(namespace="other"))
    assert other.key == Key("other", "p")
    mine, theirs = ({path_of(doc) for doc in pool_objects(each, SETTING)} for each in (pool(), other))
    assert not mine & theirs
