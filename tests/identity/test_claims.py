from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.auth import OIDC
from bkpool.core.errors import Unauthenticated
from bkpool.identity import Identity, Scope
from bkpool.identity.claims import default_tenant_claim, find, identify

GITHUB = "https://token.actions.githubusercontent.com"
CLAIMS = {
    "sub": "repo:org/app:ref:refs/heads/main",
    "repository": "org/app",
    "actor": "ann",
    "run_attempt": 1,
    "protected": True,
    "roles": ["dev", "ops"],
    "pools": ["amd64", "team/arm64"],
    "empty": "",
    "null": None,
    "kubernetes.io": {"namespace": "ci", "pod": {"name": "runner-1"}},
    "realm_access": {"roles": ["builder"]},
    "a.b": "literal",
    "a": {"b": "nested", "c": {"d": "deep"}},
}


def oidc(issuer: str = "https://issuer.example", **more: object) -> OIDC:
    return OIDC.model_validate({"issuer": issuer, "audience": "buildkit-controller", **more})


def mapping(**more: str) -> OIDC:
    return oidc(claimsMapping={"user": "actor", **more})


def refusal(claims: dict[str, object], settings: OIDC) -> str:
    with pytest.raises(Unauthenticated) as refused:
        identify(claims, settings)
    return refused.value.message


def test_the_identity_has_what_the_configuration_maps():
    settings = mapping(pools="pools", groups="realm_access.roles")
    found = identify(CLAIMS, settings, source="BuildKitOIDCConfig ci/kc", scope=Scope("ci"), granted=("a*",))
    assert found == Identity(
        name="ann",
        authority="https://issuer.example",
        claim="actor",
        source="BuildKitOIDCConfig ci/kc",
        groups=("builder",),
        pools=("amd64", "team/arm64"),
        granted=("a*",),
        scope=Scope("ci"),
        job=(("sub", CLAIMS["sub"]),),
    )
    assert not found.admin


def test_the_claims_that_name_the_job_are_cut_and_have_one_line():
    claims = {"sub": "ann\nfake line\x1b[0m", "jti": "j" * 1_000, "run_id": 7, "job_id": "1"}
    found = identify(claims | {"actor": "ann"}, mapping())
    assert dict(found.job) == {"jti": "j" * 256, "run_id": "7", "sub": "ann?fake line?[0m"}
    for odd in (True, None, ["a"], {"a": 1}, ""):
        assert identify({"sub": "s", "actor": "ann", "jti": odd}, mapping()).job == (("sub", "s"),)
    first, second = (identify({"sub": "s", "actor": "ann", "jti": jti}, mapping()) for jti in "ab")
    assert first.digest == second.digest, "another token is not another caller"


def test_equal_names_of_two_claims_are_two_callers_with_separate_caches():
    same = {"sub": "me", "actor": "me"}
    by_sub, by_actor = identify(same, oidc()), identify(same, mapping())
    assert by_sub.name == by_actor.name
    assert by_sub.digest != by_actor.digest
    assert by_sub.tenant != by_actor.tenant
    by_actor_for_sub = identify(same, oidc(claimsMapping={"user": "actor"}, tenantClaim="sub"))
    assert by_actor_for_sub.tenant == by_sub.tenant, "it is one repository, whatever the names of its jobs"


def test_the_user_is_the_subject_by_default():
    assert identify(CLAIMS, oidc()).name == CLAIMS["sub"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("actor", "ann"),
        ("kubernetes.io.namespace", "ci"),
        ("kubernetes.io.pod.name", "runner-1"),
        ("kubernetes.io", CLAIMS["kubernetes.io"]),
        ("a.b", "literal"),
        ("a.c.d", "deep"),
        ("a.c.x", None),
        ("actor.x", None),
        ("roles.0", None),
        ("null", None),
        ("missing", None),
        ("", None),
        (".", None),
        (".actor", None),
        ("actor.", None),
        ("...." * 50, None),
    ],
)
def test_a_claim_is_found_by_its_path(path, value):
    assert find(CLAIMS, path) == value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "claim actor (claimsMapping.user) is missing"),
        ("", "is '': not a name"),
        (7, "is 7: not a name"),
        (True, "is True: not a name"),
        (["ann"], r"is ['ann']: not a name"),
        ({"name": "ann"}, "not a name"),
        ("a" * 257, "not a name of 1 to 256"),
        (" ann", "not a name"),
        ("ann\n", "not a name"),
        ("ann\x00", "not a name"),
        ("an\u202en", "not a name"),
        ("system:serviceaccount:ci:runner", "must not begin with system:, group:, pool:"),
        ("system:admin", "must not begin with system:, group:, pool:"),
        ("group:ops", "must not begin with system:, group:, pool:"),
        ("pool:amd64", "must not begin with system:, group:, pool:"),
    ],
    ids=repr,
)
def test_an_invalid_user_is_refused(value, why):
    assert why in refusal({**CLAIMS, "actor": value}, mapping())


@pytest.mark.parametrize("name", ["a" * 256, "ann@example.org", "Ann Müller", "systemd", "groups:x", "鈴木"])
def test_a_valid_user_is_accepted(name):
    assert identify({"actor": name}, mapping()).name == name


# --- pools and groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ()),
        ([], ()),
        ("amd64", ("amd64",)),
        ("a, b", ("a, b",)),
        (["b", "a", "b"], ("b", "a")),
        (["*"], ("*",)),
        (["p" * 256] * 100, ("p" * 256,)),
    ],
)
@pytest.mark.parametrize("field", ["pools", "groups"])
def test_names_in_a_claim(field, value, names):
    assert getattr(identify({**CLAIMS, "names": value}, mapping(**{field: "names"})), field) == names


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (7, "neither a name nor a list"),
        (False, "neither a name nor a list"),
        ({"a": 1}, "neither a name nor a list"),
        ([["a"]], "neither a name nor a list"),
        (["a", 7], "neither a name nor a list"),
        (["a", ""], "neither a name nor a list"),
        (["p" * 257], "neither a name nor a list"),
        (["p"] * 501, "has 501 entries, more than "),
    ],
)
@pytest.mark.parametrize("field", ["pools", "groups"])
def test_invalid_names_in_a_claim_are_refused(field, value, why):
    assert why in refusal({**CLAIMS, "names": value}, mapping(**{field: "names"}))


def test_a_token_names_at_most_a_hundred_pools():
    assert "101 entries, more than 100" in refusal({**CLAIMS, "pools": ["p"] * 101}, mapping(pools="pools"))


# --- conditions -----------------------------------------------------------------------------------------------------


def conditions(*them: dict[str, object]) -> OIDC:
    return oidc(conditions=list(them))


@pytest.mark.parametrize(
    "condition",
    [
        {"claim": "repository", "values": ["org/other", "org/app"]},
        {"claim": "repository", "patterns": ["nope", "org/*"]},
        {"claim": "repository", "values": ["nope"], "patterns": ["*/app"]},
        {"claim": "roles", "values": ["ops"]},
        {"claim": "roles", "patterns": ["d?v"]},
        {"claim": "run_attempt", "values": [1]},
        {"claim": "protected", "values": [True]},
        {"claim": "kubernetes.io.namespace", "values": ["ci"]},
        {"claim": "empty", "values": [""]},
    ],
    ids=str,
)
def test_a_condition_that_is_fulfilled(condition):
    identify(CLAIMS, conditions(condition))


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        (
            {"claim": "repository", "values": ["org/other"], "patterns": ["evil/*"]},
            "claim repository is 'org/app'; conditions require 'org/other' or like 'evil/*'",
        ),
        ({"claim": "missing", "values": ["x"]}, "claim missing is missing; conditions require 'x'"),
        ({"claim": "null", "values": ["None"]}, "claim null is missing"),
        ({"claim": "null", "patterns": ["*"]}, "claim null is missing"),
        ({"claim": "repository", "values": ["ORG/APP"]}, "claim repository is"),
        ({"claim": "repository", "values": ["org/*"]}, "claim repository is"),
        ({"claim": "repository", "patterns": ["org"]}, "claim repository is"),
        ({"claim": "roles", "values": ["admin"]}, "claim roles is ['dev', 'ops']"),
        ({"claim": "roles", "values": ["['dev', 'ops']"]}, "claim roles is"),
        ({"claim": "run_attempt", "values": ["1"]}, "claim run_attempt is 1; conditions require '1'"),
        ({"claim": "run_attempt", "values": [True]}, "claim run_attempt is 1; conditions require True"),
        ({"claim": "run_attempt", "patterns": ["*"]}, "claim run_attempt is 1"),
        ({"claim": "protected", "values": [1]}, "claim protected is True; conditions require 1"),
        ({"claim": "protected", "values": ["true", "True"]}, "claim protected is True"),
        ({"claim": "realm_access", "values": ["builder"]}, "claim realm_access is"),
    ],
    ids=str,
)
def test_a_condition_that_is_not_fulfilled(condition, why):
    assert why in refusal(CLAIMS, conditions(condition))


def test_all_conditions_must_be_fulfilled():
    good, bad = {"claim": "roles", "values": ["ops"]}, {"claim": "actor", "values": ["bob"]}
    assert "claim actor is 'ann'" in refusal(CLAIMS, conditions(good, bad))
    assert "claim actor is 'ann'" in refusal(CLAIMS, conditions(bad, good))


def test_a_refusal_is_one_line_even_for_a_long_claim():
    why = refusal({**CLAIMS, "actor": "x" * 9000}, conditions({"claim": "actor", "patterns": ["y" * 500] * 30}))
    assert len(why) < 700


# --- tenants --------------------------------------------------------------------------------------------------------


def test_jobs_of_one_tenant_share_caches_and_others_do_not():
    settings = oidc(tenantClaim="repository")
    one, other = identify(CLAIMS, settings), identify({**CLAIMS, "sub": "another"}, settings)
    assert (one.tenant_name, one.tenant) == ("org/app", other.tenant)
    assert one.digest != other.digest
    assert one.tenant != identify({**CLAIMS, "repository": "org/b"}, settings).tenant
    assert one.tenant != identify(CLAIMS, oidc("https://other.example", tenantClaim="repository")).tenant


def test_the_tenant_is_the_user_by_default():
    assert identify(CLAIMS, mapping()).tenant_name is None


@pytest.mark.parametrize(
    ("issuer", "claim"),
    [
        (GITHUB, "repository_id"),
        (f"{GITHUB}/enterprise", "repository_id"),
        ("https://gitlab.com", "project_id"),
        (f"{GITHUB}.evil", None),
        ("https://gitlab.example.org", None),
        ("https://gitlab.com.evil", None),
    ],
)
def test_the_default_tenant_claim_of_each_issuer(issuer, claim):
    assert default_tenant_claim(issuer) == claim


@pytest.mark.parametrize("value", [None, "", 7, ["74"]])
def test_a_missing_or_invalid_tenant_claim_is_refused(value):
    assert "claim repository_id (tenantClaim) is" in refusal({**CLAIMS, "repository_id": value}, oidc(GITHUB))
    assert "claim project_id (tenantClaim) is" in refusal({**CLAIMS, "project_id": value}, oidc("https://gitlab.com"))


def test_whoever_takes_over_the_name_of_a_repository_gets_none_of_its_caches():
    """The attack: the owner gives up the name org/app, and a stranger makes a repository with this name."""
    former, taker = (identify({**CLAIMS, "repository_id": number}, oidc(GITHUB)) for number in ("74", "99"))
    assert former.name == taker.name
    assert former.tenant != taker.tenant


@pytest.mark.parametrize(
    ("issuer", "was", "now"),
    [(GITHUB, "repository", "repository_id"), ("https://gitlab.com", "project_path", "project_id")],
)
def test_caches_of_before_go_to_nobody(issuer, was, now):
    """Their owner was the value of another claim: not even the same text in the new claim gets them."""
    before = identify({**CLAIMS, was: "74"}, oidc(issuer, tenantClaim=was))
    after = identify({**CLAIMS, was: "74", now: "74"}, oidc(issuer))
    assert before.tenant_name == after.tenant_name
    assert before.tenant != after.tenant


# --- whatever else --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc."), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c", "a.b", ""]), JSON), st.text("abc.", min_size=1, max_size=12))
def test_any_claims_give_an_identity_or_a_refusal(claims, path):
    settings = oidc(
        claimsMapping={"user": path, "pools": "a", "groups": "b.c"},
        conditions=[{"claim": path, "patterns": ["*"], "values": [1, True]}],
        tenantClaim="c",
    )
    try:
        found = identify(claims, settings)
    except Unauthenticated as refused:
        found, why = None, refused.message
    if found is None:
        assert why.startswith("claim ")
    else:
        assert found.name.isprintable()
        assert found.digest
        assert found.tenant
