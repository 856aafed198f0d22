"""Which appliance the client calls, with which credential, and what it does with the answers."""

import json
import socket
import threading
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.cli.client import Client, NamedLease
from bkpool.core import errors

from .conftest import forget_surroundings


@pytest.fixture(autouse=True)
def alone(monkeypatch, home):
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))


def authorization(api):
    return api.next("pools").headers.get("Authorization")


def ask(api):
    api.answers["pools"] = (200, {"pools": []})
    Client().pools()
    return authorization(api)


def test_the_running_appliance_is_found_and_gets_the_admin_token(api, appliance):
    assert ask(api) == "Bearer admin-secret"


def test_another_name_of_the_same_appliance_gets_the_admin_token(api, appliance, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url.replace("127.0.0.1", "localhost"))
    assert ask(api) == "Bearer admin-secret"


def test_a_token_in_the_environment_comes_before_the_admin_token(api, appliance, monkeypatch):
    monkeypatch.setenv("BKCTL_TOKEN", "own\n")
    assert ask(api) == "Bearer own"


@pytest.mark.parametrize("change", [{"apiEndpoint": "http://127.0.0.1:1"}, {"pid": 2**22 + 1}, {"pid": "x"}])
def test_the_admin_token_goes_only_to_the_running_appliance_of_this_home(api, appliance, home, monkeypatch, change):
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
        (507, "DiskFull", errors.DiskFull, 73),
        (503, "RefusedByCluster", errors.BkpoolError, 69),
        (404, "SomethingNewer", errors.NotFound, 5),
        (599, "SomethingNewer", errors.BkpoolError, 1),
    ],
)
def test_an_error_of_the_server_is_the_same_error_here(api, appliance, status, code, kind, exit_code):
    sent = {"code": code, "message": "what", "hint": "how", "field": "ttl", "retryAfter": 3}
    api.answers["pools"] = (status, {"error": sent})
    with pytest.raises(kind) as caught:
        Client().pools()
    error = caught.value
    source = " The token came from admin.token." if status == 401 else ""
    assert (error.message, error.hint, error.code, error.exit_code) == (
        *("--ttl: what", f"how{source}", code, exit_code),
    )
    assert (error.field, error.retry_after) == ("--ttl", 3)


def test_the_hint_for_a_caller_without_credential_names_the_variable(api, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no token"}})
    with pytest.raises(errors.Unauthenticated) as caught:
        Client().pools()
    assert "BKCTL_TOKEN" in caught.value.hint


def test_the_hint_for_an_appliance_of_another_home_says_so(api, home, monkeypatch):
    monkeypatch.setattr("bkpool.cli.client.API_PORT", api.server_port)
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no token"}})
    with pytest.raises(errors.Unauthenticated) as caught:
        Client().pools()
    assert caught.value.hint == (
        f"No appliance runs from this home ({home}); the one at http://localhost:{api.server_port} belongs to "
        "another home. Set BKPOOL_HOME to that home, or set BKCTL_TOKEN."
    )


def test_the_hint_for_a_job_on_github_names_the_permission(api, monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", api.url)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    api.answers["pools"] = (401, {"error": {"code": "Unauthenticated", "message": "no token"}})
    with pytest.raises(errors.Unauthenticated) as caught:
        Client().pools()
    assert "id-token: write" in caught.value.hint


def test_a_call_with_the_token_of_a_lease_sends_no_other_credential(api, appliance):
    Client().release("t" * 43)
    Client().renew("t" * 43, "1h")
    for _ in range(2):
        assert "Authorization" not in api.next().headers


def test_a_lease_named_by_its_worker_needs_the_callers_token(api, appliance):
    Client().release(NamedLease("w", "team"))
    call = api.next("release")
    assert call.body == {"workerName": "w", "namespace": "team"}
    assert call.headers["Authorization"] == "Bearer admin-secret"


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"", b'{"error": "x"}', b'{"error": {"message": 1}}'])
def test_an_answer_that_is_not_from_our_api_is_reported(api, appliance, answer):
    api.answers["pools"] = (502, answer)
    with pytest.raises(errors.Unavailable, match="HTTP 502 in a form"):
        Client().pools()


def test_an_incomplete_answer_is_one_sentence(appliance, home):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(home / "half.sock"))
        server.listen()
        (home / "appliance.json").write_text(json.dumps(appliance | {"apiSocket": str(home / "half.sock")}))

        def half():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{")

        thread = threading.Thread(target=half)
        thread.start()
        with pytest.raises(errors.Unavailable, match="closed the connection") as caught:
            Client().pools()
        assert "bkpool status" not in caught.value.hint
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
        ("BKCTL_ENDPOINT", "localhost:0"),
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


def test_an_endpoint_may_omit_the_scheme_and_an_unknown_host_is_reported(monkeypatch):
    monkeypatch.setenv("BKCTL_ENDPOINT", "a" * 70 + ".invalid:1")
    with pytest.raises(errors.Unavailable, match=r"cannot be reached|no host"):
        Client().pools()


@pytest.fixture
def named(monkeypatch, appliance):
    """The user names the endpoint of the appliance here, and a token: the call goes there and not over the socket."""
    monkeypatch.setenv("BKCTL_ENDPOINT", appliance["apiEndpoint"].replace("http://127.0.0.1", "https://localhost"))
    monkeypatch.setenv("BKCTL_TOKEN", "own")


@pytest.mark.usefixtures("named")
def test_the_authority_of_the_local_appliance_is_trusted_without_configuration(api, over_tls):
    over_tls("localhost", apiCa="ca.crt")
    assert ask(api) == "Bearer own"


@pytest.mark.usefixtures("named")
def test_a_given_certificate_is_trusted_under_any_name(api, over_tls):
    over_tls("build.example.com", apiCert="tls.crt")
    assert ask(api) == "Bearer own"


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("trust", [{}, {"apiCa": "ca.crt"}])
def test_another_name_or_an_unknown_authority_is_refused(api, over_tls, trust):
    over_tls("build.example.com", **trust)
    with pytest.raises(errors.Unavailable, match="no TLS connection") as caught:
        Client().pools()
    assert "BKCTL_TLS_CA_CERT" in caught.value.hint


@pytest.mark.usefixtures("named")
def test_only_the_given_certificate_is_trusted_not_others_of_its_authority(api, over_tls, authority, tmp_path):
    over_tls("localhost", apiCert="tls.crt")
    now = datetime.now(UTC)
    another = authority.issue_server(["localhost"], [], now, now + timedelta(days=1))
    (tmp_path / "tls.crt").write_bytes(another.cert_pem + authority.cert_pem)
    with pytest.raises(errors.Unavailable, match="no TLS connection"):
        Client().pools()


@pytest.mark.usefixtures("named")
def test_the_variable_of_the_user_comes_before_the_record_of_the_appliance(api, over_tls, monkeypatch, tmp_path):
    over_tls("localhost", apiCert="nope")
    monkeypatch.setenv("BKCTL_TLS_CA_CERT", str(tmp_path / "ca.crt"))
    assert ask(api) == "Bearer own"


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(("field", "content"), [("apiCa", None), ("apiCert", None), ("apiCert", "no certificate")])
def test_a_file_that_cannot_be_read_is_one_sentence(over_tls, tmp_path, field, content):
    over_tls("localhost", **{field: "gone.crt"})
    if content:
        (tmp_path / "gone.crt").write_text(content)
    with pytest.raises(errors.InvalidInput, match="gone"):
        Client()


def test_an_appliance_on_every_interface_is_called_over_its_socket(api, appliance, home):
    appliance["apiEndpoint"] = api.url.replace("127.0.0.1", "0.0.0.0")
    (home / "appliance.json").write_text(json.dumps(appliance))
    assert ask(api) == "Bearer admin-secret"
    assert Client().endpoint == appliance["apiSocket"]
