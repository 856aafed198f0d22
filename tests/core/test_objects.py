import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bkpool.core.auth import OIDCConfig
from bkpool.core.documents import read_documents
from bkpool.core.errors import InvalidInput
from bkpool.core.ignored import ignored_fields
from bkpool.core.names import Key, Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata, parse_object
from bkpool.core.worker import Worker
from support.objects import lease, worker

HEAD = "apiVersion: buildkit.smrt-devops.net/v1alpha1\nkind: BuildKitPool\nmetadata: {name: p}\n"

CONFIG = """\
apiVersion: buildkit.smrt-devops.net/v1alpha1
kind: BuildKitOIDCConfig
metadata: {name: github, namespace: buildkit-system}
spec: {issuer: "https://token.actions.githubusercontent.com", audience: buildkit-controller}
"""


def test_an_empty_spec_is_a_valid_pool():
    (pool,) = read_documents(HEAD + "spec: {}\n", source="pool.yaml").pools
    assert pool.key == Key("default", "p")
    assert (pool.spec.scaling.min, pool.spec.scaling.max) == (0, 10)


def test_unknown_fields_of_the_go_controller_are_kept_and_named():
    text = (
        HEAD + "spec: {scaling: {max: 3, targetCPUUtilization: 70}, tls: {enabled: true}, auth: {methods: [mtls]}}\n"
    )
    (pool,) = read_documents(text, source="pool.yaml").pools
    assert ignored_fields(pool.spec, ()) == ["scaling.targetCPUUtilization", "tls"]
    assert [method.type for method in pool.spec.auth.methods] == ["mtls"]
    assert pool.to_json()["spec"]["tls"] == {"enabled": True}


def test_a_changed_copy_is_what_pydantic_makes_of_it():
    (pool,) = read_documents(HEAD + "spec: {scaling: {max: 3, targetCPUUtilization: 70}}\n", source="pool.yaml").pools
    scaling = pool.spec.scaling
    copy, expected = scaling.but(max=4), scaling.model_copy(update={"max": 4})
    assert copy == expected
    assert copy.model_fields_set == expected.model_fields_set
    assert copy.model_dump() == expected.model_dump()
    assert copy.model_extra is not scaling.model_extra
    assert (scaling.max, pool.but(spec=pool.spec.but(scaling=copy)).spec.scaling.max) == (3, 4)


def test_every_field_of_the_example_is_known():
    file = Path(__file__).parents[2] / "examples" / "pool.yaml"
    (pool,) = read_documents(file.read_text(), source=file.name).pools
    assert ignored_fields(pool.spec, ()) == []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("{scaling: {max: many}}", "spec.scaling.max"),
        ("{scaling: {max: '3'}}", "spec.scaling.max"),
        ("{scaling: {max: -1}}", "spec.scaling.max"),
        ("{scaling: {max: true}}", "spec.scaling.max"),
        ("{scaling: {min: 5, max: 2}}", "spec.scaling"),
        ("{scaling: {scaleDownDelay: banana}}", "spec.scaling.scaleDownDelay"),
        ("{scaling: {scaleDownDelay: 15}}", "spec.scaling.scaleDownDelay"),
        ("{gateway: {tokenTTL: -1h}}", "spec.gateway.tokenTTL"),
        ("{gateway: {tokenTTL: 48h}}", "spec.gateway"),
        ("{cache: {gc: {keepStorage: lots}}}", "spec.cache.gc.keepStorage"),
        ("{cache: {reuse: sometimes}}", "spec.cache.reuse"),
        ("[]", "spec"),
    ],
)
def test_a_wrong_value_names_its_field_and_the_document(spec, field):
    with pytest.raises(InvalidInput) as caught:
        read_documents(HEAD + f"spec: {spec}\n", source="pool.yaml")
    assert caught.value.field == field
    assert caught.value.message.startswith(f"pool.yaml, document 1: {field}: ")


@pytest.mark.parametrize("field", ["keepStorage", "reservedSpace", "minFreeSpace"])
@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ("99999999TB", "must be at most 512PB (given: '99999999TB')"),
        ("101%", "must be a whole number of per cent, at most 100% (given: '101%')"),
        ("12.5 %", "must be a whole number of per cent, at most 100% (given: '12.5 %')"),
    ],
)
def test_a_size_that_buildkitd_cannot_hold_is_refused_in_a_file(field, size, problem):
    text = HEAD + f"spec:\n  cache:\n    gc:\n      {field}: {size}\n"
    with pytest.raises(InvalidInput) as caught:
        read_documents(text, source="f")
    line = text.splitlines().index(f"      {field}: {size}") + 1
    assert caught.value.message == f"f, document 1, line {line}: spec.cache.gc.{field}: {problem}"
    stored = {"metadata": {"name": "p"}, "spec": {"cache": {"gc": {field: size}}}}
    assert Pool.model_validate(stored).key.name == "p", "a stored pool stays readable"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1, column"),
        ("", "there is no document in it"),
        ("a: &a [*a, *a", "line 1"),
        ("when: 2026-99-99", "not YAML"),
        ("a: &a {k: x}\n---\nb: *a", "line 3"),
        ("a: " + "1:" * 60 + "1", "line 1, column 4: a number of more than 100 characters"),
        ("- " * 101 + "a", "nested in more than 100 levels"),
        ("kind: Deployment", "expected BuildKitPool or BuildKitOIDCConfig"),
        ("- 1", "expected BuildKitPool"),
        (HEAD + "---\n" + HEAD, "2 times"),
        (CONFIG + "---\n" + CONFIG, "BuildKitOIDCConfig buildkit-system/github is defined 2 times"),
        (HEAD.replace("name: p", "name: P_"), "metadata.name"),
        ("x" * 1_000_001, "larger than"),
    ],
)
def test_the_error_for_a_wrong_file_says_what_is_wrong(text, message):
    with pytest.raises(InvalidInput, match=message):
        read_documents(text, source="pool.yaml")


def test_a_small_file_that_stands_for_millions_of_nodes_costs_nothing():
    lines = [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: x}}\n" for n in range(1, 60)]
    with pytest.raises(InvalidInput, match=r"^f, line \d+, column \d+: aliases that repeat more than 10000 nodes"):
        read_documents("".join(["a0: &a0 {k: x}\n", *lines]), source="f")


def test_a_file_may_use_aliases_and_merge_keys():
    text = HEAD.replace("name: p", "name: p, annotations: &team {team: a}, labels: {<<: *team, x: y}")
    (pool,) = read_documents(text, source="f").pools
    assert dict(pool.metadata.labels) == {"team": "a", "x": "y"}


def test_a_file_may_have_several_pools():
    pools = read_documents(HEAD + "---\n" + HEAD.replace("name: p", "name: q") + "---\n", source="f").pools
    assert [pool.key.name for pool in pools] == ["p", "q"]


def test_a_file_may_have_pools_and_issuers():
    found = read_documents(HEAD + "---\n" + CONFIG, source="f")
    assert [pool.key.name for pool in found.pools] == ["p"]
    assert [config.spec.issuer for config in found.configs] == ["https://token.actions.githubusercontent.com"]


def test_objects_are_the_same_after_json():
    before = worker(3, lease())
    after = parse_object(Worker, json.loads(json.dumps(before.to_json())))
    assert after == before
    assert after.slot == Slot("default", "p", 3)
    assert before.to_json()["spec"]["allocation"]["tokenSHA256"] == "digest-lease"


@pytest.mark.parametrize("text", ["2026-01-01T12:00:00Z", "2026-01-01T12:00:00.25Z", "2026-01-01T13:00:00+01:00"])
def test_a_time_is_read_with_its_zone(text):
    at = Metadata.model_validate({"name": "p", "creationTimestamp": text}).creation_timestamp
    assert at == datetime.fromisoformat(text)
    assert (at.tzinfo is UTC) is text.endswith("Z"), "times with one zone are compared quickly"


@pytest.mark.parametrize("text", ["2026-13-01T12:00:00Z", "TZ", "2026-01-01T12:00:00", "2026-01-01Z", ""])
def test_what_is_no_time_with_a_zone_is_refused(text):
    with pytest.raises(InvalidInput, match=r"metadata.creationTimestamp"):
        parse_object(Pool, {"metadata": {"name": "p", "creationTimestamp": text}})


def test_unknown_fields_of_another_version_are_written_back():
    data = {**worker(0).to_json(), "status": {"phase": "Idle", "podIP": "10.0.0.1"}}
    assert parse_object(Worker, data).to_json()["status"]["podIP"] == "10.0.0.1"


def test_a_worker_without_a_slot_in_its_name_is_refused():
    data = worker(0).to_json()
    data["metadata"]["name"] = "odd"
    with pytest.raises(InvalidInput, match="is not the name of a worker"):
        parse_object(Worker, data)


def test_a_worker_whose_name_is_of_another_pool_is_refused():
    data = worker(0).to_json()
    data["spec"]["poolRef"]["name"] = "q"
    with pytest.raises(InvalidInput, match=r"^spec\.poolRef\.name: must be 'p', as the worker's name says$"):
        parse_object(Worker, data)


@pytest.mark.parametrize(("most", "limit"), [(1, 54), (10, 54), (11, 53), (100, 53), (101, 52), (1001, 51)])
def test_the_name_of_a_pool_leaves_room_for_the_names_of_its_workers(most, limit):
    def named(length: int) -> Pool:
        return parse_object(Pool, {"metadata": {"name": "p" * length}, "spec": {"scaling": {"max": most}}})

    slot = Slot("default", named(limit).key.name, most - 1)
    assert len(slot.worker.name) == 63
    with pytest.raises(InvalidInput, match=f"metadata.name: .* has {limit + 1} characters, .* may have {limit}"):
        named(limit + 1)


@pytest.mark.parametrize("kind", [Pool, OIDCConfig])
@pytest.mark.parametrize("field", ["name", "namespace"])
def test_a_long_name_is_refused_with_its_length_and_the_limit(kind, field):
    data = {
        "metadata": {"name": "n", field: "n" * 64},
        "spec": {"issuer": "https://issuer.example.com", "audience": "a"} if kind is OIDCConfig else {},
    }
    with pytest.raises(InvalidInput) as refused:
        parse_object(kind, data)
    assert refused.value.field == f"metadata.{field}"
    assert f"metadata.{field}: 'nnnnnnnnnnnnnnnnnnnn'... has 64 characters, and a name has at most 63" in str(
        refused.value
    )


def test_objects_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Pool.model_validate({"metadata": {"name": "p"}}).spec = None
