from __future__ import annotations

import base64
import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bkpool.core.errors import Forbidden, Unauthenticated
from bkpool.core.names import Key
from bkpool.identity import Identity
from bkpool.identity.access import authenticate, bearer_token, may_use
from bkpool.identity.local import AdminToken

TOKENS = st.from_regex(re.compile(r"[A-Za-z0-9._~+/-]{1,300}={0,2}"), fullmatch=True)
TOKEN = "k" * 43


@given(
    TOKENS, st.sampled_from(["Bearer", "bearer", "BEARER", "bEaReR"]), st.integers(1, 3), st.sampled_from(["", " "])
)
def test_a_bearer_token_is_read_whatever_the_case_of_the_scheme(token, scheme, spaces, around):
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
def test_a_header_is_a_bearer_token_or_a_refusal_that_does_not_repeat_it(header):
    try:
        token, refusal = bearer_token([header]), ""
    except Unauthenticated as error:
        token, refusal = None, error.message
    if token is None:
        assert refusal == "The Authorization header is not a bearer token"
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
    assert "admin.token" in refused.value.hint
    assert "BKCTL_TOKEN" in refused.value.hint


def test_a_token_longer_than_any_header_is_refused():
    assert bearer_token(["Bearer " + "a" * 8183]) == "a" * 8183
    with pytest.raises(Unauthenticated):
        bearer_token(["Bearer " + "a" * 8184])


def test_two_headers_are_refused_even_if_both_are_right():
    with pytest.raises(Unauthenticated, match="more than one"):
        bearer_token([f"Bearer {TOKEN}", f"Bearer {TOKEN}"])


class Knows:
    def __init__(self, token: str, name: str) -> None:
        self._token, self._name = token, name

    async def authenticate(self, bearer: str) -> Identity | None:
        return Identity(self._name) if bearer == self._token else None


async def test_the_first_authenticator_that_knows_the_token_says_who_it_is():
    ways = [AdminToken(TOKEN), Knows("ci-token", "ci"), Knows("ci-token", "never asked")]

    assert await authenticate(ways, [f"Bearer {TOKEN}"]) == Identity("admin", admin=True)
    assert await authenticate(ways, ["Bearer ci-token"]) == Identity("ci", admin=False)


@pytest.mark.parametrize("token", ["K" * 43, "k" * 42, "k" * 44, "k"])
async def test_a_token_that_nobody_knows_is_refused_and_not_repeated(token):
    with pytest.raises(Unauthenticated, match="not known") as refused:
        await authenticate([AdminToken(TOKEN)], [f"Bearer {token}"])
    assert f" {token} " not in f"{refused.value.message} {refused.value.hint}"


def test_the_admin_may_use_every_pool_and_nobody_else_any():
    pool = Key("team", "amd64")
    may_use(Identity("admin", admin=True), pool)
    with pytest.raises(Forbidden, match="ci may not use pool team/amd64"):
        may_use(Identity("ci"), pool)
