import pytest

from bkpool.core.auth import OIDCConfigSpec
from bkpool.core.documents import read_documents
from bkpool.core.errors import InvalidInput
from bkpool.core.ignored import IgnoredFields, ignored_in_config
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.core.unknown_fields import unknown_fields, unknown_in_spec

HEAD = "apiVersion: buildkit.smrt-devops.net/v1alpha1\n"
POOL = HEAD + "kind: BuildKitPool\nmetadata: {name: p}\n"
ISSUER = HEAD + "kind: BuildKitOIDCConfig\nmetadata: {name: i}\nspec:\n  issuer: https://i.example\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (POOL + "spec: {scaling: {mx: 1}}", "line 4: spec.scaling.mx: there is no such field; did you mean `max`?"),
        (POOL + "spec:\n  scaling:\n    Max: 1\n", "line 6: spec.scaling.Max: .* did you mean `max`"),
        (POOL + "spec: {scaling: {scale_down_delay: 1m}}", "scale_down_delay: .* did you mean `scaleDownDelay`"),
        (POOL + "spec: {max: 1}", "spec.max: .* did you mean `scaling.max`"),
        (POOL + "spec: {colour: red}", "spec.colour: there is no such field$"),
        (POOL + "spec: {scaling: {mx: 1}, cache: {reus: pool}}", r"mx: .*`max`\? \(and 1 more\)$"),
        (POOL + "spec:\n  auth:\n    rbac:\n      rules:\n      - {users: [a]}\n      - {user: [b]}\n",
         r"line 9: spec.auth.rbac.rules\[1\].user: .* did you mean `users`"),
        (POOL + "spec: {cache: {backends: [{type: local, local: {sise: 1Gi}}]}}",
         r"spec.cache.backends\[0\].local.sise: .*`size`"),
        (POOL + "spec: {auth: {methods: [mtls, {type: oidc, oidc: {issuer: 'https://i.example', audiense: a}}]}}",
         r"spec.auth.methods\[1\].oidc.audiense: .*`audience`"),
        (POOL + "sepc: {}", "line 4: sepc: .* did you mean `spec`"),
        (POOL.replace("name: p", "name: p, lables: {a: b}"), "line 3: metadata.lables: .* did you mean `labels`"),
        (ISSUER + "  claimMapping: {user: sub}\n", "line 6: spec.claimMapping: .* did you mean `claimsMapping`"),
        ("---\n---\n" + POOL + "---\n" + ISSUER + "  audiance: a\n", "f, document 2, line 12: spec.audiance: "),
        (POOL + "spec: {scaling: {<<: {mx: 1}}}", "^f, document 1: spec.scaling.mx: .*`max`"),
    ],
)  # fmt: skip
def test_a_field_of_a_file_that_nobody_knows_is_refused_with_its_place_and_a_guess(text, complaint):
    with pytest.raises(InvalidInput, match=complaint) as caught:
        read_documents(text, source="f")
    assert caught.value.field in caught.value.message


def test_a_file_may_have_what_bkpool_does_not_read_yet_and_what_kubernetes_writes():
    text = (
        HEAD
        + "kind: BuildKitPool\n"
        + "metadata: {name: p, uid: u, resourceVersion: '3', creationTimestamp: 2026-01-01T00:00:00Z,\n"
        + "  selfLink: x, managedFields: [{manager: kubectl}], labels: {any: thing}, annotations: {any: thing},\n"
        + "  ownerReferences: [{apiVersion: v1, kind: K, name: n, uid: u, blockOwnerDeletion: true}]}\n"
        + "spec:\n  tls: {enabled: true, anything: 1}\n  scaling: {mode: auto}\n  gateway: {ingress: {}}\n"
        + "  resources: {buildkit: {limits: {example.com/gpu: 1}}, sidecar: {a: b}}\n"
        + "  cache: {backends: [{type: s3, s3: {bucket: b}}], gc: {schedule: x}}\n"
        + "status: {phase: Ready, another: 1}\n"
    )
    (pool,) = read_documents(text, source="f").pools
    assert list(unknown_fields(pool)) == []
    (config,) = read_documents(ISSUER + "  clientSecretRef: {name: n, key: k}\n", source="f").configs
    assert list(unknown_fields(config)) == []


def test_a_stored_object_keeps_an_unknown_field_and_names_it_with_the_same_guess():
    spec = PoolSpec.model_validate({"scaling": {"mx": 1, "mode": "auto"}, "colour": "red"})
    assert [(one.dotted, one.meant) for one in unknown_in_spec(spec)] == [("colour", None), ("scaling.mx", "max")]
    pool = Pool(metadata=Metadata(name="p"), spec=spec)
    assert IgnoredFields(()).of(pool) == ["colour", "scaling.mode", "scaling.mx (did you mean `max`?)"]
    assert pool.to_json()["spec"]["scaling"]["mx"] == 1
    config = OIDCConfigSpec.model_validate({"issuer": "https://i.example", "audiense": "a", "clientSecretRef": {}})
    assert ignored_in_config(config) == ["audiense (did you mean `audience`?)", "clientSecretRef"]
