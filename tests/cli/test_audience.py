"""An ID token is made for the appliance that gets it: no other installation, and no server in between, can use it."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from bkpool.cli import audience
from bkpool.cli.client import Client
from bkpool.core.errors import InvalidInput

from .conftest import forget_surroundings

ELSEWHERE = "https://builds.example.com"


@pytest.fixture(autouse=True)
def job(monkeypatch, home, api):
    """A job on GitHub; the runner is the same server as the API."""
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{api.url}/actions/token?api-version=2.0")
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "for-the-runner")
    api.answers |= {"token": (200, {"value": "of-github"}), "pools": (200, {"pools": []})}


def requested(api):
    """The audience of the token that was requested of the runner."""
    (found,) = parse_qs(urlsplit(api.next().path).query)["audience"]
    return found


def test_a_token_is_made_for_the_url_of_the_appliance(api, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", f"{api.url}/")
    api.answers["audience"] = (200, {"audience": api.url})
    Client().pools()
    assert requested(api) == api.url
    (asked,) = api.asked_for_audience
    assert "Authorization" not in asked.headers


def test_an_appliance_without_a_url_gets_a_token_for_the_usual_audience(api):
    Client().pools()
    assert requested(api) == "buildkit-controller"


def test_an_appliance_of_an_earlier_version_does_so_too(api):
    api.answers["audience"] = (404, {"error": {"code": "NotFound", "message": "there is no such route"}})
    Client().pools()
    assert requested(api) == "buildkit-controller"


@pytest.mark.parametrize("wanted", [ELSEWHERE, "sts.amazonaws.com", "", None, ["buildkit-controller"]])
def test_a_server_gets_no_token_for_another_one(api, wanted):
    """The attack: a server that callers reach by mistake, or by a forged name, asks for a token that it can use."""
    api.answers["audience"] = (200, {"audience": wanted})
    with pytest.raises(InvalidInput, match="which is not its own address") as refused:
        Client().pools()
    assert "BKCTL_AUDIENCE" in refused.value.hint
    assert api.calls.empty(), "no token was requested, and nothing was called"


def test_the_appliance_of_this_home_may_have_another_url_for_others(api, home, appliance, monkeypatch):
    monkeypatch.delenv("BKCTL_ENDPOINT")
    (home / "appliance.json").write_text(json.dumps(appliance | {"devIssuer": api.url}))
    api.answers |= {"audience": (200, {"audience": ELSEWHERE}), "token": (200, {"token": "minted", "expiresIn": 60})}
    assert Client().audience() == ELSEWHERE


def test_the_audience_that_the_user_gives_is_not_asked_for(api, monkeypatch):
    monkeypatch.setenv("BKCTL_AUDIENCE", "mine")
    Client().pools()
    assert (requested(api), api.asked_for_audience) == ("mine", [])


@pytest.mark.parametrize(
    ("endpoint", "wanted"),
    [
        ("https://Builds.Example.com:443/", ELSEWHERE),
        ("https://builds.example.com:8082", "https://builds.example.com:8082"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_one_url_written_in_several_ways(endpoint, wanted):
    assert audience.accepted(wanted, endpoint, own=False) == wanted


def test_oidc_token_asks_the_appliance_and_does_without_one(api, called, monkeypatch):
    api.answers |= {"audience": (200, {"audience": api.url}), "token": (200, {"token": "e30.e30.c2ln"})}
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)  # `called` has forgotten the earlier one
    assert called("oidc-token", "--issuer", api.url)[0] == 0
    assert api.next("/token").body["aud"] == api.url
    monkeypatch.setenv("BKCTL_ENDPOINT", "http://127.0.0.1:1")
    assert called("oidc-token", "--issuer", api.url)[0] == 0
    assert api.next("/token").body["aud"] == "buildkit-controller"
