"""What `bkpool manifests` prints: complete, the same each time, and without superfluous rights."""

import re
from functools import cache

import pytest
import yaml
from click.testing import CliRunner

from bkpool.appliance.backend import LEASE
from bkpool.appliance.kube_secrets import ADMIN, API_CA, PKI
from bkpool.cli import program
from bkpool.controller.pool_gateway_objects import GatewayDefaults, pool_objects
from bkpool.core.allowances import Allowances, read_allowances
from bkpool.core.errors import InvalidInput
from bkpool.core.pool import Pool
from bkpool.install.manifests import IMAGE, Install, render


def parsed(text):
    """Reads with libyaml: without it this module alone would take seconds."""
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


@cache
def documents(**options):
    return [doc for doc in parsed(render(Install(**options))) if doc]


def of_kind(docs, kind):
    return [doc for doc in docs if doc["kind"] == kind]


def rules(docs, kind, namespace=None):
    found = [doc for doc in of_kind(docs, kind) if doc["metadata"].get("namespace") == namespace]
    return [rule for doc in found for rule in doc["rules"]]


def allows(granted, group, resource, verb, name=None):
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and ("resourceNames" not in rule or name in rule["resourceNames"])
        for rule in granted
    )


def test_the_manifests_are_complete():
    kinds = [doc["kind"] for doc in documents(pool_namespaces=("a", "b"))]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "Namespace": 1,
        "ServiceAccount": 1,
        "ClusterRole": 1,
        "ClusterRoleBinding": 1,
        "Role": 3,
        "RoleBinding": 3,
        "Deployment": 1,
        "Service": 1,
        "PodDisruptionBudget": 1,
        "NetworkPolicy": 1,
        "CustomResourceDefinition": 4,
        "ValidatingAdmissionPolicy": 1,
        "ValidatingAdmissionPolicyBinding": 1,
        "PriorityLevelConfiguration": 1,
        "FlowSchema": 3,
    }


def test_the_same_options_give_the_same_text():
    assert render(Install()) == render(Install())
    assert "${" not in render(Install())


def test_every_option_has_an_effect():
    docs = documents(
        namespace="bk", replicas=3, image="registry.example.com:5000/bkpool@sha256:ab", pool_namespaces=("a",)
    )
    (deployment,) = of_kind(docs, "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert deployment["spec"]["replicas"] == 3
    assert container["image"] == "registry.example.com:5000/bkpool@sha256:ab"
    assert f"--image={container['image']}" in container["args"]
    assert "--namespace=bk" in container["args"]
    assert "--pool-namespace=a" in container["args"]
    namespaces = {doc["metadata"].get("namespace", "") for doc in docs}
    assert namespaces == {"", "bk", "a"}
    (policy,) = of_kind(docs, "NetworkPolicy")
    (callers,) = policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchExpressions"]
    assert callers["values"] == ["bk", "a"]
    for binding in [*of_kind(docs, "RoleBinding"), *of_kind(docs, "ClusterRoleBinding")]:
        assert [subject["namespace"] for subject in binding["subjects"]] == ["bk"]


def test_the_warning_about_plain_http_is_above_the_option():
    lines = [line.strip() for line in render(Install()).splitlines()]
    assert lines[lines.index("- --plain-http") - 1].startswith("#")


@pytest.mark.parametrize(("tls", "option", "scheme"), [(False, "--plain-http", None), (True, "--api-tls", "HTTPS")])
def test_the_kubelet_probes_with_the_scheme_of_the_api(tls, option, scheme):
    (deployment,) = of_kind(documents(api_tls=tls), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"--plain-http", "--api-tls"} & set(container["args"]) == {option}
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")]
    assert [probe.get("scheme") for probe in probes] == [scheme] * 3
    assert ("--api-tls" in render(Install(api_tls=tls)).splitlines()[0]) is tls


def test_the_only_right_in_the_whole_cluster_is_to_check_tokens():
    everywhere = rules(documents(), "ClusterRole")
    reviews = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    assert everywhere == [reviews]
    home = rules(documents(), "Role", "buildkit-system")
    assert allows(home, "", "secrets", "get", PKI)
    assert not allows(home, "", "secrets", "get", "another")
    assert allows(home, "", "secrets", "get", ADMIN)
    assert allows(home, "", "secrets", "get", API_CA)
    for verb in ("get", "update"):
        assert allows(home, "coordination.k8s.io", "leases", verb, LEASE)
        assert not allows(home, "coordination.k8s.io", "leases", verb, "another")
    assert not allows(home, "", "secrets", "update", PKI), "what is lost is never made anew"
    for rule in [*everywhere, *home, *rules(documents(), "Role", "default")]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_the_controller_may_read_issuers_and_write_their_status():
    for namespace in ("buildkit-system", "default"):
        granted = rules(documents(), "Role", namespace)
        for verb in ("get", "list", "watch"):
            assert allows(granted, "buildkit.smrt-devops.net", "buildkitoidcconfigs", verb)
        assert allows(granted, "buildkit.smrt-devops.net", "buildkitoidcconfigs/status", "update")
        for verb in ("update", "patch", "create", "delete"):
            assert not allows(granted, "buildkit.smrt-devops.net", "buildkitoidcconfigs", verb), (
                "nobody lets himself in"
            )
    assert allows(rules(documents(), "Role", "default"), "", "secrets", "get"), "of tokens"


def test_the_controller_holds_every_right_that_it_grants():
    """Otherwise the API server refuses the gateways' Roles: a subject can grant only rights that it has."""
    docs = documents(pool_namespaces=("team",))
    held = rules(docs, "Role", "team")
    pool = Pool.model_validate({"metadata": {"name": "p", "namespace": "team"}, "spec": {}})
    defaults = GatewayDefaults(IMAGE, "buildkit-system", "buildkit-controller", heartbeats=True)
    (role,) = of_kind(pool_objects(pool, defaults), "Role")
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    assert allows(held, group, resource, verb), (resource, verb)


def test_pods_fit_the_restricted_security_standard():
    (deployment,) = of_kind(documents(), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"namespace": "Odd_"}, "--namespace"),
        ({"pool_namespaces": ("a", "b: {}")}, "--pool-namespace"),
        ({"replicas": 0}, "--replicas"),
        ({"image": "x # y"}, "--image"),
        ({"image": ""}, "--image"),
        ({"kubernetes_version": "new"}, "--kubernetes-version"),
    ],
)
def test_values_that_would_break_the_yaml_are_refused(options, field):
    with pytest.raises(InvalidInput) as caught:
        render(Install(**options))
    assert caught.value.field == field


def test_the_command_prints_only_the_manifests():
    result = CliRunner().invoke(program, ["manifests", "--pool-namespace", "a", "--pool-namespace", "b"])
    assert result.exit_code == 0
    assert result.stdout == render(Install(pool_namespaces=("a", "b")))
    assert CliRunner().invoke(program, ["manifests"]).stdout == render(Install())
    assert CliRunner().invoke(program, ["manifests", "--api-tls"]).stdout == render(Install(api_tls=True))


ALLOWED = {
    "hosts": ["team=build.example.com"],
    "privileged": ["team"],
    "images": ["team=registry.example.com:5000/a?/*", "team=x:"],
    "load_balancers": ["team"],
    "service_annotations": ["team"],
}
OPTIONS = [
    "--allow-host=team=build.example.com",
    "--allow-privileged=team",
    "--allow-image=team=registry.example.com:5000/a?/*",
    "--allow-image=team=x:",
    "--allow-load-balancer=team",
    "--allow-service-annotations=team",
]


def test_what_is_allowed_reaches_the_controller_and_the_policy():
    docs = documents(pool_namespaces=("team",), allowed=read_allowances(**ALLOWED))
    (deployment,) = of_kind(docs, "Deployment")
    args = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [one for one in args if one.startswith("--allow")] == OPTIONS
    result = CliRunner().invoke(program, ["manifests", "--pool-namespace", "team", *OPTIONS])
    assert parsed(result.stdout) == docs
    (policy,) = of_kind(docs, "ValidatingAdmissionPolicy")
    variables = {one["name"]: one["expression"] for one in policy["spec"]["variables"]}
    assert variables["images"] == "{'team': '^(registry[.]example[.]com:5000/a./.*|x:)$'}"
    rules = " ".join(one["expression"] for one in policy["spec"]["validations"])
    assert "'privileged' || variables.team in ['team']" in rules
    assert "variables.host in ['team=build.example.com']" in rules
    assert " in []" not in rules


def test_by_default_no_pool_may_ask_for_anything():
    docs = documents(pool_namespaces=("a", "b"))
    (policy,) = of_kind(docs, "ValidatingAdmissionPolicy")
    (binding,) = of_kind(docs, "ValidatingAdmissionPolicyBinding")
    rules = " ".join(one["expression"] for one in policy["spec"]["validations"])
    assert rules.count(" in []") == 4
    assert binding["spec"]["policyName"] == policy["metadata"]["name"]
    (selected,) = binding["spec"]["matchResources"]["namespaceSelector"]["matchExpressions"]
    assert selected["values"] == ["a", "b"]
    assert policy["spec"]["failurePolicy"] == "Fail"


@pytest.mark.parametrize(("version", "there"), [("1.29.9", False), ("v1.30", True), ("1.34.4+k3s1", True)])
def test_below_1_30_the_policy_is_left_out_with_a_line_that_says_so(version, there):
    docs = documents(kubernetes_version=version)
    assert bool(of_kind(docs, "ValidatingAdmissionPolicy")) is there
    assert (
        "# The ValidatingAdmissionPolicy for pools is left out" in render(Install(kubernetes_version=version))
    ) is (not there)


def test_no_other_pods_may_run_beside_the_keys():
    level = "pod-security.kubernetes.io/enforce"
    (namespace,) = of_kind(documents(), "Namespace")
    assert namespace["metadata"]["labels"][level] == "restricted"
    (namespace,) = of_kind(documents(namespace="team", pool_namespaces=("team",)), "Namespace")
    assert namespace["metadata"]["labels"][level] == "privileged", "workers are made there"
    assert Install().allowed == Allowances()


def test_two_installations_share_nothing_but_the_definitions():
    """Otherwise applying one would change the other, and deleting it would take something away."""

    def made(**options):
        docs = [doc for doc in documents(**options) if doc["kind"] != "CustomResourceDefinition"]
        return {(doc["kind"], doc["metadata"].get("namespace"), doc["metadata"]["name"]) for doc in docs}

    first = made(namespace="one", pool_namespaces=("a", "b"))
    assert not first & made(namespace="two", pool_namespaces=("c",), definitions=False)
    shared = first & made(namespace="two", pool_namespaces=("a",))
    binding = ("RoleBinding", "a", "buildkit-controller-pools")
    assert binding in shared, "a namespace belongs to one installation: the binding names its account"


def wide_names(namespace: str) -> set[tuple[str, str]]:
    """The objects of an installation that are in no namespace."""
    docs = documents(namespace=namespace, pool_namespaces=("team",), definitions=False)
    wide = (doc for doc in docs if "namespace" not in doc["metadata"] and doc["kind"] != "Namespace")
    return {(doc["kind"], doc["metadata"]["name"]) for doc in wide}


def test_no_namespace_gives_an_installation_the_names_of_another_one():
    """What is before and behind a namespace must not be part of a longer namespace."""
    patterns = [(kind, *name.split("build")) for kind, name in wide_names("build")]
    assert patterns
    for kind, name in wide_names("build"):
        for other_kind, before, behind in patterns:
            if kind == other_kind and name.startswith(before) and name.endswith(behind):
                namespace = name[len(before) : len(name) - len(behind)]
                assert namespace == "build" or not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", namespace)
    for other in ("events-build", "leader-build", "build-events", "build-leader", "tokens-build", "pools-build"):
        assert not wide_names("build") & wide_names(other)


def test_the_definitions_can_be_left_out():
    install = Install(definitions=False)
    assert not of_kind(documents(definitions=False), "CustomResourceDefinition")
    assert "--no-crds" in render(install).splitlines()[0]
    assert CliRunner().invoke(program, ["manifests", "--no-crds"]).stdout == render(install)


def level_of(docs, account, namespace, group, resource, where):
    """The priority level of a request, as the API server finds it: the FlowSchema that comes first."""

    def fits(rule):
        accounts = [subject["serviceAccount"] for subject in rule["subjects"]]
        asked = any(one["name"] in {"*", account} and one["namespace"] == namespace for one in accounts)
        return asked and any(
            {"*", group} & set(one["apiGroups"])
            and {"*", resource} & set(one["resources"])
            and {"*", where} & set(one["namespaces"])
            for one in rule["resourceRules"]
        )

    found = [doc for doc in of_kind(docs, "FlowSchema") if any(fits(rule) for rule in doc["spec"]["rules"])]
    first = min(found, key=lambda doc: doc["spec"]["matchingPrecedence"], default=None)
    return first and first["spec"]["priorityLevelConfiguration"]["name"]


@pytest.mark.parametrize(
    ("account", "namespace", "group", "resource", "where", "level"),
    [
        ("buildkit-controller", "bk", "buildkit.smrt-devops.net", "buildkitworkers", "team", "bkpool-bk"),
        ("buildkit-controller", "bk", "", "pods", "team", "bkpool-bk"),
        ("p-gateway", "team", "buildkit.smrt-devops.net", "buildkitworkers", "team", "bkpool-bk"),
        ("buildkit-controller", "bk", "coordination.k8s.io", "leases", "bk", "leader-election"),
        ("buildkit-controller", "bk", "events.k8s.io", "events", "team", "workload-low"),
        ("buildkit-controller", "bk", "", "events", "team", "workload-low"),
        ("another", "team", "", "pods", "team", None),
        ("another", "bk", "", "pods", "bk", None),
        ("p-gateway", "foreign", "buildkit.smrt-devops.net", "buildkitworkers", "foreign", None),
    ],
)
def test_leases_have_a_priority_level_of_their_own(account, namespace, group, resource, where, level):
    docs = documents(namespace="bk", pool_namespaces=("team",))
    assert level_of(docs, account, namespace, group, resource, where) == level
    (own,) = of_kind(docs, "PriorityLevelConfiguration")
    assert own["metadata"]["name"] == "bkpool-bk"
    for schema in of_kind(docs, "FlowSchema"):
        assert schema["spec"]["matchingPrecedence"] < 9000, "service-accounts would take it"


@pytest.mark.parametrize(("version", "there"), [("1.28", False), ("1.29", True), ("v1.34.4", True)])
def test_below_1_29_the_flow_schemas_are_left_out_with_a_line_that_says_so(version, there):
    docs = documents(kubernetes_version=version)
    assert bool(of_kind(docs, "FlowSchema")) is bool(of_kind(docs, "PriorityLevelConfiguration")) is there
    assert ("# The FlowSchemas are left out" in render(Install(kubernetes_version=version))) is (not there)
