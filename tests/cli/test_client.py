"""Whom the client calls, with which credential, and what it makes of the answers."""

import json
import socket
import threading

import pytest

from bkpool.cli.client import Client
from bkpool.core import errors


@pytest.fixture(autouse=True)
def alone(monkeypatch, home):
    for name in (
        "BKCTL_ENDPOINT",
        "BKCTL_TOKEN",
        "BKCTL_TLS_CA_CERT",
        "BKCTL_TLS_SKIP_VERIFY",
        "BKCTL_ALLOW_NO_AUTH",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BKPOOL_HOME", str(home))


def authorization(api):
    return api.next("pools").headers.get("Authorization")


def ask(api):
    api.answers["pools"] = (200, {"pools": []})
    Client().pools()
    return authorization(api)


def test_the_running_appliance_is_found_and_gets_the_admin_token(api, appliance):
    assert ask(api) == "Bearer admin-secret"


def test_another_name_of_the_same_appliance_gets_it_too(api, appliance, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url.replace("127.0.0.1", "localhost"))
    assert ask(api) == "Bearer admin-secret"


def test_an_own_token_comes_before_the_admin_token(api, appliance, monkeypatch):
    monkeypatch.setenv("BKCTL_TOKEN", "own\n")
    assert ask(api) == "Bearer own"


@pytest.mark.parametrize("change", [{"apiEndpoint": "http://127.0.0.1:1"}, {"pid": 2**22 + 1}, {"pid": "x"}])
def test_the_admin_token_goes_to_nobody_but_the_living_appliance_of_this_home(
    api, appliance, home, monkeypatch, change
):
    (home / "appliance.json").write_text(json.dumps(appliance | change))
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    assert ask(api) is None


def test_a_redirect_is_not_followed_with_the_token(api, appliance):
    api.answers["pools"] = (307, b"")
    with pytest.raises(errors.Unavailable, match="HTTP 307"):
        Client().pools()


@pytest.mark.parametrize(
    ("status", "code", "kind", "exit_code"),
    [
        (400, "InvalidInput", errors.InvalidInput, 2),
        (401, "Unauthenticated", errors.Unauthenticated, 3),
        (403, "Forbidden", errors.Forbidden, 4),
        (404, "NotFound", errors.NotFound, 5),
        (410, "Gone", errors.Gone, 7),
        (503, "NoCapacity", errors.NoCapacity, 75),
        (502, "WorkerFailed", errors.WorkerFailed, 70),
        (500, "DiskFull", errors.BkpoolError, 73),
        (404, "SomethingNewer", errors.NotFound, 5),
        (599, "SomethingNewer", errors.BkpoolError, 1),
    ],
)
def test_an_error_of_the_server_is_the_same_error_here(api, appliance, status, code, kind, exit_code):
    told = {"code": code, "message": "what", "hint": "how", "field": "ttl", "retryAfter": 3}
    api.answers["pools"] = (status, {"error": told})
    with pytest.raises(kind) as caught:
        Client().pools()
    error = caught.value
    assert (error.message, error.hint, error.code, error.exit_code) == ("what", "how", code, exit_code)
    assert (error.field, error.retry_after) == ("ttl", 3)


def test_a_caller_without_credential_is_told_where_one_comes_from(api, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no token"}})
    with pytest.raises(errors.Unauthenticated) as caught:
        Client().pools()
    assert "BKCTL_TOKEN" in caught.value.hint


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"", b'{"error": "x"}', b'{"error": {"message": 1}}'])
def test_what_is_not_our_api_is_named_so(api, appliance, answer):
    api.answers["pools"] = (502, answer)
    with pytest.raises(errors.Unavailable, match="HTTP 502 in a form"):
        Client().pools()


def test_an_answer_that_breaks_off_is_one_sentence(appliance, home):
    with socket.create_server(("127.0.0.1", 0)) as server:
        appliance["apiEndpoint"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        (home / "appliance.json").write_text(json.dumps(appliance))

        def half():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{")

        thread = threading.Thread(target=half)
        thread.start()
        with pytest.raises(errors.Unavailable, match="closed the connection"):
            Client().pools()
        thread.join()


def test_a_pool_name_cannot_leave_its_place_in_the_path(api, appliance):
    api.answers["..%2Fworkers"] = (200, {})
    Client().pool("../workers", "a&b")
    assert api.next().path == "/api/v1/pools/..%2Fworkers?namespace=a%26b"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BKCTL_ENDPOINT", "ftp://x"),
        ("BKCTL_ENDPOINT", "http://"),
        ("BKCTL_ENDPOINT", "http://x:99999"),
        ("BKCTL_ENDPOINT", "http://user:secret@x:1"),
        ("BKCTL_ENDPOINT", "http://[::1"),
        ("BKCTL_TOKEN", "a b"),
        ("BKCTL_TOKEN", "a\nsecret"),
    ],
)
def test_a_bad_variable_is_named_and_a_secret_in_it_is_not_shown(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(errors.InvalidInput, match=variable) as caught:
        Client()
    assert "secret" not in caught.value.message + caught.value.hint
    assert caught.value.field == variable


@pytest.mark.parametrize(("variable", "value"), [("BKCTL_TLS_CA_CERT", "/nope"), ("BKCTL_TLS_SKIP_VERIFY", "maybe")])
def test_a_bad_tls_variable_is_named(monkeypatch, variable, value):
    monkeypatch.setenv("BKCTL_ENDPOINT", "https://localhost:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(errors.InvalidInput, match=variable):
        Client()


def test_an_endpoint_may_leave_out_the_scheme_and_a_host_that_is_no_host_is_said(monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", "a" * 70 + ".invalid:1")
    with pytest.raises(errors.Unavailable, match=r"cannot be reached|no host"):
        Client().pools()
