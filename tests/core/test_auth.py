"""The access settings of issuers and pools: every wrong value is an error that names its field."""

import pytest

from bkpool.core.auth import Auth, OIDCConfig
from bkpool.core.errors import InvalidInput
from bkpool.core.pool import Pool
from bkpool.core.resource import parse_object

ISSUER = "https://issuer.example.com"


def config(**spec):
    document = {
        "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
        "kind": "BuildKitOIDCConfig",
        "metadata": {"name": "c", "namespace": "buildkit-system"},
        "spec": {"issuer": ISSUER, "audience": "a", **spec},
    }
    return parse_object(OIDCConfig, document)


def pool(**auth):
    return parse_object(Pool, {"kind": "BuildKitPool", "metadata": {"name": "p"}, "spec": {"auth": auth}})


def test_an_issuer_needs_only_its_url_and_an_audience():
    spec = config().spec
    assert (spec.enabled, spec.claims_mapping.user, spec.conditions, spec.pools) == (True, "sub", (), ())
    assert spec.rejection_reason is None


def test_an_issuer_is_written_back_as_it_was_read():
    given = {
        "issuer": ISSUER,
        "audience": "a",
        "enabled": False,
        "claimsMapping": {"user": "actor", "pools": "pools", "groups": "kubernetes.io.groups"},
        "conditions": [
            {"claim": "repository_owner", "values": ["acme", True, 7]},
            {"claim": "ref", "patterns": ["refs/heads/*"]},
        ],
        "tenantClaim": "repository",
        "clientID": "c",
        "clientSecretRef": {"name": "n", "namespace": "ns", "key": "k"},
        "pools": ["*"],
    }
    written = config(**given).to_json()["spec"]
    assert {key: written[key] for key in given} | {"conditions": given["conditions"]} == given
    assert [condition.get("values") for condition in written["conditions"]] == [["acme", True, 7], []]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"issuer": None}, "spec.issuer"),
        ({"issuer": ""}, "spec.issuer"),
        ({"issuer": "issuer.example.com"}, "spec.issuer"),
        ({"issuer": "http://issuer.example.com"}, "spec.issuer"),
        ({"issuer": "http://127.0.0.1.example.com"}, "spec.issuer"),
        ({"issuer": "https://user:secret@issuer.example.com"}, "spec.issuer"),
        ({"issuer": "https://issuer.example.com/?a=b"}, "spec.issuer"),
        ({"issuer": "https://issuer.example.com/#a"}, "spec.issuer"),
        ({"issuer": "https://issuer.example.com:99999"}, "spec.issuer"),
        ({"issuer": "https://[::1"}, "spec.issuer"),
        ({"issuer": "https://issuer.example.com/\n"}, "spec.issuer"),
        ({"issuer": f"https://{'a' * 512}"}, "spec.issuer"),
        ({"audience": ""}, "spec.audience"),
        ({"audience": ["a"]}, "spec.audience"),
        ({"enabled": "yes"}, "spec.enabled"),
        ({"claimsMapping": {"user": ""}}, "spec.claimsMapping.user"),
        ({"claimsMapping": {"groups": 1}}, "spec.claimsMapping.groups"),
        ({"claimsMapping": "sub"}, "spec.claimsMapping"),
        ({"conditions": [{"claim": "a"}]}, "spec.conditions.0"),
        ({"conditions": [{"claim": "a", "values": [], "patterns": []}]}, "spec.conditions.0"),
        ({"conditions": [{"values": ["a"]}]}, "spec.conditions.0.claim"),
        ({"conditions": [{"claim": "a", "values": [1.5]}]}, "spec.conditions.0.values.0"),
        ({"conditions": [{"claim": "a", "values": [{}]}]}, "spec.conditions.0.values.0"),
        ({"conditions": [{"claim": "a", "patterns": [""]}]}, "spec.conditions.0.patterns.0"),
        ({"conditions": {"claim": "a"}}, "spec.conditions"),
        ({"tenantClaim": ""}, "spec.tenantClaim"),
        ({"clientID": 7}, "spec.clientID"),
        ({"pools": "*"}, "spec.pools"),
        ({"pools": [""]}, "spec.pools.0"),
    ],
)
def test_a_wrong_value_of_an_issuer_is_refused_and_its_field_is_named(spec, field):
    with pytest.raises(InvalidInput) as refused:
        config(**spec)
    assert refused.value.field.startswith(field)
    assert "secret" not in refused.value.message or "given" in refused.value.message


@pytest.mark.parametrize(
    ("auth", "field"),
    [
        ({"methods": ["token"]}, "spec.auth.methods.0"),
        ({"methods": ["odd"]}, "spec.auth.methods.0.type"),
        ({"methods": [{}]}, "spec.auth.methods.0.type"),
        ({"methods": [{"type": "oidc"}]}, "spec.auth.methods.0"),
        ({"methods": [{"type": "oidc", "oidc": {"audience": "a"}}]}, "spec.auth.methods.0.oidc.issuer"),
        ({"methods": [{"type": "token", "token": {}}]}, "spec.auth.methods.0.token"),
        ({"methods": [{"type": "token", "token": {"file": "/f", "secretRef": "s"}}]}, "spec.auth.methods.0.token"),
        ({"methods": [{"type": "token", "token": {"file": "f"}}]}, "spec.auth.methods.0.token"),
        ({"methods": [{"type": "mtls", "mtls": {"required": "no"}}]}, "spec.auth.methods.0.mtls.required"),
        ({"rbac": {"enabled": 1}}, "spec.auth.rbac.enabled"),
        ({"rbac": {"rules": [{"users": "alice"}]}}, "spec.auth.rbac.rules.0.users"),
        ({"rbac": {"rules": [{"users": [""]}]}}, "spec.auth.rbac.rules.0.users.0"),
        ({"rbac": {"rules": [{"users": ["a"], "pools": [7]}]}}, "spec.auth.rbac.rules.0.pools.0"),
        ({"limits": {"identity": {"leases": 0}}}, "spec.auth.limits.identity.leases"),
        ({"limits": {"pool": {"perMinute": "10"}}}, "spec.auth.limits.pool.perMinute"),
    ],
)
def test_a_wrong_value_of_a_pool_is_refused_and_its_field_is_named(auth, field):
    with pytest.raises(InvalidInput) as refused:
        pool(**auth)
    assert refused.value.field == field


def test_the_name_of_a_method_stands_for_the_method():
    assert pool(methods=["mtls"]) == pool(methods=[{"type": "mtls"}])


def test_all_fields_of_auth_are_read():
    auth = pool(
        methods=[
            "mtls",
            {"type": "token", "token": {"secretRef": "s"}},
            {"type": "token", "token": {"file": "/f"}},
            {"type": "mtls", "token": {"secretRef": "not this one"}},
            {"type": "oidc", "oidc": {"issuer": ISSUER, "audience": "a"}},
        ]
    ).spec.auth
    assert [(source.secret_ref, source.file) for source in auth.tokens] == [("s", None), (None, "/f")]
    assert [one.issuer for one in auth.oidc] == [ISSUER]


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        ({}, False),
        ({"methods": ["mtls"]}, False),
        ({"rbac": {"enabled": True}}, False),
        ({"limits": {"pool": {"leases": 1}}}, False),
        ({"methods": [{"type": "token", "token": {"secretRef": "s"}}]}, True),
        ({"rbac": {"rules": [{"users": ["a"]}]}}, True),
    ],
)
def test_a_pool_restricts_access_with_rules_or_methods(auth, expected):
    assert Auth.model_validate(auth).restricts_access is expected
