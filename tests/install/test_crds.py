"""The definitions in the cluster must agree with the models that bkpool reads.

What the API server makes of them is in e2e/kind/test_crds.py.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.gateway_heartbeat import GatewayHeartbeat
from bkpool.core.names import API_VERSION, GROUP, longest_pool_name
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Duration
from bkpool.core.unknown_fields import NOT_READ_YET
from bkpool.core.worker import Worker, WorkerSpec, WorkerStatus
from bkpool.install.crds import definitions
from bkpool.workers.ignored_fields import IGNORED_BY_PROCESSES, IGNORED_IN_CLUSTER, IGNORED_WITH_HOST_GATEWAY

BOUNDS = ("minimum", "maximum", "minLength", "maxLength", "pattern", "enum")


@cache
def parsed():
    return definitions()


def schema(kind):
    (found,) = (doc for doc in parsed() if doc["spec"]["names"]["kind"] == kind.KIND)
    return found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def leaves(node, path=""):
    """Every node of a structural schema, with its path. `[]`: items of a list, `{}`: values of a map."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from leaves(child, f"{path}.{name}")
    if "items" in node:
        yield from leaves(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from leaves(node["additionalProperties"], f"{path}{{}}")


def modelled(model):
    """The same for a model: its JSON schema by pydantic, with references resolved and without None."""
    document = model.model_json_schema(by_alias=True)

    def walk(node, path):
        node = _plain(node, document)
        yield path, node
        for name, child in node.get("properties", {}).items():
            yield from walk(child, f"{path}.{name}")
        if "items" in node:
            yield from walk(node["items"], f"{path}[]")
        if isinstance(node.get("additionalProperties"), dict):
            yield from walk(node["additionalProperties"], f"{path}{{}}")

    return dict(walk(document, ""))


def _plain(node, document):
    if "$ref" in node:
        return {**_plain(document["$defs"][node["$ref"].rsplit("/", 1)[1]], document), **node}
    if "anyOf" in node:
        either = [_plain(one, document) for one in node["anyOf"] if one.get("type") != "null"]
        return {key: value for one in reversed(either) for key, value in one.items()}
    return node


def defaulted(node, value):
    """What the API server turns a value into: it sets the defaults of absent fields, from the outside in."""
    if isinstance(value, dict):
        for name, child in node.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = json.loads(json.dumps(child["default"]))
            if name in value:
                defaulted(child, value[name])
    return value


def test_the_names_are_those_of_the_contract():
    names = {doc["spec"]["names"]["plural"]: doc["spec"]["names"] for doc in parsed()}
    assert set(names) == {"buildkitpools", "buildkitworkers", "buildkitgateways", "buildkitoidcconfigs"}
    assert names["buildkitpools"]["shortNames"] == ["bkpool"]
    assert names["buildkitworkers"]["shortNames"] == ["bkworker"]
    for doc in parsed():
        (version,) = doc["spec"]["versions"]
        assert f"{doc['spec']['group']}/{version['name']}" == API_VERSION
        assert doc["metadata"]["name"] == f"{doc['spec']['names']['plural']}.{GROUP}"
        assert doc["spec"]["scope"] == "Namespaced"
        assert version["schema"]["openAPIV3Schema"]["required"] == ["spec"]
        assert "status" in version["subresources"]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (Pool, "PHASE WORKERS READY IDLE ALLOCATED CONNECTIONS ENDPOINT AGE"),
        (Worker, "POOL PHASE POD JOB EXPIRES AGE"),
        (GatewayHeartbeat, "POOL RENEWED AGE"),
        (OIDCConfig, "ISSUER AUDIENCE ENABLED READY AGE"),
    ],
)
def test_kubectl_get_shows_the_columns_of_the_field(kind, columns):
    (found,) = (doc for doc in parsed() if doc["spec"]["names"]["kind"] == kind.KIND)
    shown = found["spec"]["versions"][0]["additionalPrinterColumns"]
    assert " ".join(column["name"].upper() for column in shown) == columns
    known = {path for path, _ in leaves(schema(kind))} | {".metadata.creationTimestamp"}
    assert {column["jsonPath"] for column in shown} <= known


@pytest.mark.parametrize("kind", [Pool, Worker, GatewayHeartbeat, OIDCConfig])
def test_every_field_that_bkpool_reads_or_writes_is_in_the_schema_with_its_bounds(kind):
    known = dict(leaves(schema(kind)))
    for path, field in modelled(kind).items():
        if path.startswith((".metadata", ".apiVersion", ".kind")):
            continue
        assert path in known, f"{kind.KIND}: {path} is missing"
        bounds = {key: field[key] for key in BOUNDS if key in field}
        if path.startswith(".status"):
            bounds.pop("enum", None)  # another version may write more
        in_schema = {key: known[path].get(key) for key in bounds}
        assert in_schema == bounds, f"{kind.KIND}: {path}"


def test_the_api_server_refuses_the_name_of_a_pool_that_can_have_no_worker():
    assert schema(Pool)["properties"]["metadata"]["properties"] == {
        "name": {"type": "string", "maxLength": longest_pool_name(1)}
    }


@pytest.mark.parametrize(
    ("kind", "model", "least"),
    [(Pool, PoolSpec, {}), (OIDCConfig, OIDCConfigSpec, {"issuer": "https://i.example.com", "audience": "a"})],
)
def test_the_api_server_sets_the_same_defaults_as_bkpool(kind, model, least):
    filled = defaulted(schema(kind), {"spec": dict(least)})["spec"]
    assert model.model_validate(filled).model_dump() == model.model_validate(least).model_dump()
    ours = {path for path, field in modelled(model).items() if _has_default(field)}
    theirs = {path for path, node in leaves(schema(kind)["properties"]["spec"]) if _has_default(node)}
    assert theirs == ours


def test_the_api_server_sets_no_field_that_is_then_reported_as_ignored():
    """It would be named in the condition of every pool in a cluster, although nobody wrote it."""
    given = {path.removeprefix(".spec.") for path, node in leaves(schema(Pool)) if "default" in node}
    assert not given & {*IGNORED_IN_CLUSTER, *IGNORED_WITH_HOST_GATEWAY}


def test_bkpool_reads_every_field_of_an_issuer_except_the_secret():
    known = {path for path, _ in leaves(schema(OIDCConfig)["properties"]["spec"])}
    unread = {path for path in known - set(modelled(OIDCConfigSpec)) if not path.startswith(".clientSecretRef.")}
    assert unread == {".clientSecretRef"}


def test_an_issuer_in_a_pool_has_the_fields_of_a_buildkitoidcconfig():
    (own,) = (node for path, node in leaves(schema(Pool)) if path == ".spec.auth.methods[].oidc")
    many = schema(OIDCConfig)["properties"]["spec"]
    alone = {"enabled", "pools", "clientSecretRef"}
    assert own["properties"] == {name: node for name, node in many["properties"].items() if name not in alone}
    assert own["required"] == many["required"]


@pytest.mark.parametrize(
    ("issuer", "good"),
    [
        ("https://issuer.example.com", True),
        ("https://issuer.example.com:8443/realms/a", True),
        ("https://token.actions.githubusercontent.com", True),
        ("http://localhost:8888", True),
        ("http://127.0.0.1:8888/", True),
        ("http://[::1]:8888", True),
        ("http://issuer.example.com", False),
        ("http://localhost.example.com", False),
        ("ftp://issuer.example.com", False),
        ("https://", False),
        ("https://user@issuer.example.com", False),
        ("https://issuer.example.com?a=b", False),
        ("https://issuer.example.com#a", False),
        ("https://issuer example.com", False),
        ("issuer.example.com", False),
        ("https:/issuer", False),
    ],
)
def test_definition_and_model_agree_on_issuers(issuer, good):
    (pattern,) = (node["pattern"] for path, node in leaves(schema(OIDCConfig)) if path == ".spec.issuer")
    assert bool(re.search(pattern, issuer)) is good
    try:
        OIDCConfigSpec(issuer=issuer, audience="a")
    except ValueError:
        assert not good
    else:
        assert good


def _has_default(node):
    return "properties" not in node and node.get("default") not in (None, [], {})


def test_durations_have_gos_format():
    nodes = [node for _, node in leaves(schema(Pool)) if "ms|s|m|h" in str(node.get("pattern"))]
    assert len(nodes) == 7
    (pattern,) = {node["pattern"] for node in nodes}
    durations = TypeAdapter(Duration)
    for good in ("0", "0s", "+1h", "1h30m", "1.5h", ".5s", "500ms", "3µs"):
        assert re.search(pattern, good)
        durations.validate_python(good)
    for bad in ("", "1", "-1h", "1h ", "banana", "1d", "h"):
        assert not re.search(pattern, bad)
        with pytest.raises(ValueError, match=r"duration|text"):
            durations.validate_python(bad)


def test_the_fields_of_the_contract_all_exist():
    known = {path.removeprefix(".spec.") for path, _ in leaves(schema(Pool))}
    contract = """
        scaling{mode,min,max,scaleDownDelay,scaleDownSchedule,targetCPUUtilization,targetMemoryUtilization,
        targetActiveConnections}; resources{buildkit,sidecar}; buildkitConfig; buildkitImage; gatewayImage;
        cache{backends[]{type},gc{enabled,schedule,keepStorage,keepDuration}};
        tls{enabled,mode,auto{serverCertDuration,rotateBeforeExpiry,organization},manual{serverCertSecret,caSecret}};
        auth{methods[]{type},rbac{enabled,rules[]{users,pools}}};
        networking{serviceType,external{enabled,hostname,annotations},port,allowedCIDRs,annotations};
        observability{metrics,logging};
        gateway{enabled,replicas,resources,tokenTTL,maxTokenTTL,serviceType,port,nodePort,loadBalancerClass,
        gatewayAPI,ingress}
    """
    assert set(_paths(contract)) <= known


def _paths(text):
    stems, name = [], ""
    for char in "".join(text.split()):
        if char in "{},;":
            if name:
                yield ".".join([*stems, name])
            if char == "{":
                stems.append(name)
            elif char == "}":
                stems.pop()
            name = ""
        else:
            name += char
    yield ".".join([*stems, name])


def test_what_is_not_read_yet_is_what_the_definitions_have_and_bkpool_does_not():
    """A field that is missing here would be refused in a file of `up -f`."""
    for kind, spec in ((Pool, PoolSpec), (OIDCConfig, OIDCConfigSpec)):
        known = {path.removeprefix(".") for path, _ in leaves(schema(kind)["properties"]["spec"]) if path}
        unread = known - {path.removeprefix(".") for path in modelled(spec)}
        stems = {path for path in unread if not any(path.startswith(f"{other}.") for other in unread)}
        of_other_types = {"cache.backends[].registry", "cache.backends[].s3"}  # any fields are allowed there
        assert NOT_READ_YET[spec] - of_other_types == stems


def test_a_worker_fits_its_schema():
    for model, part in ((WorkerSpec, "spec"), (WorkerStatus, "status")):
        known = {path for path, _ in leaves(schema(Worker)["properties"][part])}
        assert set(modelled(model)) <= known


def test_a_status_of_the_go_controller_is_accepted():
    left = {"phase": "Running", "workers": {"total": 3, "ready": 1}, "connections": {"active": 2}}
    pool = Pool.model_validate({"metadata": {"name": "p"}, "spec": {}, "status": left})
    assert (pool.status.workers, pool.status.model_extra) == (0, {})


def rows():
    """Each field with the backends on which it works, from the page for users."""
    page = (Path(__file__).parents[2] / "docs" / "pool-spec.md").read_text()
    return dict(re.findall(r"^\| `([^`]+)` \|[^|]*\| ([a-z ]+) \|", page, flags=re.MULTILINE))


def test_the_page_for_users_has_every_field():
    fields = {path.removeprefix(".") for path, _ in leaves(schema(Pool)["properties"]["spec"]) if path}
    fields = {path for path in fields if not path.endswith(("[]", "{}"))}
    stems = {path for path in fields if any(other.startswith((f"{path}.", f"{path}[]")) for other in fields)}
    assert fields - stems <= set(rows()) <= fields


def test_the_page_for_users_says_what_is_reported_as_ignored():
    def below(field, stems):
        return any(field == stem or field.startswith(f"{stem}.") for stem in stems)

    known = {path.removeprefix(".") for path in modelled(PoolSpec)}
    for field, works_on in rows().items():
        if field.startswith("cache.backends"):
            continue
        assert (field in known) == (works_on != "not yet"), field
        if works_on == "not yet":
            continue
        assert below(field, IGNORED_IN_CLUSTER) == (works_on == "process"), field
        assert below(field, IGNORED_WITH_HOST_GATEWAY - IGNORED_IN_CLUSTER) == (works_on == "cluster"), field
        assert below(field, IGNORED_BY_PROCESSES - IGNORED_WITH_HOST_GATEWAY) == (works_on == "pods"), field
