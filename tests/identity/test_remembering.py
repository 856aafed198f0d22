"""What a lease remembers of its caller: which claims, how much of them, and what is made of it afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.auth import OIDC
from bkpool.core.remembered_caller import CallerMethod, RememberedCaller
from bkpool.core.resource import Metadata
from bkpool.core.worker import Lease
from bkpool.identity import Identity
from bkpool.identity.claims import find
from bkpool.identity.remembering import LONGEST, claims_of, named_claims, remembered, selected
from bkpool.identity.rules import decide_by_name
from support.objects import lease, pool

GITHUB = "https://token.actions.githubusercontent.com"


def settings(**more: object) -> OIDC:
    return OIDC.model_validate({"issuer": "https://i.example", "audience": "x", **more})


def test_the_claims_that_configurations_name_are_those_of_conditions_mappings_and_tenants():
    one = settings(claimsMapping={"user": "login", "groups": "realm.roles"}, tenantClaim="team")
    other = settings(conditions=[{"claim": "ref", "values": ["main"]}])
    assert named_claims([one, other]) == {"aud", "azp", "login", "realm.roles", "team", "sub", "ref"}
    assert named_claims([settings(issuer=GITHUB)]) > {"sub"}, "the default tenant's claim is there as well"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "a.b", ""]), inner),
    max_leaves=8,
)
NAMES = st.sets(st.sampled_from(["a", "b", "a.b", "a.a", "a.b.a", "c"]))


@given(st.dictionaries(st.sampled_from(["a", "b", "a.b"]), JSON), NAMES)
def test_a_remembered_claim_is_found_as_in_the_token_unless_it_is_an_object(claims, names):
    kept = selected(claims, names)
    identity = Identity("ann", "https://i.example", method=CallerMethod.OIDC, claims=kept)
    caller = remembered(identity)
    assert caller is not None
    if not caller.complete:
        return
    for name in names:
        if not isinstance(find(claims, name), dict):
            assert find(claims_of(caller), name) == find(claims, name)
            assert type(find(claims_of(caller), name)) is type(find(claims, name))


@pytest.mark.parametrize("damaged", ["", "[]", "{", "7", "[" * 100_000, '"x"'])
def test_damaged_claims_are_none(damaged):
    caller = RememberedCaller(method=CallerMethod.OIDC, issuer="https://i.example", user="ann", claims=damaged)
    assert claims_of(caller) == {}


def test_the_limit_counts_bytes_and_keeps_the_name():
    names = tuple(f"group-{number}-é" for number in range(300))
    assert len("".join(names)) < LONGEST < len("".join(f'"{name}",' for name in names).encode())
    account = Identity("ci", "kubernetes", groups=names, method=CallerMethod.SERVICE_ACCOUNT)
    small = remembered(Identity("ci", "kubernetes", groups=names[:100], method=CallerMethod.SERVICE_ACCOUNT))
    assert small is not None
    assert (small.groups, small.complete) == (names[:100], True)
    large = remembered(account)
    assert large is not None
    assert (large.user, large.groups, large.complete) == ("ci", (), False)
    for caller in (small, large):
        assert len(caller.model_dump_json(by_alias=True).encode()) <= LONGEST


def test_a_remembered_caller_survives_the_store():
    kept = {"aud": ["a", "b"], "id": 7, "flag": True, "text": "7"}
    caller = remembered(Identity("ann", "https://i.example", method=CallerMethod.OIDC, claims=kept))
    stored = Lease.model_validate_json(lease(caller=caller).model_dump_json(by_alias=True))
    assert stored.caller == caller
    assert stored.caller is not None
    assert claims_of(stored.caller) == kept


def test_a_lease_of_an_earlier_version_is_judged_by_name():
    ruled = pool(auth={"rbac": {"rules": [{"users": ["ann", "group:dev"]}]}})
    assert decide_by_name("ann", Identity("ann", "https://i.example").digest, ruled).allowed
    assert not decide_by_name("bob", Identity("bob").digest, ruled).allowed
    assert decide_by_name("admin", Identity("admin").digest, ruled).allowed
    assert not decide_by_name("admin", Identity("admin", "https://i.example").digest, ruled).allowed, (
        "a user who is only called admin"
    )
    assert decide_by_name("bob", "", pool().but(metadata=Metadata(name="p"))).allowed
