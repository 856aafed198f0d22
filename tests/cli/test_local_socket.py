"""The admin's token of a home goes to the Unix socket of its appliance, and nobody else is given it.

Each test lets a stranger wait where a command might call: another loopback address, another endpoint, the place of
the socket.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bkpool.cli import api_connection, console, issuers
from bkpool.cli.client import Client
from bkpool.core import errors
from bkpool.home import local_socket

from .conftest import forget_surroundings

STRANGER = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listens", flush=True)
connection, _ = server.accept()
print(repr(connection.recv(65536)), flush=True)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch, home):
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    console.note_once.cache_clear()


@contextmanager
def listener(address, port=0):
    """Somebody who listens and keeps what they are sent."""
    received = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server:

        def hear():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                with connection, suppress(OSError):  # a client may hang up first
                    received.append(connection.recv(65536).decode("latin-1"))
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"pools": []}')

        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        yield server.getsockname()[1], received
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


def pools(api, monkeypatch, endpoint=None):
    """What `bkpool status` asks: the Authorization that came over the socket or to the API's port."""
    if endpoint is not None:
        monkeypatch.setenv("BKCTL_ENDPOINT", endpoint)
    api.answers["pools"] = (200, {"pools": []})
    Client().pools()
    return api.next("pools").headers.get("Authorization")


@pytest.mark.parametrize("name", [None, "localhost", "127.0.0.1"])
def test_the_commands_of_the_home_use_the_socket_even_if_the_port_is_strange(api, appliance, home, monkeypatch, name):
    with listener("127.0.0.1") as (port, received):
        (home / "appliance.json").write_text(json.dumps(appliance | {"apiEndpoint": f"http://127.0.0.1:{port}"}))
        endpoint = name and f"http://{name}:{port}"
        assert pools(api, monkeypatch, endpoint) == "Bearer admin-secret"
    assert received == []


@needs_ipv6
@pytest.mark.parametrize("name", ["http://localhost", "localhost"])
def test_a_listener_on_the_other_loopback_address_gets_nothing(api, appliance, monkeypatch, name):
    with listener("::1", api.server_port) as (port, received):
        assert pools(api, monkeypatch, f"{name}:{port}") == "Bearer admin-secret"
        monkeypatch.setenv("BKCTL_TOKEN", "own")
        assert pools(api, monkeypatch) == "Bearer own"
    assert received == []


@needs_ipv6
def test_a_listener_on_the_other_loopback_address_gets_nothing_if_no_appliance_runs(monkeypatch):
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    with listener("::1") as (port, received):
        monkeypatch.setenv("BKCTL_ENDPOINT", f"http://localhost:{port}")
        with pytest.raises(errors.Unavailable, match="no appliance answers"):
            Client().pools()
    assert received == []


@needs_ipv6
def test_localhost_is_the_other_address_if_the_appliance_told_so(appliance, home, monkeypatch):
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    with listener("::1") as (port, received):
        (home / "appliance.json").write_text(json.dumps(appliance | {"apiEndpoint": f"http://[::1]:{port}"}))
        monkeypatch.setenv("BKCTL_ENDPOINT", f"http://localhost:{port}")
        Client().pools()
    assert "Bearer own" in received[0]


def test_no_resolver_is_asked_about_localhost(api, monkeypatch):
    def resolve(host, *arguments, **more):
        assert host != "localhost", "the resolver decides where localhost is"
        return known(host, *arguments, **more)

    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    assert pools(api, monkeypatch, f"http://localhost:{api.server_port}") == "Bearer own"


def test_no_resolver_says_where_a_development_issuer_with_the_name_localhost_is(api, monkeypatch):
    asked, known = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **rest: asked.append(host) or known(host, *more, **rest)
    )
    api.answers["token"] = (200, {"token": "minted"})
    assert issuers.mint(f"http://localhost:{api.server_port}/", {}, "--issuer") == {"token": "minted"}
    assert set(asked) == {"127.0.0.1"}
    assert api.next("/token").headers["Host"] == f"localhost:{api.server_port}"


@pytest.mark.parametrize("address", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_an_endpoint_of_a_stranger_gets_no_admin_token(appliance, monkeypatch, address):
    with listener(address) as (port, received):
        monkeypatch.setenv("BKCTL_ENDPOINT", f"http://{f'[{address}]' if ':' in address else address}:{port}")
        Client().pools()
        Client().check("t" * 43, "default", "default")
    assert len(received) == 2
    assert not [request for request in received if "Authorization" in request or "admin-secret" in request]


@needs_ipv6
def test_an_address_of_loopback_that_is_not_the_appliances_is_a_stranger(api, appliance, monkeypatch):
    with listener("::1", api.server_port) as (port, received):
        monkeypatch.setenv("BKCTL_ENDPOINT", f"http://[::1]:{port}")
        Client().pools()
    assert "Authorization" not in received[0]


def test_an_older_appliance_without_a_socket_gets_no_admin_token_and_the_user_is_told(api, appliance, home):
    del appliance["apiSocket"]
    (home / "appliance.json").write_text(json.dumps(appliance))
    with pytest.raises(errors.Unavailable, match="no local socket") as caught:
        Client().pools()
    assert "bkpool up" in caught.value.hint
    assert api.calls.empty()


def test_an_older_appliance_still_gets_the_tokens_that_are_given(api, appliance, home, monkeypatch):
    del appliance["apiSocket"]
    (home / "appliance.json").write_text(json.dumps(appliance))
    Client().release("t" * 43)
    assert "Authorization" not in api.next("release").headers
    monkeypatch.setenv("BKCTL_TOKEN", "own")
    assert pools(api, monkeypatch) == "Bearer own"


def test_a_second_up_says_that_an_older_appliance_must_be_restarted(bkpool_here, appliance, home):
    del appliance["apiSocket"]
    (home / "appliance.json").write_text(json.dumps(appliance))
    answer = bkpool_here("up", "-d")
    assert answer.returncode == 0
    assert "`bkpool down`, then `bkpool up -d`" in answer.stderr


def test_a_socket_that_is_gone_is_one_sentence(api, appliance, home):
    (home / "api.sock").unlink()
    with pytest.raises(errors.Unavailable, match="no appliance answers") as caught:
        Client().pools()
    assert "bkpool down" in caught.value.hint
    assert api.calls.empty()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_socket_of_another_user_gets_nothing(appliance, home):
    with TemporaryDirectory(prefix="bkpool-test-") as place:
        Path(place).chmod(0o777)
        path = Path(place, "api.sock")
        (home / "appliance.json").write_text(json.dumps(appliance | {"apiSocket": str(path)}))
        command = [sys.executable, "-c", STRANGER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as stranger:
            try:
                assert stranger.stdout.readline() == "listens\n"
                with pytest.raises(errors.HostFault, match="user 65534 listens there"):
                    Client().pools()
                assert stranger.stdout.readline() == "b''\n"
            finally:
                stranger.kill()  # it would wait for a connection, and this test for its end


@pytest.mark.parametrize("user", ["own", "root", "other"])
def test_only_the_own_user_and_root_are_trusted(home, monkeypatch, user):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    uid = {"own": 1000, "root": 0, "other": 1001}[user]
    assert local_socket.may_serve(uid, home) is (user != "other")
    assert local_socket.may_connect(uid) is (user != "other")


def test_root_trusts_the_owner_of_the_home_that_it_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    owner = tmp_path.stat().st_uid
    assert local_socket.may_serve(owner, tmp_path)
    assert not local_socket.may_serve(owner + 1, tmp_path)
    assert not local_socket.may_connect(owner + 1)


@pytest.mark.parametrize(
    ("endpoint", "scheme"),
    [
        ("builds.example:8082", "https"),
        ("192.0.2.1:8082", "https"),
        ("localhost.example:8082", "https"),
        ("localhost:8082", "http"),
        ("LOCALHOST:8082", "http"),
        ("127.0.0.1:8082", "http"),
        ("[::1]:8082", "http"),
        ("http://builds.example:8082", "http"),
    ],
)
def test_without_a_scheme_an_endpoint_is_https_unless_it_is_loopback(monkeypatch, endpoint, scheme):
    connected = []

    def dial(address, port):
        connected.append((address, port))
        raise ConnectionRefusedError

    def wrapped(*_):
        connected.append("tls")

    monkeypatch.setattr(api_connection, "dial_tcp", dial)
    monkeypatch.setattr(api_connection, "tls_context", wrapped)
    monkeypatch.setenv("BKCTL_ENDPOINT", endpoint)
    with pytest.raises(errors.Unavailable):
        Client().pools()
    assert ("tls" in connected) is (scheme == "https")


@pytest.mark.parametrize(
    ("endpoint", "warned"),
    [
        ("http://builds.example:8082", True),
        ("http://svc.example:8082", True),
        ("http://buildkit-controller.buildkit-system.svc.example:8082", True),
        ("http://buildkit-controller.buildkit-system.svc:8082", False),
        ("http://buildkit-controller.buildkit-system.svc.cluster.local:8082", False),
        ("http://127.0.0.1:8082", False),
        ("http://localhost:8082", False),
        ("https://builds.example:8082", False),
        ("builds.example:8082", False),
    ],
)
def test_clear_text_is_obeyed_with_one_warning(capsys, monkeypatch, endpoint, warned):
    monkeypatch.setenv("BKCTL_ENDPOINT", endpoint)
    Client()
    Client()
    assert capsys.readouterr().err.count("in clear") == warned


def test_a_server_without_tls_says_that_a_missing_scheme_means_https(monkeypatch):
    with listener("127.0.0.1") as (port, _):
        monkeypatch.setattr(api_connection, "dial_tcp", lambda *_: socket.create_connection(("127.0.0.1", port)))
        monkeypatch.setenv("BKCTL_ENDPOINT", f"builds.example:{port}")
        with pytest.raises(errors.Unavailable, match="no TLS connection") as caught:
            Client().pools()
    assert "Without http://" in caught.value.hint


def test_a_server_of_plain_http_that_is_asked_for_tls_is_explained(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("BKCTL_ENDPOINT", f"https://127.0.0.1:{server.server_port}")
        with pytest.raises(errors.Unavailable, match="no TLS connection") as caught:
            Client().pools()
    assert (
        caught.value.hint == "The server answers without TLS. If that is intended, write http:// in BKCTL_ENDPOINT."
    )
