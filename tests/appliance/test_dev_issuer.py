"""The development issuer over HTTP: its tokens can be verified with its documents, and it refuses bad requests."""

from datetime import UTC, datetime

import jwt
import pytest
from aiohttp.test_utils import TestClient, TestServer
from cryptography.hazmat.primitives.asymmetric import rsa

from bkpool.appliance.dev_issuer import dev_config, make_dev_issuer
from bkpool.appliance.preflight import check_settings
from bkpool.appliance.run_options import Role, RunOptions
from bkpool.core.errors import InvalidInput
from bkpool.settings import Settings

URL = "http://127.0.0.1:8888"


@pytest.fixture
def now():
    """The issuer's clock in one test. Tokens are valid for minutes, and all tests together may take longer."""
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture
async def issuer(key, now, monkeypatch):
    monkeypatch.setattr(rsa, "generate_private_key", lambda **_: key)  # which takes a tenth of a second
    async with TestClient(TestServer(make_dev_issuer(URL, lambda: now))) as client:
        yield client


async def claims_of(issuer, token, audience="buildkit-controller"):
    """The claims of the token, verified in the usual way: from the discovery document on."""
    document = await (await issuer.get("/.well-known/openid-configuration")).json()
    assert document["issuer"] == URL
    path = document["jwks_uri"].removeprefix(URL)
    [key] = jwt.PyJWKSet.from_dict(await (await issuer.get(path)).json()).keys
    assert jwt.get_unverified_header(token)["kid"] == key.key_id
    return jwt.decode(token, key, algorithms=["RS256"], audience=audience, issuer=URL)


async def test_a_token_contains_the_requested_claims(issuer, now):
    asked = {"sub": "me", "aud": "x", "claims": {"groups": ["a"], "repository": "o/r"}, "duration": "2h"}
    reply = await (await issuer.post("/token", json=asked)).json()
    claims = await claims_of(issuer, reply["token"], "x")
    assert reply["expiresIn"] == claims["exp"] - claims["iat"] == 7200
    assert {name: claims[name] for name in ("iss", "sub", "actor", "groups", "repository")} == {
        "iss": URL,
        "sub": "me",
        "actor": "me",
        "groups": ["a"],
        "repository": "o/r",
    }
    assert claims["iat"] == int(now.timestamp())


async def test_the_actor_is_the_subject_unless_the_request_gives_one(issuer):
    reply = await (await issuer.post("/token", json={"sub": "me", "claims": {"actor": "you"}})).json()
    assert (await claims_of(issuer, reply["token"]))["actor"] == "you"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({}, "sub"),
        ({"sub": ""}, "sub"),
        ({"sub": 1}, "sub"),
        ({"sub": "a", "aud": []}, "aud"),
        ({"sub": "a", "claims": []}, "claims"),
        ({"sub": "a", "claims": {"iss": "x"}}, "claims.iss"),
        ({"sub": "a", "claims": {"exp": 1}}, "claims.exp"),
        ({"sub": "a", "claims": {"iat": 1}}, "claims.iat"),
        ({"sub": "a", "duration": "25h"}, "duration"),
        ({"sub": "a", "duration": "0"}, "duration"),
        ({"sub": "a", "duration": "banana"}, "duration"),
        ({"sub": "a", "more": 1}, "more"),
    ],
)
async def test_the_error_names_the_wrong_field(issuer, asked, field):
    answer = await issuer.post("/token", json=asked)
    assert answer.status == 400
    error = (await answer.json())["error"]
    assert (error["field"], error["code"]) == (field, "InvalidInput")
    assert field in error["message"]


async def test_invalid_json_and_requests_of_web_pages_are_refused(issuer):
    answer = await issuer.post("/token", data=b"{", headers={"Content-Type": "application/json"})
    assert (answer.status, (await answer.json())["error"]["field"]) == (400, "body")
    answer = await issuer.post("/token", data=b'{"sub": "a"}', headers={"Content-Type": "text/plain"})
    assert (answer.status, (await answer.json())["error"]["field"]) == (400, "Content-Type")
    answer = await issuer.post("/token", json={"sub": "a"}, headers={"Host": "evil.example:8888"})
    assert (answer.status, (await answer.json())["error"]["code"]) == (403, "Forbidden")
    answer = await issuer.get("/nowhere")
    assert (answer.status, (await answer.json())["error"]["code"]) == (404, "NotFound")


async def test_it_answers_like_githubs_token_url(issuer):
    headers = {"Authorization": "bearer any"}
    query = "api-version=2.0&repository=o/r&ref=refs/tags/1&actor=me&audience=buildkit-controller"
    reply = await (await issuer.get(f"/actions/token?{query}", headers=headers)).json()
    claims = await claims_of(issuer, reply["value"])
    assert {name: claims[name] for name in ("sub", "actor", "repository", "repository_owner", "ref")} == {
        "sub": "repo:o/r:ref:refs/tags/1",
        "actor": "me",
        "repository": "o/r",
        "repository_owner": "o",
        "ref": "refs/tags/1",
    }
    assert claims["exp"] - claims["iat"] == 300
    reply = await (await issuer.get("/actions/token", headers=headers)).json()
    assert (await claims_of(issuer, reply["value"], "https://github.com/octo-org"))["actor"] == "octocat"
    assert (await issuer.get("/actions/token?audience=x")).status == 401


def test_its_configuration_trusts_it_for_every_pool():
    config = dev_config(URL)
    assert (str(config.key), config.spec.issuer, config.spec.audience) == (
        *("buildkit-system/dev-issuer", URL, None),
    )
    assert (config.spec.claims_mapping.user, config.spec.pools, config.spec.tenant_claim) == ("actor", ("*",), None)


@pytest.mark.parametrize(
    ("given", "audience"),
    [
        ({}, "buildkit-controller"),
        ({"api": {"external_url": "https://builds.example.com"}}, "https://builds.example.com"),
        ({"api": {"external_url": "https://b.example"}, "identity": {"audience": "mine"}}, "mine"),
    ],
)
def test_tokens_are_for_the_url_of_the_api_unless_an_audience_is_set(tmp_path, given, audience):
    options = RunOptions(home=tmp_path, cache=tmp_path, settings=Settings.model_validate(given))
    assert options.audience == audience


async def test_a_token_for_which_no_audience_is_asked_is_for_the_appliance(now):
    async with TestClient(TestServer(make_dev_issuer(URL, lambda: now, "https://b.example"))) as client:
        reply = await client.post("/token", json={"sub": "me"})
        assert (await claims_of(client, (await reply.json())["token"], "https://b.example"))["sub"] == "me"


def _with_issuer(home, given):
    issuer = {"enabled": True, **given.get("dev_issuer", {})}
    settings = Settings.model_validate({**given, "dev_issuer": issuer})
    return RunOptions(home=home, cache=home, settings=settings)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"dev_issuer": {"address": ("0.0.0.0", 8888)}}, "--dev-issuer-address"),
        ({"dev_issuer": {"address": ("127.0.0.1", 0)}}, "--dev-issuer-address"),
        ({"api": {"address": ("192.0.2.1", 8082), "plain_http": True}}, "--api-address"),
        ({"api": {"address": ("192.0.2.1", 8082), "tls": True}}, "--api-address"),
        ({"appliance": {"roles": frozenset({Role.API})}}, "--dev-issuer"),
    ],
)
def test_addresses_that_other_machines_reach_are_refused(tmp_path, given, field):
    options = _with_issuer(tmp_path, given)
    with pytest.raises(InvalidInput, match=field) as caught:
        check_settings(options)
    assert caught.value.field == field


def test_it_has_a_url_only_if_it_is_enabled(tmp_path):
    options = _with_issuer(tmp_path, {})
    check_settings(options)
    assert options.dev_issuer_url == URL
    assert RunOptions(home=tmp_path, cache=tmp_path).dev_issuer_url is None
