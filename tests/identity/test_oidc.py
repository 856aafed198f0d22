"""From a bearer token to verdicts: which configurations accept it, and when the issuer is asked."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bkpool.core.auth import OIDCConfig
from bkpool.core.errors import Unavailable
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.public_issuers import PUBLIC_ISSUERS
from bkpool.core.resource import Metadata
from bkpool.identity import EVERYWHERE, Scope
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.oidc import OidcAuthenticator, TrustedIssuer, trusted_issuers
from support.issuer import AUDIENCE, Issuer, forge, signing_key

SYSTEM = "buildkit-system"


def config(issuer: str, name: str = "ci", namespace: str = SYSTEM, **spec: object) -> OIDCConfig:
    return OIDCConfig.model_validate(
        {
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"issuer": issuer, "audience": AUDIENCE, **spec},
        }
    )


def pool(name: str, *methods: dict[str, object]) -> Pool:
    spec = PoolSpec.model_validate({"auth": {"methods": [{"type": "oidc", "oidc": method} for method in methods]}})
    return Pool(metadata=Metadata(name=name), spec=spec)


@pytest.fixture
async def judge():
    """Authenticates a token with these configurations and pools."""
    issuers = IssuerKeys(clock=time.monotonic, timeout=60)

    async def judging(token: str, *objects: OIDCConfig | Pool, audience: str = AUDIENCE):
        configs = [one for one in objects if isinstance(one, OIDCConfig)]
        pools = [one for one in objects if isinstance(one, Pool)]
        trusted = trusted_issuers(configs, pools, SYSTEM, audience)
        return await OidcAuthenticator(issuers, lambda: trusted, now).authenticate(token)

    yield judging
    await issuers.close()


def now() -> datetime:
    return datetime.now(UTC)


# --- which configurations there are: pure ---------------------------------------------------------------------------


def test_the_scope_of_a_configuration():
    own = {"issuer": "https://c.example", "audience": "x"}
    found = trusted_issuers(
        [
            config("https://a.example", pools=["a*"]),
            config("https://b.example", "kc", "team"),
            config("https://off.example", "off", enabled=False),
        ],
        [pool("p", own, {**own, "issuer": "https://d.example"}), pool("q")],
        SYSTEM,
    )
    assert [(one.source, one.settings.issuer, one.scope, one.granted, one.refusal) for one in found] == [
        ("BuildKitOIDCConfig buildkit-system/ci", "https://a.example", EVERYWHERE, ("a*",), ""),
        ("BuildKitOIDCConfig team/kc", "https://b.example", Scope("team"), (), ""),
        ("BuildKitPool default/p", "https://c.example", Scope("default", "p"), (), ""),
        ("BuildKitPool default/p", "https://d.example", Scope("default", "p"), (), ""),
    ]


def test_a_configuration_without_a_needed_condition_is_listed_with_its_refusal():
    own = {"issuer": "https://gitlab.com", "audience": "x"}
    for found in trusted_issuers([config("https://gitlab.com")], [pool("p", own)], SYSTEM):
        assert "strangers would be let in" in found.refusal


# --- verdicts -------------------------------------------------------------------------------------------------------


async def test_a_valid_token_gives_an_identity(issuer, judge):
    (verdict,) = await judge(issuer.token(sub="bob"), config(issuer.url, pools=["a*"]))
    assert verdict.source == verdict.identity.source == "BuildKitOIDCConfig buildkit-system/ci"
    assert (verdict.identity.name, verdict.identity.authority) == ("bob", issuer.url)
    assert (verdict.identity.granted, verdict.identity.scope) == (("a*",), EVERYWHERE)
    assert not verdict.identity.admin
    assert (verdict.refusal, verdict.genuine) == ("", False)


async def test_a_token_for_another_installation_is_refused(issuer, judge):
    """The attack: the operator of one installation uses a token that a job has sent there at another one."""
    ours, theirs = "https://builds.example.com", "https://builds.example.net"
    silent = config(issuer.url)
    silent = silent.but(spec=silent.spec.but(audience=None))
    (verdict,) = await judge(issuer.token(aud=theirs), silent, audience=ours)
    assert verdict.refusal == f"aud is {theirs!r}, not {ours!r}"
    (verdict,) = await judge(issuer.token(aud=AUDIENCE), silent, audience=ours)
    assert verdict.refusal == f"aud is {AUDIENCE!r}, not {ours!r}"
    (verdict,) = await judge(issuer.token(aud=ours), silent, audience=ours)
    assert verdict.identity is not None
    (verdict,) = await judge(issuer.token(aud=AUDIENCE), config(issuer.url), audience=ours)
    assert verdict.identity is not None, "it stays accepted where it is configured"
    of_pool = pool("p", {"issuer": issuer.url})
    (verdict,) = await judge(issuer.token(aud=ours), of_pool, audience=ours)
    assert verdict.identity is not None


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
async def test_other_algorithms(issuer, judge, alg):
    key = issuer.rotate(f"new-{alg}", alg, keep=True)
    (verdict,) = await judge(issuer.token(key=key), config(issuer.url))
    assert verdict.identity
    assert (await judge(issuer.token(key=key, header={"kid": None}), config(issuer.url)))[0].identity


async def test_each_configuration_checks_the_token_separately(issuer, judge):
    mine = {"issuer": issuer.url, "audience": AUDIENCE}
    verdicts = await judge(
        issuer.token(sub="ann", team="red"),
        config(issuer.url, "all"),
        config(issuer.url, "other", audience="another"),
        config(issuer.url, "blue", conditions=[{"claim": "team", "values": ["blue"]}]),
        config("https://else.example", "else"),
        pool("p", {**mine, "claimsMapping": {"user": "team"}}),
    )
    assert [(v.source.split("/")[1], v.identity and v.identity.name, v.refusal, v.genuine) for v in verdicts] == [
        ("all", "ann", "", False),
        ("other", None, "aud is 'buildkit-controller', not 'another'", False),
        ("blue", None, "claim team is 'red'; conditions require 'blue'", True),
        ("p", "red", "", False),
    ]
    assert verdicts[-1].identity.scope == Scope("default", "p")
    assert issuer.count() == 1


async def test_client_id_allows_another_authorized_party(issuer, judge):
    token = issuer.token(azp="cli")
    refused, taken = await judge(token, config(issuer.url), config(issuer.url, "cli", clientID="cli"))
    assert "azp is 'cli', not 'buildkit-controller'" in refused.refusal
    assert taken.identity


async def test_conditions_are_mentioned_only_for_genuine_tokens(issuer, judge):
    strict = config(issuer.url, conditions=[{"claim": "team", "values": ["secret-team"]}])
    forged = issuer.token(key=signing_key("other"), header={"kid": "key-1"}, team="blue")
    (verdict,) = await judge(forged, strict)
    assert (verdict.refusal, verdict.genuine) == ("the token's signature is wrong", False)


async def test_a_token_of_an_unknown_issuer_is_refused(issuer, judge):
    (verdict,) = await judge(issuer.token(), config("https://else.example"))
    assert verdict.refusal == f"its issuer '{issuer.url}' (iss) is not configured here"
    assert not issuer.requests


@pytest.mark.parametrize("iss", ["{}/", "{}.evil.example", "{}@evil.example", "{}/x", "", None, 7])
async def test_an_issuer_must_be_equal_to_the_configured_one(issuer, judge, iss):
    (verdict,) = await judge(
        issuer.token(iss=iss.format(issuer.url) if isinstance(iss, str) else iss), config(issuer.url)
    )
    assert verdict.refusal.endswith("(iss) is not configured here")
    assert not issuer.requests


async def test_service_account_tokens_are_left_to_another_authenticator(issuer, judge):
    token = issuer.token(sub="system:serviceaccount:ci:runner")
    assert await judge(token, config("https://else.example")) == ()
    (verdict,) = await judge(token, config(issuer.url))
    assert "must not begin with system:, group:, pool:" in verdict.refusal


@pytest.mark.parametrize("bearer", ["", "k" * 43, "a.b.c", "pool-token", "ey"])
async def test_a_bearer_token_that_is_not_a_jwt_is_ignored(judge, issuer, bearer):
    assert await judge(bearer, config(issuer.url)) == ()


@pytest.mark.parametrize(
    ("token", "why"),
    [
        (lambda it: forge({"alg": "none"}, it.claims(), None), "alg is 'none'"),
        (lambda it: it.token()[:-2] + "==", "signature is not base64url"),
        (lambda it: "ey" + "J" * 1_000_000 + ".a.b", "longer than 16384"),
        (lambda it: it.token(aud="other"), "aud is 'other'"),
        (lambda it: it.token(exp=1), "expired"),
        (lambda it: it.token(exp=None), "exp is missing"),
        (lambda it: it.token(sub=None), "sub is missing"),
        (lambda it: it.token(nbf=2**33), "nbf"),
    ],
    ids=["none", "padding", "1MB", "aud", "expired", "no-exp", "no-sub", "nbf"],
)
async def test_the_issuer_is_not_asked_for_a_token_that_is_refused_anyway(issuer, judge, token, why):
    issuer.hang("/jwks")
    (verdict,) = await judge(token(issuer), config(issuer.url))
    assert why in verdict.refusal
    assert not issuer.requests


@pytest.mark.parametrize(("leeway", "refusal"), [(30, "expired"), (90, "")])
async def test_the_clock_of_an_issuer_may_differ_by_the_leeway(issuer, leeway, refusal):
    issuers = IssuerKeys(clock=time.monotonic, timeout=60)
    trusted = [TrustedIssuer("x", config(issuer.url).spec, AUDIENCE)]
    token = issuer.token(exp=int(now().timestamp()) - 60)
    (verdict,) = await OidcAuthenticator(issuers, lambda: trusted, now, leeway).authenticate(token)
    assert refusal in verdict.refusal
    assert (verdict.identity is None) is bool(refusal)
    await issuers.close()


async def test_a_key_that_the_issuer_does_not_have_is_refused(issuer, judge):
    other = signing_key("evil")
    (verdict,) = await judge(issuer.token(key=other), config(issuer.url))
    assert verdict.refusal == f"{issuer.url} does not have a key 'evil' for RS256"
    (verdict,) = await judge(issuer.token(key=other, header={"jwk": other.jwk}), config(issuer.url))
    assert "does not have a key" in verdict.refusal


async def test_a_public_issuer_without_a_condition_accepts_no_token(issuer, judge, monkeypatch):
    monkeypatch.setitem(PUBLIC_ISSUERS, issuer.url, PUBLIC_ISSUERS["https://gitlab.com"])
    (verdict,) = await judge(issuer.token(), config(issuer.url))
    assert "strangers would be let in" in verdict.refusal
    assert not issuer.requests
    loose = config(issuer.url, conditions=[{"claim": "namespace_path", "patterns": ["my-group*"]}])
    good = config(issuer.url, "good", conditions=[{"claim": "namespace_path", "patterns": ["my-group/*"]}])
    bad, fine = await judge(issuer.token(namespace_path="my-group/a"), loose, good)
    assert (bad.identity, fine.identity.name) == (None, "ann")


async def test_an_unreachable_issuer_is_reported_unless_the_token_is_refused_anyway(judge):
    with Issuer() as issuer:
        good, old = issuer.token(), issuer.token(exp=1)
    with pytest.raises(Unavailable, match="cannot be fetched"):
        await judge(good, config(issuer.url), config(issuer.url, "other", audience="another"))
    (verdict,) = await judge(old, config(issuer.url))
    assert "expired" in verdict.refusal


@settings(deadline=None)
@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda it: forge(it, it, None)))
async def test_any_bearer_token_is_accepted_or_refused(bearer):
    issuers = IssuerKeys(clock=time.monotonic)
    trusted = [TrustedIssuer("x", config("https://a.example").spec, AUDIENCE)]
    for verdict in await OidcAuthenticator(issuers, lambda: trusted, now).authenticate(bearer):
        assert verdict.refusal
        assert verdict.identity is None
