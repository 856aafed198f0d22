"""The base of the end-to-end tests: a real appliance in a separate home, used as a user uses it.

Nothing here is a mock. Programs run as subprocesses. Servers listen on loopback.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from support.secrets import secrets_in

if TYPE_CHECKING:
    from bkpool.pki.authority import Authority

HERE = Path(__file__).parent


class World(Protocol):
    """The place where the workers of an appliance run. It hides the differences of the backends from the tests.

    The module `worlds` has one for each backend.
    """

    name: str
    registry_address: str
    """The address at which workers reach a registry on this machine."""

    def options(self) -> list[str]:
        """Returns the options of `up` for this backend."""

    def workers(self, appliance: Appliance) -> list[Any]:
        """Returns what runs buildkitd now. Two values are equal if they are the same process or pod."""

    def kill_worker(self, worker: Any) -> None:
        """Kills its buildkitd with kill -9."""

    def trusting(self, registry: str) -> dict[str, Any]:
        """Returns the fields of a pool's spec that make its workers use plain HTTP for this registry."""

    def authority(self, appliance: Appliance) -> Authority:
        """Returns the authority of the client certificates."""

    def clean(self, appliance: Appliance) -> None:
        """Removes after `down` what the next test must not find. Fails if something still runs."""


WAIT_TIMEOUT = 120.0 if os.environ.get("BKPOOL_E2E_BACKEND") == "kind" else 60.0
"""Seconds that a test waits for a condition before it fails. On a slow machine a pod is replaced in one minute."""
READ_TIMEOUT = 300.0
"""Seconds that a test waits for the output of a program. A build may wait for its worker first."""
GATEWAY_HOLDS = 15.0
"""Seconds for which the gateway holds a client whose worker is away. A build that ends earlier was not held."""
WAITED = 'reason="Waited'
"""The beginning of the reasons, in the gateway's metrics, of refusals after all of the time that a client is held."""


def free_port() -> int:
    """Returns a port that stays free until the test listens on it, also while its appliance is down.

    The system gives none of these ports to a client, and no other run of these tests takes it.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(first_of_clients, 20_000))
        mark = socket.socket(socket.AF_UNIX)
        with socket.socket() as listener, contextlib.suppress(OSError):
            mark.bind(f"\0bkpool-test-port-{port}")
            listener.bind(("127.0.0.1", port))
            mark.detach()  # its name says, until this process ends, that the port is taken
            return port
        mark.close()


def eventually(condition: Callable[[], Any], what: str, timeout: float = WAIT_TIMEOUT) -> Any:
    """Waits until the condition is true, and returns its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {timeout:g} s: {what}")
        select.select([], [], [], 0.02)
    return value


def do_all(*steps: Callable[[], object]) -> None:
    """Does every step, also after one that failed; then it raises the last error.

    The end of a test never stops half-way: what it leaves would disturb other tests.
    """
    with contextlib.ExitStack() as stack:
        for step in reversed(steps):
            stack.callback(step)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # ProcessLookupError: it ended between open and read
        return False


def steps(*arguments: str) -> list[int]:
    """Returns the processes of build steps that run the test program with these arguments."""
    command = "".join(f"{part}\0" for part in ("/program", *arguments)).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (entry / "cmdline").read_bytes() == command:
                found.append(int(entry.name))
    return found


def end_steps(*arguments: str) -> None:
    """Tells these build steps to end: the program does `hold` and `sniff` until then."""
    for pid in steps(*arguments):
        os.kill(pid, signal.SIGUSR1)


def pool(name: str, **spec: Any) -> dict[str, Any]:
    """Returns a pool as it is written in a file for `up`."""
    return _document("BuildKitPool", name, "default", spec)


def oidc_config(name: str, **spec: Any) -> dict[str, Any]:
    """Returns an issuer for all pools as it is written in a file for `up`."""
    return _document("BuildKitOIDCConfig", name, "buildkit-system", spec)


def _document(kind: str, name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "buildkit.smrt-devops.net/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


@dataclass
class Answer:
    """The output and the exit code of a program."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def ok(self) -> Answer:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


def run(*argv: str | Path, env: dict[str, str], cwd: Path | None = None, timeout: float = 180.0) -> Answer:
    begin = time.monotonic()
    done = subprocess.run(
        [str(part) for part in argv], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Answer(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)


@dataclass
class Certificates:
    """The certificates of a lease in files, as the usage guide stores them."""

    directory: Path
    lease: dict[str, Any]

    @classmethod
    def of(cls, lease: dict[str, Any], directory: Path) -> Certificates:
        directory.mkdir(parents=True, exist_ok=True)
        for name, key in (("ca.crt", "caCert"), ("client.crt", "clientCert"), ("client.key", "clientKey")):
            (directory / name).write_bytes(base64.b64decode(lease[key]))
        return cls(directory, lease)

    @property
    def driver_opt(self) -> str:
        return ",".join(
            f"{option}={self.directory / name}"
            for option, name in (("cacert", "ca.crt"), ("cert", "client.crt"), ("key", "client.key"))
        )

    @property
    def buildctl(self) -> list[str]:
        d = self.directory
        return [f"--tlscacert={d}/ca.crt", f"--tlscert={d}/client.crt", f"--tlskey={d}/client.key"]


unfinished: list[Appliance] = []
"""The appliances whose end has not come yet."""


@dataclass(eq=False)
class Appliance:
    """One appliance with its home, and the commands that its user runs."""

    base: Path
    tools: dict[str, Path]
    world: World
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "bkpool"])
    extra_env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.base / "home"
        self.started: list[subprocess.Popen[str]] = []
        self._leaked: list[str] = []
        self.ports = {name: free_port() for name in ("api", "gateway", "metrics")}
        docker = self.base / "docker"
        (docker / "cli-plugins").mkdir(parents=True)
        (docker / "cli-plugins" / "docker-buildx").symlink_to(self.tools["buildx"])
        self.bin = self.base / "bin"
        self.bin.mkdir()
        for name in ("bkpool", "bkctl"):
            self._script(name, f'exec {" ".join(self.program)} "$@"')
        if shutil.which("docker") is None:  # the standalone buildx behind docker's name: the same program
            self._script("docker", f'shift; exec {self.tools["buildx"]} "$@"')
        unfinished.append(self)

    def _script(self, name: str, body: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.bin / name).chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("BKCTL_", "BUILDX_", "DOCKER_"))
        }
        return {
            **kept,
            "PATH": f"{self.bin}{os.pathsep}{kept['PATH']}",
            "BKPOOL_HOME": str(self.home),
            "DOCKER_CONFIG": str(self.base / "docker"),
            "BUILDKIT_PROGRESS": "plain",
            **self.extra_env,
        }

    # --- the appliance ---

    @property
    def addresses(self) -> list[str]:
        """The options of `up` that make it listen where this test expects it."""
        return [part for name, port in self.ports.items() for part in (f"--{name}-address", f"127.0.0.1:{port}")]

    def up(self, *options: str) -> dict[str, Any]:
        described: dict[str, Any] = self.cli("up", "-d", *self.world.options(), *self.addresses, *options).ok().json
        return described

    def up_with(self, spec: dict[str, Any], *options: str, name: str = "default") -> dict[str, Any]:
        """Runs `up` with one pool of this spec."""
        return self.up_from([pool(name, **spec)], *options)

    def up_from(self, documents: list[dict[str, Any]], *options: str) -> dict[str, Any]:
        """Runs `up` with a file of these objects."""
        file = self.base / "objects.yaml"
        file.write_text("\n---\n".join(map(json.dumps, documents)))  # JSON is YAML
        return self.up("-f", str(file), *options)

    def down(self, *options: str) -> Answer:
        return self.cli("down", *options)

    @property
    def described(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((self.home / "appliance.json").read_text())
        return described

    def kill(self) -> None:
        """Kills the appliance with kill -9, and waits until it has ended."""
        pid = self.described["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not alive(pid), "the appliance is gone")

    @property
    def log(self) -> str:
        return (self.home / "logs" / "appliance.log").read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of the log so far. The last one is left out while it is being written."""
        lines = self.log.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def daemons(self) -> list[int]:
        """Returns the processes of this home's workers: every buildkitd, runc and build container."""
        found = []
        for stat in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (stat / "cmdline").read_bytes()
                if str(self.home / "slots").encode() in command and alive(int(stat.name)):
                    found.append(int(stat.name))
        return found

    def workers(self) -> list[Any]:
        """Returns what runs buildkitd now, on any backend."""
        return self.world.workers(self)

    # --- commands of its user ---

    def cli(self, *args: str, timeout: float = 180.0, **more: Any) -> Answer:
        answer = run(*self.program, *args, env={**self.env, **more}, timeout=timeout)
        assert not (leaked := secrets_in(answer.err)), leaked
        return answer

    def allocate(self, *options: str, name: str = "certs") -> Certificates:
        return Certificates.of(self.cli("allocate", *options).ok().json, self.base / name)

    def release(self, lease: dict[str, Any]) -> Answer:
        return self.cli("release", "--token", lease["token"])

    def http(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, bearer: str | None = "admin"
    ) -> tuple[int, Any]:
        """Makes one API call without the CLI."""
        if bearer == "admin":
            bearer = (self.home / "admin.token").read_text().strip()
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        payload = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["api"], timeout=WAIT_TIMEOUT)
        try:
            connection.request(method, path, payload, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status < HTTPStatus.BAD_REQUEST or not (leaked := secrets_in(text)), leaked
            return answer.status, json.loads(text)
        finally:
            connection.close()

    def metrics(self) -> str:
        """Returns the metrics; empty if nothing is running."""
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", self.ports["metrics"], timeout=WAIT_TIMEOUT)
            with contextlib.closing(connection):
                connection.request("GET", "/metrics")
                return connection.getresponse().read().decode()
        return ""

    def leaked(self) -> list[str]:
        """Returns the secrets found in the logs of this home."""
        logs = (path for path in (self.home / "logs").glob("**/*") if path.is_file())
        return [found for path in logs for found in secrets_in(path.read_text(errors="replace"))]

    def pool(self, name: str = "default") -> dict[str, Any]:
        pool: dict[str, Any]
        status, pool = self.http("GET", f"/api/v1/pools/{name}")
        assert status == HTTPStatus.OK, pool
        return pool

    def all_idle(self, timeout: float = WAIT_TIMEOUT) -> None:
        """Waits until every worker is idle, and there is at least one."""
        eventually(lambda: (state := self.pool())["idle"] == state["workers"] > 0, "all workers are idle", timeout)

    def buildx(self, *args: str | Path, timeout: float = 180.0) -> Answer:
        return run("docker", "buildx", *args, env=self.env, timeout=timeout)

    def builder(self, certificates: Certificates, name: str) -> str:
        """Makes a remote builder for a lease, as the usage guide does. Returns its name."""
        endpoint = f"tcp://localhost:{self.ports['gateway']}"
        self.buildx(
            "create", "--name", name, "--driver", "remote", "--driver-opt", certificates.driver_opt, endpoint
        ).ok()
        return name

    def build(self, builder: str, context: Path, *options: str, timeout: float = 180.0) -> Answer:
        return self.buildx("build", "--builder", builder, "--progress", "plain", *options, context, timeout=timeout)

    def start(self, *argv: str | Path) -> subprocess.Popen[str]:
        """Starts a program in the background; its output is in `stdout`."""
        process = subprocess.Popen(
            [str(part) for part in argv], env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """Ends all programs that a test started, and the appliance."""
        do_all(self._end_programs, lambda: self._leaked.extend(secrets_in(self.metrics())), self._end)

    def _end_programs(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _end(self) -> None:
        if not self.home.exists():
            return
        answer = self.down("--now")
        if answer.code and (hung := re.search(r"the appliance \(pid (\d+)\) ", answer.err)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(hung[1]), signal.SIGKILL)
            self.down("--now")  # its workers

    def finish(self) -> None:
        """Ends all programs that a test started and the appliance, and checks that nothing is left."""
        if self in unfinished:
            unfinished.remove(self)
        do_all(self.stop, lambda: self._leaked.extend(self.leaked()), lambda: self.world.clean(self))
        assert not self._leaked, self._leaked


def only_on(backend: str, why: str) -> Any:
    """Marks a test of one backend. It is not collected on other backends.

    A test that says nothing about where workers run is marked for `process`, where it is quicker.
    """
    return pytest.mark.only(backend, why)


def really_ran(answer: Answer, text: str) -> bool:
    """Returns whether the RUN step with this output really ran and was not taken from a cache."""
    return re.search(rf"^#\d+ [\d.]+ {re.escape(text)}", answer.text, re.MULTILINE) is not None


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Reads the program's output up to the line with this text. Ends the program if the line does not come."""
    seen = ""
    assert process.stdout is not None
    limit = threading.Timer(READ_TIMEOUT, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            seen += line
            if text in line:
                return seen
    finally:
        limit.cancel()
    raise AssertionError(f"the program ended without the output {text!r}, or after {READ_TIMEOUT:g} s:\n{seen}")


class Context:
    """A build context without a base image: the test program and a Dockerfile."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.path = directory
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(program, directory / "program")

    def dockerfile(self, *steps: str) -> Path:
        """Writes a Dockerfile with the program and these RUN steps. Each step is the arguments of the program."""
        lines = ["FROM scratch AS built", "COPY program /program"]
        lines += [f"RUN {json.dumps(['/program', *step.split(' ')])}" for step in steps]
        (self.path / "Dockerfile").write_text("\n".join([*lines, ""]))
        return self.path

    def write(self, text: str) -> Path:
        (self.path / "Dockerfile").write_text(text)
        return self.path


@contextlib.contextmanager
def registry(program: Path, directory: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """Runs a real registry on loopback or in the container network of the test. Yields its host:port."""
    port = free_port()
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\n"
        f"storage: {{filesystem: {{rootdirectory: {directory / 'data'}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '{address}:{port}'}}\n"
        "log: {level: error, accesslog: {disabled: true}}\n"
    )
    with (directory / "registry.log").open("w") as log:
        process = subprocess.Popen([str(program), "serve", str(config)], stdout=log, stderr=log)
    try:
        eventually(lambda: _answers(address, port), "the registry answers")
        yield f"{address}:{port}"
    finally:
        process.terminate()
        process.wait()


def _answers(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        connection = http.client.HTTPConnection(address, port, timeout=2)
        connection.request("GET", "/v2/")
        connection.getresponse().read()
        connection.close()
        return True
    return False


def from_registry(host: str, path: str) -> Any:
    """Returns a manifest or index from the registry."""
    kinds = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"
    connection = http.client.HTTPConnection(host, timeout=WAIT_TIMEOUT)
    try:
        connection.request("GET", f"/v2/{path}", headers={"Accept": kinds})
        answer = connection.getresponse()
        return json.loads(answer.read())
    finally:
        connection.close()
