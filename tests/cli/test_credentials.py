"""Which token goes to which appliance: the order of the sources, when a new token is fetched, and errors."""

import json
import threading
from base64 import urlsafe_b64encode
from itertools import product
from time import time

import pytest

from bkpool.cli import credentials, issuers
from bkpool.cli.client import Client
from bkpool.cli.credentials import RequestedClaims, expires_soon
from bkpool.core.errors import InvalidInput, Unauthenticated, Unavailable

from .conftest import forget_surroundings


@pytest.fixture(autouse=True)
def alone(monkeypatch, home):
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    monkeypatch.setattr(issuers, "RETRY_PAUSES", ())


def no_matter():
    return "buildkit-controller"


def token_of(life, mark="", now=None):
    ends = (time() if now is None else now) + life
    claims = urlsafe_b64encode(json.dumps({"exp": ends, "jti": mark}).encode()).decode().rstrip("=")
    return f"e30.{claims}.c2ln"


@pytest.fixture
def there(api, monkeypatch):
    """The endpoint is somebody else's appliance; returns the Authorization that a call brings there."""
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    api.answers["pools"] = (200, {"pools": []})

    def ask(client=None):
        (client or Client()).pools()
        return api.next("pools").headers.get("Authorization")

    return ask


@pytest.fixture
def sources(tmp_path, monkeypatch, api):
    """Every source of a token, in the order in which they count; switched on by name."""
    file, pod = tmp_path / "file", tmp_path / "pod"
    api.answers["token"] = (200, {"value": "of-github"})

    def github():
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{api.url}/actions/token?api-version=2.0")
        monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "for-the-runner")

    def in_file(path):
        path.write_text(f"of-{path.name}\n")

    return {
        "variable": lambda: monkeypatch.setenv("BKCTL_TOKEN", "of-variable\n"),
        "file": lambda: (in_file(file), monkeypatch.setenv("BKCTL_TOKEN_FILE", str(file))),
        "github": github,
        "gitlab": lambda: monkeypatch.setenv("BKPOOL_ID_TOKEN", "of-gitlab"),
        "pod": lambda: (in_file(pod), monkeypatch.setattr(credentials, "POD_TOKEN_FILE", pod)),
    }


def calls_to(api, end):
    return [call for call in list(api.calls.queue) if call.path.partition("?")[0].endswith(end)]


NAMES = ("variable", "file", "github", "gitlab", "pod")


@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for (i, a), (j, b) in product(enumerate(NAMES), repeat=2) if i <= j]
)
def test_the_first_available_source_is_used(api, sources, monkeypatch, first, second):
    for name in {first, second}:
        sources[name]()
    found = credentials.find(None, local=False, audience=no_matter)
    assert found.bearer() == f"of-{first}"


@pytest.mark.parametrize("name", NAMES)
def test_the_admin_token_comes_before_the_platform_token_only_on_the_local_appliance(sources, appliance, name):
    sources[name]()
    from_user = name in {"variable", "file"}
    assert (credentials.find(None, local=True, audience=no_matter).bearer() == "admin-secret") is not from_user
    assert credentials.find(None, local=False, audience=no_matter).bearer() != "admin-secret"


def test_without_a_source_there_is_no_credential(there):
    assert there() is None


def test_a_file_is_read_for_every_call(there, sources, tmp_path):
    sources["file"]()
    client = Client()
    assert there(client) == "Bearer of-file"
    (tmp_path / "file").write_text("newer")
    assert there(client) == "Bearer newer"


def test_the_request_to_github_is_as_documented(api, there, sources, monkeypatch):
    sources["github"]()
    monkeypatch.setenv("BKCTL_AUDIENCE", "a&b")
    client = Client()
    client.pools()
    call = api.next("/actions/token?api-version=2.0&audience=a%26b")
    assert call.headers["Authorization"] == "Bearer for-the-runner"
    assert api.next("pools").headers["Authorization"] == "Bearer of-github"


@pytest.mark.parametrize(("life", "asked"), [(300, 1), (20, 2)])
def test_the_token_of_github_is_used_until_it_is_about_to_expire(api, there, sources, life, asked):
    sources["github"]()
    api.answers["token"] = (200, {"value": token_of(life)})
    client = Client()
    client.pools()
    client.pools()
    assert len(calls_to(api, "/actions/token")) == asked


def test_a_refused_token_is_replaced_once_if_there_is_a_newer_one(api, there, sources):
    sources["github"]()
    refusal = {"error": {"code": "Unauthenticated", "message": "it has ended"}}
    tokens = iter([token_of(300, "first"), token_of(300, "second")])
    answers = iter([(401, refusal), (200, {"pools": []})])
    api.before_answer["token"] = lambda *_: api.answers.update(token=(200, {"value": next(tokens)}))
    api.before_answer["pools"] = lambda *_: api.answers.update(pools=next(answers))
    assert Client().pools() == {"pools": []}
    first, second = calls_to(api, "pools")
    assert first.headers["Authorization"] != second.headers["Authorization"]


def test_the_second_refusal_is_final_and_names_the_source_of_the_token(api, there, sources):
    sources["github"]()
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no"}})
    api.before_answer["token"] = lambda *_: api.answers.update(token=(200, {"value": token_of(300, str(time()))}))
    with pytest.raises(Unauthenticated):
        Client().pools()
    assert len(calls_to(api, "pools")) == 2


@pytest.mark.parametrize("name", ["variable", "file", "gitlab", "pod"])
def test_a_call_with_an_unchanged_token_is_not_repeated(api, there, sources, name):
    sources[name]()
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no"}})
    with pytest.raises(Unauthenticated) as caught:
        Client().pools()
    assert len(calls_to(api, "pools")) == 1
    assert "The token came from" in caught.value.hint


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"BKCTL_TOKEN_FILE": "/nonexistent"}, "BKCTL_TOKEN_FILE"),
        ({"BKCTL_TOKEN_FILE": "/dev/null"}, "BKCTL_TOKEN_FILE"),
        ({"BKCTL_TOKEN_FILE": "/proc/version"}, "BKCTL_TOKEN_FILE"),
        ({"BKPOOL_ID_TOKEN": "a secret"}, "BKPOOL_ID_TOKEN"),
        ({"BKPOOL_ID_TOKEN": "'secret'"}, "BKPOOL_ID_TOKEN"),
        ({"BKPOOL_ID_TOKEN": "secret" * 5000}, "BKPOOL_ID_TOKEN"),
        ({"ACTIONS_ID_TOKEN_REQUEST_URL": "https://x.example"}, "ACTIONS_ID_TOKEN_REQUEST_TOKEN"),
        (
            {"ACTIONS_ID_TOKEN_REQUEST_URL": "http://x.example/secret", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "t"},
            "ACTIONS_ID_TOKEN_REQUEST_URL",
        ),
    ],
)
def test_an_invalid_source_is_named_and_not_quoted(there, monkeypatch, variables, named):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput, match=named) as caught:
        there()
    assert caught.value.field == named
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    "answer",
    [(500, b"secret"), (200, b"secret"), (200, {"value": ""}), (200, {}), (302, b""), (400, {"message": "x"})],
)
def test_a_runner_that_gives_no_token_is_one_sentence(api, there, sources, answer):
    sources["github"]()
    api.answers["token"] = answer
    with pytest.raises(Unavailable, match="ACTIONS_ID_TOKEN_REQUEST_URL") as caught:
        there()
    assert "secret" not in caught.value.message
    assert "for-the-runner" not in caught.value.message


def test_a_redirect_is_not_followed_with_the_runners_token(api, there, sources):
    sources["github"]()

    def redirect(_call, connection):
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {api.url}/stolen\r\n\r\n".encode())

    api.before_answer["token"] = redirect
    with pytest.raises(Unavailable, match="HTTP 302"):
        there()
    assert not calls_to(api, "stolen")


def test_a_failed_request_to_github_is_repeated(api, there, sources, monkeypatch):
    sources["github"]()
    monkeypatch.setattr(issuers, "RETRY_PAUSES", (0.0,))
    answers = iter([(503, {}), (200, {"value": "at-last"})])
    api.before_answer["token"] = lambda *_: api.answers.update(token=next(answers))
    assert credentials.find(None, local=False, audience=no_matter).bearer() == "at-last"


def test_an_endless_answer_of_the_runner_times_out(api, there, sources, monkeypatch):
    sources["github"]()
    monkeypatch.setattr(issuers, "ANSWER_TIMEOUT", 0.2)
    over = threading.Event()

    def drip(_call, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
        for _ in range(100):  # more often than any time-out of a socket
            if over.wait(0.05):
                return
            connection.sendall(b" ")

    api.before_answer["token"] = drip
    try:
        with pytest.raises(Unavailable, match="not within"):
            there()
    finally:
        over.set()


@pytest.mark.parametrize(
    ("token", "soon"),
    [
        (token_of(29, now=0), True),
        (token_of(-5, now=0), True),
        (token_of(60, now=0), False),
        ("opaque", False),
        ("a.b.c", False),
        ("a.bnVsbA.c", False),
        ("a.eyJleHAiOiAieCJ9.c", False),
    ],
    ids=["half a minute", "over", "a minute", "opaque", "no JSON", "null", "no number"],
)
def test_only_a_jwt_has_a_known_expiry(token, soon):
    assert expires_soon(token, 0) is soon


@pytest.mark.parametrize(
    ("asked", "subject", "actor"),
    [
        (RequestedClaims("me", "o/r", None), "repo:o/r:ref:refs/heads/main", "me"),
        (RequestedClaims("me", None, None), "me", "me"),
        (RequestedClaims(None, None, "s"), "s", "s"),
        (RequestedClaims("me", "o/r", "s"), "s", "me"),
    ],
)
def test_the_request_to_a_development_issuer(asked, subject, actor):
    request = asked.request("buildkit-controller")
    assert (request["sub"], request["claims"]["actor"], request["aud"]) == (subject, actor, "buildkit-controller")
    assert request["claims"].get("repository") == asked.repository


@pytest.fixture
def with_issuer(appliance, home, api):
    (home / "appliance.json").write_text(json.dumps(appliance | {"devIssuer": api.url}))
    api.answers["token"] = (200, {"token": "minted", "expiresIn": 3600})


def test_the_older_options_get_a_token_from_the_local_issuer(api, called, appliance, with_issuer):
    assert called("allocate", "--oidc-actor", "me", "--oidc-repository", "o/r")[0] == 0
    assert api.next("/token").body == {
        "sub": "repo:o/r:ref:refs/heads/main",
        "aud": "buildkit-controller",
        "claims": {"actor": "me", "repository": "o/r"},
    }
    assert api.next("allocate").headers["Authorization"] == "Bearer minted"


@pytest.mark.parametrize("command", [("status",), ("release", "--worker", "w")])
def test_every_command_with_the_older_options_uses_them(api, called, appliance, with_issuer, command):
    api.answers["pools"] = (200, {"pools": []})
    assert called(*command, "--oidc-actor", "me")[0] == 0
    assert api.next("/token").body["claims"] == {"actor": "me"}
    assert api.next().headers["Authorization"] == "Bearer minted"


def test_an_explicit_token_comes_first_and_a_note_says_so(api, called, appliance, with_issuer, monkeypatch):
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    code, _, stderr = called("allocate", "--oidc-actor", "me")
    assert (code, stderr.split()[:2]) == (0, ["note:", "--oidc-actor"])
    assert api.next("allocate").headers["Authorization"] == "Bearer own"


def test_a_remote_appliance_gets_no_token_of_the_local_issuer(api, called, appliance, home, monkeypatch):
    elsewhere = appliance | {"devIssuer": api.url, "apiEndpoint": "http://127.0.0.1:1"}
    (home / "appliance.json").write_text(json.dumps(elsewhere))
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    code, _, stderr = called("allocate", "--oidc-actor", "me")
    assert (code, stderr.split()[:2]) == (0, ["note:", "--oidc-actor"])
    assert "Authorization" not in api.next("allocate").headers


def test_an_issuer_may_be_named_for_any_endpoint(api, called, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    monkeypatch.setenv("BKCTL_OIDC_ISSUER", api.url)
    api.answers["token"] = (200, {"token": "minted"})
    assert called("allocate", "--oidc-subject", "s")[0] == 0
    assert api.next("/token").body["sub"] == "s"
    assert api.next("allocate").headers["Authorization"] == "Bearer minted"
