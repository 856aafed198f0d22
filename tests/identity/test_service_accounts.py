from __future__ import annotations

import asyncio
import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.errors import Forbidden, InvalidInput, Unauthenticated, Unavailable
from bkpool.core.names import AUDIENCE
from bkpool.core.pool import Pool
from bkpool.core.remembered_caller import CallerMethod
from bkpool.core.resource import Metadata
from bkpool.identity import Identity, Verdict
from bkpool.identity.remembering import remembered
from bkpool.identity.service_accounts import MAX_CONCURRENT_REVIEWS, ServiceAccountAuthenticator, judge
from support.captured_logs import capture_logs

CI = "system:serviceaccount:team:ci"
GROUPS = ["system:serviceaccounts", "system:serviceaccounts:team", "system:authenticated"]


def segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def token(sub: object = CI, aud: object = (AUDIENCE,), signature: str = "c2lnbmF0dXJl") -> str:
    return f"{segment({'alg': 'RS256'})}.{segment({'sub': sub, 'aud': aud})}.{signature}"


def status(**changes: object) -> dict:
    return {"authenticated": True, "audiences": [AUDIENCE], "user": {"username": CI, "groups": GROUPS}, **changes}


class Cluster:
    """A KubeApi that returns prepared TokenReviews."""

    def __init__(self, answer: dict | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[str, dict]] = []
        self.at_once = self.most_at_once = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.full = asyncio.Event()

    async def create(self, path: str, body: dict) -> dict:
        self.asked.append((path, body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.at_once == MAX_CONCURRENT_REVIEWS:
            self.full.set()
        try:
            await self.may_answer.wait()
        finally:
            self.at_once -= 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return {**body, "status": self.answer}


async def test_the_identity_comes_from_the_api_server():
    cluster = Cluster(status())
    expected = Identity(
        CI,
        authority="kubernetes",
        source="ServiceAccount token",
        groups=tuple(GROUPS),
        method=CallerMethod.SERVICE_ACCOUNT,
    )
    assert await ServiceAccountAuthenticator(cluster).authenticate(token()) == (
        Verdict("ServiceAccount token", expected),
    )
    ((path, body),) = cluster.asked
    assert path == "/apis/authentication.k8s.io/v1/tokenreviews"
    assert body["spec"] == {"token": token(), "audiences": [AUDIENCE]}


@pytest.mark.parametrize(
    "bearer",
    [
        "k" * 43,
        "a.b.c",
        "eyJ.x.y",
        token(sub="repo:o/r:ref:refs/heads/main"),
        token(sub="x-system:serviceaccount:a:b"),
        token(sub=None),
        token(sub=[CI]),
        f"{token()}.more",
        f"{segment({'alg': 'RS256'})}.{segment([CI])}.x",
        f"{segment({'alg': 'RS256'})}.{'A' * 7}.x",
        "..",
        "",
    ],
)
async def test_other_tokens_are_never_sent_to_the_api_server(bearer):
    cluster = Cluster(status())
    assert await ServiceAccountAuthenticator(cluster).authenticate(bearer) == ()
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("bearer", "review_status", "says"),
    [
        (token(), {"error": "[invalid bearer token, expired]"}, "token: [invalid bearer token, expired]"),
        (token(), {}, "refuses"),
        (token(), {"authenticated": False, "user": {"username": CI}}, "refuses"),
        (token(), status(authenticated="true"), "refuses"),
        (token(aud=["https://k.svc"]), {}, f"is for ['https://k.svc'], not for '{AUDIENCE}'"),
        (token(aud="vault"), {}, "is for 'vault', not for"),
        (token(aud=None), {}, "is for None, not for"),
        (token(), status(audiences=[]), "did not check"),
        (token(), status(audiences=None), "did not check"),
        (token(), status(audiences=["other"]), "did not check"),
        (token(), status(audiences=AUDIENCE), "did not check"),
        (token(), status(user={"username": "alice", "groups": ["system:masters"]}), "not a ServiceAccount's"),
        (token(), status(user={}), "not a ServiceAccount's"),
        (token(), {"error": f"what is {token()}"}, "the reason is not shown"),
        (token(), {"error": "signature c2lnbmF0dXJl is bad"}, "the reason is not shown"),
        (token(), {"error": "two\nlines"}, "refuses the ServiceAccount token"),
    ],
)  # fmt: skip
async def test_a_refusal_of_the_api_server_gives_the_reason(bearer, review_status, says):
    (verdict,) = await ServiceAccountAuthenticator(Cluster(review_status)).authenticate(bearer)
    assert verdict.identity is None
    assert says in verdict.refusal
    assert not any(part in repr(verdict) for part in bearer.split("."))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([CI, AUDIENCE, "alice"]) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "authenticated": JSON,
        "audiences": st.just([AUDIENCE]) | JSON,
        "user": st.fixed_dictionaries({}, optional={"username": JSON, "groups": JSON}) | JSON,
        "error": JSON,
    },
)


@given(ANSWERS | JSON, st.dictionaries(st.sampled_from(["sub", "aud"]), JSON))
def test_only_a_complete_response_gives_an_identity(answer, claims):
    found = judge({"status": answer}, AUDIENCE, claims)
    sure = (
        isinstance(answer, dict)
        and answer.get("authenticated") is True
        and isinstance(answer.get("audiences"), list)
        and AUDIENCE in answer["audiences"]
        and isinstance(answer.get("user"), dict)
        and answer["user"].get("username") == CI
    )
    assert isinstance(found, Identity) is sure
    if sure:
        assert found.name == CI
        assert not found.admin
        assert all(isinstance(group, str) for group in found.groups)
    else:
        assert found


@pytest.mark.parametrize(
    "error",
    [
        Unavailable(f"Kubernetes: away ({token()})"),
        Forbidden("tokenreviews is forbidden"),
        Unauthenticated("the kubeconfig's credentials"),
        InvalidInput(f"spec.token: {token()}"),
    ],
)
async def test_an_unreachable_api_server_is_no_refusal(error):
    with capture_logs() as logs, pytest.raises(Unavailable, match="cannot be checked") as raised:
        await ServiceAccountAuthenticator(Cluster(error)).authenticate(token())
    (entry,) = logs
    for part in token().split("."):
        assert part not in f"{entry}{raised.value.message}{raised.value.hint}"


async def test_reviews_are_limited_in_number_and_in_time():
    cluster = Cluster(status())
    cluster.may_answer.clear()
    accounts = ServiceAccountAuthenticator(cluster)
    calls = [asyncio.create_task(accounts.authenticate(token())) for _ in range(3 * MAX_CONCURRENT_REVIEWS)]
    await cluster.full.wait()
    cluster.may_answer.set()
    answers = await asyncio.gather(*calls)
    assert all(verdict.identity for (verdict,) in answers)
    assert cluster.most_at_once == MAX_CONCURRENT_REVIEWS

    cluster.may_answer.clear()
    with pytest.raises(Unavailable):
        await ServiceAccountAuthenticator(cluster, timeout=0.01).authenticate(token())
    assert cluster.at_once == 0


async def test_a_remembered_account_is_recognised_without_a_question_to_the_api_server():
    cluster = Cluster(status())
    accounts = ServiceAccountAuthenticator(cluster)
    ((verdict,), pool) = (await accounts.authenticate(token()), Pool(metadata=Metadata(name="p")))
    cluster.asked.clear()
    caller = remembered(verdict.identity)
    assert await accounts.recall(caller, pool) == (verdict,)
    assert await accounts.recall(caller.but(method=CallerMethod.OIDC), pool) == ()
    assert cluster.asked == []
