"""Who may use a pool, as a table: the pool's configuration, the caller's identity, and the decision."""

from __future__ import annotations

import pytest

from bkpool.core.auth import OIDCConfig, OIDCConfigSpec
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.identity import Identity, Scope
from bkpool.identity.rules import decide, is_theirs, unconfigured

TOKEN = {"type": "token", "token": {"secretRef": "s"}}
HERE, NAMESPACE = Scope("team", "amd64"), Scope("team")
ALICE = Identity("alice", authority="https://i", source="config team/i")


def a_pool(name: str = "amd64", **auth: object) -> Pool:
    return Pool(metadata=Metadata(name=name, namespace="team"), spec=PoolSpec.model_validate({"auth": auth}))


def rules(*users: str, pools: list[str] | None = None, **rbac: object) -> dict:
    rule = {"users": users} if pools is None else {"users": users, "pools": pools}
    return {"rbac": {"rules": [rule], **rbac}}


def caller(name: str = "alice", **known: object) -> Identity:
    return Identity(name, authority="https://i", source="config team/i", **known)


@pytest.mark.parametrize(
    ("auth", "identity", "allowed", "reason"),
    [
        # rules decide alone
        (rules("alice"), caller(), True, "rules[0]"),
        (rules("al*"), caller(), True, "rules[0]"),
        (rules("*"), caller(), True, "rules[0]"),
        (rules("alice"), caller("Alice"), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("bob"), caller(granted=("*",)), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("bob"), caller(pools=("amd64",)), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("bob"), caller(scope=HERE), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules(), caller(), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("bob"), Identity("root", admin=True), True, "admin"),
        # groups, and what the token says of pools
        (rules("group:dev"), caller(groups=("ops", "dev")), True, "rules[0]"),
        (rules("group:d*"), caller(groups=("dev",)), True, "rules[0]"),
        (rules("dev"), caller(groups=("dev",)), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("group:dev"), caller("dev"), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("pool:amd64"), caller(pools=("amd64",)), True, "rules[0]"),
        (rules("amd64"), caller(pools=("amd64",)), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("pool:*"), caller(), False, "no rule in spec.auth.rbac.rules of the pool names"),
        # a rule for other pools
        (rules("alice", pools=["amd64"]), caller(), True, "rules[0]"),
        (rules("alice", pools=["team/amd64"]), caller(), True, "rules[0]"),
        (rules("alice", pools=["a*"]), caller(), True, "rules[0]"),
        (rules("alice", pools=["other/*"]), caller(), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("alice", pools=["arm64"]), caller(), False, "no rule in spec.auth.rbac.rules of the pool names"),
        (rules("alice", pools=[]), caller(), False, "no rule in spec.auth.rbac.rules of the pool names"),
        ({"rbac": {"rules": [{"users": ["bob"]}, {"users": ["alice"]}]}}, caller(), True, "rules[1]"),
        (
            {"rbac": {"rules": [{"users": ["bob"]}, {"users": ["carol"]}]}},
            caller(),
            False,
            "no rule in spec.auth.rbac.rules of the pool names",
        ),
        # rules switched off
        (rules("bob", enabled=False), caller(), True, "spec.auth.rbac.enabled is false"),
        ({"rbac": {"enabled": False}}, caller(scope=Scope("other")), False, "is not valid for this pool"),
        # no rules: what lets the caller in may name the pool
        ({}, caller(), False, "neither the token nor its issuer"),
        ({}, caller(granted=("amd64",)), True, "grants this pool in spec.pools"),
        ({}, caller(granted=("team/*",)), True, "grants this pool in spec.pools"),
        ({}, caller(granted=("arm64", "other/amd64")), False, "no rule"),
        ({}, caller(pools=("amd64",)), True, "token names this pool"),
        ({}, caller(pools=("team/amd64",)), True, "token names this pool"),
        ({}, caller(pools=("*", "amd6?")), False, "no rule"),
        ({"methods": [TOKEN]}, caller(scope=HERE), True, "pool's own"),
        ({"methods": [TOKEN]}, caller(), False, "no rule"),
        # where an identity counts
        (rules("*"), caller(scope=NAMESPACE), True, "rules[0]"),
        (rules("*"), caller(scope=Scope("other")), False, "is not valid for this pool"),
        (rules("*"), caller(scope=Scope("team", "arm64")), False, "is not valid for this pool"),
        ({}, caller(scope=Scope("other"), granted=("*",)), False, "is not valid for this pool"),
    ],
)
def test_one_caller_and_one_pool(auth, identity, allowed, reason):
    decision = decide([identity], a_pool(**auth), open_to_all=False)
    assert decision.allowed is allowed
    assert reason in decision.reason
    assert decision.identity is identity


def test_the_first_identity_with_access_is_returned():
    pool = a_pool(**rules("alice", "bob"))
    strangers, alice, bob = [caller("x"), caller("y")], caller("alice"), caller("bob")
    assert decide([*strangers, bob, alice], pool, open_to_all=False).identity is bob
    assert decide(strangers, pool, open_to_all=False).identity is strangers[0]
    nobody = decide([], pool, open_to_all=True)
    assert (nobody.allowed, nobody.identity) == (False, None)


@pytest.mark.parametrize(
    ("auth", "allowed"),
    [({}, True), ({"methods": ["mtls"]}, True), (rules("bob"), False), (rules("alice"), True)],
)
def test_while_nothing_is_configured_every_authenticated_caller_has_access(auth, allowed):
    assert decide([caller()], a_pool(**auth), open_to_all=True).allowed is allowed


def test_a_pool_with_rules_or_a_trusted_issuer_counts_as_configured_access():
    config = OIDCConfig(
        metadata=Metadata(name="c"), spec=OIDCConfigSpec(issuer="https://i.example.com", audience="a")
    )
    with_rules, without_rules = a_pool("with-rules", **rules("alice")), a_pool()
    assert unconfigured([], [])
    assert unconfigured([without_rules], [])
    assert not unconfigured([without_rules, with_rules], [])
    assert not unconfigured([without_rules], [config])


@pytest.mark.parametrize(
    ("identity", "seen"),
    [
        (ALICE, True),
        (caller("bob"), False),
        (Identity("alice", authority="https://another"), False),
        (caller(scope=Scope("other")), False),
        (caller(groups=("dev",)), True),
        (Identity("root", admin=True), True),
    ],
)
def test_only_the_maker_of_a_lease_may_see_its_details(identity, seen):
    assert bool(is_theirs(Key("team", "amd64"), [identity], ALICE.digest)) is seen


def test_a_lease_without_a_known_maker_belongs_to_the_admin():
    assert not is_theirs(Key("team", "amd64"), [Identity("")], "")
    assert is_theirs(Key("team", "amd64"), [Identity("root", admin=True)], "")


def test_equal_names_of_two_authorities_are_two_callers_and_two_tenants():
    one, other = Identity("alice", authority="a"), Identity("alice", authority="b")
    assert one.digest != other.digest
    assert one.tenant != other.tenant
    assert Identity("ab", authority="c").digest != Identity("b", authority="ca").digest


def test_callers_of_one_tenant_share_only_its_caches():
    one, other = caller("alice", tenant_name="acme/app"), caller("bob", tenant_name="acme/app")
    assert one.tenant == other.tenant != caller("acme/app").digest
    assert one.digest != other.digest
    assert caller("alice").tenant == caller("alice", groups=("dev",)).tenant
