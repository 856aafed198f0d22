"""Runs the real program in a process, against a small HTTP server that implements the contract of the API."""

import base64
import io
import json
import os
import pty
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import pytest

from bkpool.cli import credentials, program
from bkpool.cli.errors import guarded
from bkpool.home.lock import HomeLock
from bkpool.pki.authority import Authority
from bkpool.pki.chain import load_chain

ROOT = Path(__file__).parents[2]
TOKEN = "t0ken-" + "A" * 37
TIMEOUT = 60.0
LONGEST_RUN = 300.0
"""Seconds after which a program of a test is killed. A test that waits for what it writes then sees its end."""


def pem(name):
    return base64.b64encode(f"-----BEGIN {name}-----\n".encode()).decode()


LEASE = {
    "workerName": "default-worker-0",
    "token": TOKEN,
    "endpoint": "tcp://localhost:1235",
    "gatewayEndpoint": "tcp://localhost:1235",
    "expiresAt": "2030-01-01T00:00:00Z",
    "caCert": pem("CA"),
    "clientCert": pem("CERT"),
}


@dataclass
class Call:
    method: str
    path: str
    headers: dict
    body: object
    hung_up: threading.Event = field(default_factory=threading.Event)


class Api(ThreadingHTTPServer):
    """Sends prepared answers and records the requests. `answers` maps the path's end to (status, body)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls = Queue()
        self.answers = {
            "allocate": (200, LEASE),
            "check": (200, {"allowed": True, "reason": "as it is"}),
            "renew": (200, {"expiresAt": "2030-01-01T00:00:00Z", "workerName": "default-worker-0"}),
            "release": (200, {"status": "released"}),
            "audience": (200, {"audience": "buildkit-controller"}),
        }
        self.before_answer = {}
        self.asked_for_audience = []
        """Calls that ask for the audience of tokens; they are not among `calls`."""
        self.url = f"http://127.0.0.1:{self.server_port}"

    def beside(self, server):
        """Gives the same answers as another server, and records its requests there."""
        self.calls, self.answers, self.before_answer = server.calls, server.answers, server.before_answer
        return self

    def next(self, end=""):
        """The next call, which must be to a path that ends so."""
        call = self.calls.get(timeout=TIMEOUT)
        assert call.path.endswith(end)
        return call

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class LocalApi(Api):
    """The same on a Unix socket."""

    address_family = socket.AF_UNIX

    def __init__(self, path):
        self._path = str(path)
        super().__init__()

    def server_bind(self):
        self.socket.bind(self._path)
        self.server_port = 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = Call(self.command, self.path, dict(self.headers), json.loads(body) if body else None)
        end = self.path.partition("?")[0].rpartition("/")[2]
        if end == "audience":
            self.server.asked_for_audience.append(call)
        else:
            self.server.calls.put(call)
        if act := self.server.before_answer.get(end):
            act(call, self.connection)
        status, answer = self.server.answers[end]
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST  # noqa: N815 - the name that http.server calls

    def log_message(self, *args):
        pass


@contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def api():
    with serving(Api()) as server:
        yield server


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def environment(home, tmp_path):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {"BKPOOL_HOME": str(home), "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path)}


PROGRESS = ("looking for tools", "waiting for a worker of pool ")


def settled(stderr):
    """What was said, without the progress that a slow machine shows after a second."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(PROGRESS))


def next_said(process):
    """The next line of its stderr that is no progress."""
    return next(line for line in iter(process.stderr.readline, "") if not line.startswith(PROGRESS))


def command(*args):
    return [sys.executable, "-m", "bkpool", *map(str, args)]


@contextmanager
def killed_in_the_end(process):
    """Kills the process if it runs for too long, so that a test which waits for its next line fails."""
    timer = threading.Timer(LONGEST_RUN, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@pytest.fixture
def bkpool(environment, tmp_path):
    """Runs the program to its end, with an empty stdin by default."""

    def run(*args, stdin="", **variables):
        return subprocess.run(
            command(*args),
            env=environment | variables,
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_RUN,
        )

    return run


def forget_surroundings(monkeypatch):
    """No credential and no setting of wherever the tests run."""
    for name in [name for name in os.environ if name.startswith(("BKCTL_", "BKPOOL_", "ACTIONS_", "GITHUB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(credentials, "POD_TOKEN_FILE", Path("/nonexistent"))


@pytest.fixture
def called(home, monkeypatch, capsys):
    """Runs the program within this process, for what has nothing to do with processes."""
    forget_surroundings(monkeypatch)
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*args):
        code = guarded(lambda: program.main(list(map(str, args)), prog_name="bkpool", standalone_mode=False))
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def bkpool_here(environment, tmp_path, capsys):
    """Runs the program within this process, with the environment and result of `bkpool`, in a tenth of its time."""
    children = []
    popen = subprocess.Popen

    def remember(*args, **options):
        children.append(popen(*args, **options))
        return children[-1]

    def run(*args, stdin="", **variables):
        argv = list(map(str, args))
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in (environment | variables).items():
                patch.setenv(name, value)
            patch.chdir(tmp_path)
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            patch.setattr(
                "subprocess.Popen", remember
            )  # the program ends before its appliance, and this process does not
            code = guarded(lambda: program.main(argv, prog_name="bkpool", standalone_mode=False))
        return subprocess.CompletedProcess(argv, code, *capsys.readouterr())

    yield run
    for child in children:
        child.wait(TIMEOUT)


@pytest.fixture
def started(environment, tmp_path):
    """Starts the program and hands it over while it runs."""
    running, limits = [], ExitStack()

    def start(*args, **variables):
        process = subprocess.Popen(
            command(*args),
            env=environment | variables,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        limits.enter_context(killed_in_the_end(process))
        return process

    with limits:
        yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def on_terminal(environment, tmp_path):
    """Runs the program on a terminal of its own and returns (exit code, what was shown)."""

    def run(*args, typed="", **variables):
        mine, its = pty.openpty()
        process = subprocess.Popen(
            command(*args),
            env=environment | {"TERM": "dumb", "COLUMNS": "200"} | variables,
            cwd=tmp_path,
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)
        os.write(mine, typed.encode())
        shown = b""
        try:
            with killed_in_the_end(process):
                while chunk := os.read(mine, 65536):
                    shown += chunk
        except OSError:  # EIO: the other side is closed
            pass
        finally:
            os.close(mine)
        return process.wait(TIMEOUT), shown.decode().replace("\r\n", "\n")

    return run


@pytest.fixture
def appliance(api, home):
    """This home's appliance.json names the server and its Unix socket, and the home is held, as by an appliance."""
    (home / "admin.token").write_text("admin-secret\n")
    described = {
        "pid": os.getpid(),
        "apiEndpoint": api.url,
        "apiSocket": str(home / "api.sock"),
        "gatewayEndpoint": "tcp://localhost:1235",
        "metricsEndpoint": "http://127.0.0.1:9090",
        "backend": "process",
        "version": "0.1.0",
        "startedAt": "2026-01-01T00:00:00Z",
    }
    (home / "appliance.json").write_text(json.dumps(described))
    with HomeLock(home), serving(LocalApi(home / "api.sock").beside(api)):
        yield described


@pytest.fixture(scope="module")
def authority():
    return Authority.create(datetime.now(UTC))


@pytest.fixture
def over_tls(api, appliance, home, authority, tmp_path):
    """Serves the appliance of this home over TLS, certified for `names`. `trust` goes into appliance.json."""

    def serve(*names, **trust):
        now = datetime.now(UTC)
        leaf = authority.issue_server(names, [], now, now + timedelta(days=1))
        (tmp_path / "tls.crt").write_bytes(leaf.cert_pem + authority.cert_pem)
        (tmp_path / "ca.crt").write_bytes(authority.cert_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_chain(context, leaf.cert_pem, leaf.key_pem)
        api.socket = context.wrap_socket(api.socket, server_side=True)
        appliance["apiEndpoint"] = api.url.replace("http://127.0.0.1", "https://localhost")
        trust = {name: str(tmp_path / file) for name, file in trust.items()}
        (home / "appliance.json").write_text(json.dumps(appliance | trust))
        api.handle_error = lambda *_: None  # a client that trusts nobody hangs up in the handshake

    return serve
