from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Collection

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Forbidden, Unauthenticated, Unavailable
from bkpool.core.names import Key
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.identity import Authenticator, Identity, Verdict
from bkpool.identity.access import LONGEST_BEARER, AccessControl, bearer_token, forbidden
from bkpool.identity.admin_token import AdminTokenAuthenticator

TOKENS = st.from_regex(re.compile(r"[A-Za-z0-9._~+/-]{1,300}={0,2}"), fullmatch=True)
TOKEN = "k" * 43
SPEC = {"issuer": "https://issuer.example", "audience": "buildkit-controller"}


@given(
    TOKENS, st.sampled_from(["Bearer", "bearer", "BEARER", "bEaReR"]), st.integers(1, 3), st.sampled_from(["", " "])
)
def test_the_scheme_bearer_is_accepted_in_any_case(token, scheme, spaces, around):
    assert bearer_token([f"{around}{scheme}{' ' * spaces}{token}{around}"]) == token


@given(st.text(max_size=200))
@example("Bearer")
@example("Bearer ")
@example("Bearer a b")
@example("Bearer a, Bearer b")
@example("Basic YWRtaW46YWRtaW4=")
@example("Bearer tok\udce9n")
@example("Bearer a\n")
@example("Bearer=a")
@example("a" * 43)
@example("")
def test_a_malformed_header_is_refused_and_not_quoted(header):
    try:
        token, refusal = bearer_token([header]), ""
    except Unauthenticated as error:
        token, refusal = None, error.message
    if token is None:
        assert refusal == "the Authorization header is not a bearer token"
    else:
        assert re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token)
        assert header.strip(" \t").endswith(token)
        assert header.strip(" \t").lower().startswith("bearer ")


def test_a_json_web_token_is_a_bearer_token():
    part = base64.urlsafe_b64encode(json.dumps({"sub": "x" * 500}).encode()).rstrip(b"=").decode()
    assert bearer_token([f"Bearer {part}.{part}.{part}"]) == f"{part}.{part}.{part}"


def test_without_a_header_the_hint_says_how_to_get_a_token():
    with pytest.raises(Unauthenticated, match="no Authorization") as refused:
        bearer_token([])
    assert "ID token" in refused.value.hint
    assert "BKCTL_TOKEN" in refused.value.hint


def test_a_token_may_be_as_long_as_the_longest_jwt():
    assert bearer_token(["Bearer " + "a" * LONGEST_BEARER]) == "a" * LONGEST_BEARER
    with pytest.raises(Unauthenticated):
        bearer_token(["Bearer " + "a" * (LONGEST_BEARER + 1)])


def test_two_headers_are_refused_even_if_both_are_valid():
    with pytest.raises(Unauthenticated, match="more than one"):
        bearer_token([f"Bearer {TOKEN}", f"Bearer {TOKEN}"])


class Says:
    """An authenticator that returns these verdicts for one bearer token."""

    def __init__(self, bearer: str, *verdicts: Verdict) -> None:
        self._bearer, self._verdicts = bearer, verdicts

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        return self._verdicts if bearer == self._bearer else ()


class Away:
    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        raise Unavailable("the issuer is away")


def access(
    *authenticators: Authenticator, pools: Collection[Pool] = (), configs: Collection[OIDCConfig] = ()
) -> AccessControl:
    return AccessControl([authenticators], lambda: pools, lambda: configs)


CI, DEPLOY = Identity("ci"), Identity("deploy", authority="https://issuer.example")


async def test_a_caller_has_all_identities_of_the_token_in_order():
    control = access(
        AdminTokenAuthenticator(TOKEN),
        Says("ci-token", Verdict("a", CI), Verdict("b", refusal="not here")),
        Says("ci-token", Verdict("c", DEPLOY)),
    )
    (admin,) = (await control.caller([f"Bearer {TOKEN}"])).identities
    assert (admin.name, admin.admin) == ("admin", True)
    assert (await control.caller(["Bearer ci-token"])).identities == (CI, DEPLOY)


class Hangs:
    """An authenticator that never has a result."""

    async def authenticate(self, bearer: str, pool: Key | None = None) -> tuple[Verdict, ...]:
        await asyncio.Event().wait()
        raise AssertionError


async def test_nobody_waits_for_a_stage_after_the_one_that_accepts_them():
    stages = ([AdminTokenAuthenticator(TOKEN)], [Says("signed", Verdict("a", CI)), Away()], [Hangs()])
    control = AccessControl(stages, lambda: (), lambda: ())
    async with asyncio.timeout(60):
        assert (await control.caller([f"Bearer {TOKEN}"])).identities[0].admin
        assert (await control.caller(["Bearer signed"])).identities == (CI,)


@pytest.mark.parametrize("token", ["K" * 43, "k" * 42, "k" * 44, "k"])
async def test_an_unknown_token_is_refused_and_not_quoted(token):
    with pytest.raises(Unauthenticated, match="not known") as refused:
        await access(AdminTokenAuthenticator(TOKEN)).caller([f"Bearer {token}"])
    assert f" {token} " not in f"{refused.value.message} {refused.value.hint}"


async def test_the_reason_of_a_refusal_appears_once():
    control = access(
        Says("t", Verdict("a", refusal="it expired"), Verdict("b", refusal="it expired")),
        AdminTokenAuthenticator(TOKEN),
    )
    with pytest.raises(Unauthenticated, match=r"refused: it expired$"):
        await control.caller(["Bearer t"])


async def test_a_genuine_token_of_a_stranger_is_forbidden():
    control = access(
        Says("t", Verdict("a", refusal="aud is x"), Verdict("b", refusal="claim team is x", genuine=True))
    )
    with pytest.raises(Forbidden, match=r"refused: aud is x; claim team is x$"):
        await control.caller(["Bearer t"])


async def test_an_unavailable_authenticator_is_no_refusal_and_does_not_affect_accepted_callers():
    with pytest.raises(Unavailable, match="away"):
        await access(Away()).caller(["Bearer t"])
    control = access(Away(), Says("t", Verdict("a", CI)))
    assert (await control.caller(["Bearer t"])).identities == (CI,)


def pool(**auth: object) -> Pool:
    return Pool(metadata=Metadata(name="amd64", namespace="team"), spec=PoolSpec.model_validate({"auth": auth}))


def test_while_nothing_is_configured_every_authenticated_caller_has_access():
    mine = pool()
    assert access(pools=[mine]).decide([CI], mine).allowed
    ruled = pool(rbac={"rules": [{"users": ["ann"]}]})
    for control in (
        access(pools=[mine, ruled]),
        access(configs=[OIDCConfig.model_validate({"metadata": {"name": "c"}, "spec": SPEC})]),
    ):
        decision = control.decide([CI], mine)
        assert not decision.allowed
        assert not control.open_to_all
        error = forbidden(decision, str(mine.key))
        assert error.message.startswith(
            "ci may not use pool team/amd64: the pool has no rule in spec.auth.rbac.rules"
        )
        assert "bkpool auth check" in error.hint
        assert control.decide([CI, Identity("admin", admin=True)], mine).allowed


def test_while_a_pool_or_an_issuer_cannot_be_read_access_counts_as_configured():
    unreadable = []
    control = AccessControl([[]], list, list, any_unreadable=lambda: bool(unreadable))
    assert control.open_to_all
    unreadable.append("it may be the one that restricts access")
    assert not control.open_to_all


def test_a_caller_without_identity_has_no_access():
    assert "the caller may not use pool p" in forbidden(access().decide([], pool()), "p").message
