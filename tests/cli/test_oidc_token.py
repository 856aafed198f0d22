"""`oidc-token`: the request to the issuer, and that stdout has only the token."""

import json

import pytest


@pytest.fixture
def issuer(api):
    api.answers["token"] = (200, {"token": "e30.e30.c2ln", "expiresIn": 60})
    return api


def test_only_the_token_is_printed_also_into_a_pipe(called, issuer):
    code, out, err = called("oidc-token", "--issuer", issuer.url, "--actor", "me")
    assert (code, out, err) == (0, "e30.e30.c2ln\n", "")
    assert issuer.next("/token").body == {
        "sub": "me",
        "aud": "buildkit-controller",
        "claims": {"actor": "me"},
        "duration": "1h",
    }


def test_every_option_works_also_under_its_older_name(called, issuer):
    options = ("--oidc-actor", "me", "--oidc-repository", "o/r", "--oidc-subject", "s", "--audience", "a")
    claims = ("--claim", "groups=[1]", "--claim", "ref=refs/x=y", "--claim", "n=", "--duration", "5m")
    code, out, _ = called("oidc-token", "--issuer", f"{issuer.url}/", *options, *claims, "--json")
    assert (code, json.loads(out)) == (0, {"token": "e30.e30.c2ln", "expiresIn": 60})
    assert issuer.next("/token").body == {
        "sub": "s",
        "aud": "a",
        "claims": {"actor": "me", "repository": "o/r", "groups": [1], "ref": "refs/x=y", "n": ""},
        "duration": "5m",
    }


def test_the_issuer_of_the_local_appliance_is_found(called, issuer, appliance, home):
    (home / "appliance.json").write_text(json.dumps(appliance | {"devIssuer": issuer.url}))
    assert called("oidc-token")[0] == 0


def test_without_an_issuer_the_hint_says_how_to_start_one(called):
    code, out, err = called("oidc-token", "--issuer", "http://127.0.0.1:1")
    assert (code, out) == (69, "")
    assert err.endswith("hint: Start one with `bkpool up --dev-issuer`.\n")


def test_the_reason_of_the_issuer_is_shown(called, issuer):
    error = {"code": "InvalidInput", "message": "duration: must be from 1s to 24h", "hint": "Such as 1h."}
    issuer.answers["token"] = (400, {"error": error})
    code, _, err = called("oidc-token", "--issuer", issuer.url, "--duration", "48h")
    assert (code, err) == (2, "error: duration: must be from 1s to 24h\nhint: Such as 1h.\n")
