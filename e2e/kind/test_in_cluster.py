"""`bkpool manifests | kubectl apply -f -`: bkpool runs in an image that bkpool has built, with several replicas.

Callers are a pod in the cluster, and this machine through `kubectl port-forward` to one replica at a time.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kind.faults import FaultProxy

from bkpool.kind.engine import Engine
from bkpool.toolchain import default_cache
from harness import (
    WAIT_TIMEOUT,
    Appliance,
    Certificates,
    Context,
    do_all,
    eventually,
    free_port,
    read_until,
    really_ran,
    run,
)
from kind_cluster import kind_of
from support.secrets import secrets_in
from worlds import SYSTEM, Processes

POOL = "my-buildkit-pool"
IMAGE = "docker.io/library/bkpool:e2e"
ROOT = Path(__file__).parents[2]
PYTHON = "python:3.13-slim-trixie"
SERVICE = f"tcp://{POOL}.default.svc:1235"
CALL_TIMEOUT = 300.0  # seconds; some calls wait 3 minutes for a worker
SCRIPT_TIMEOUT = 600.0  # seconds for a script with many builds in the caller's pod


@pytest.fixture(scope="module")
def image(cluster, tools, zipapp, tmp_path_factory) -> None:
    """Builds bkpool's image with bkpool: the Containerfile takes dist/bkpool.pyz. Loads it into the cluster."""
    base = tmp_path_factory.mktemp("image")
    builder = Appliance(base, tools, world=Processes())
    builder.up_with({"scaling": {"max": 1}})
    stand_in = os.environ.get("BKPOOL_E2E_PYTHON_BASE")  # set where no image can be pulled
    named = ["--build-context", f"docker.io/library/{PYTHON}={stand_in}"] if stand_in else []
    output = f"type=docker,name={IMAGE},dest={base / 'bkpool.tar'}"
    try:
        run(
            *(*builder.program, "build", "--progress", "plain", "-f", str(ROOT / "Containerfile"), *named),
            *("--output", output, str(ROOT)),
            env=builder.env,
            timeout=600,
        ).ok()
    finally:
        builder.finish()
    with Engine.connect() as engine:
        kind_of(engine, default_cache() / "e2e" / "kind").load_archive(cluster, base / "bkpool.tar")


@dataclass
class Installed:
    """The appliance that the manifests make, and a pod that calls it."""

    world: Any
    base: Path
    tools: dict[str, Path]
    forwards: list[subprocess.Popen[str]] = field(default_factory=list)
    settled: bool = True
    """Whether all replicas were ready when the last test began."""

    @property
    def token(self) -> str:
        encoded = self.world.kubectl("-n", SYSTEM, "get", "secret", "bkpool-admin", "-o", "jsonpath={.data.token}")
        return base64.b64decode(encoded).decode()

    def pods(self, selector: str, namespace: str) -> list[str]:
        found = self.world.objects("pods", "-n", namespace, "-l", selector)
        return sorted(
            pod["metadata"]["name"]
            for pod in found
            if "deletionTimestamp" not in pod["metadata"]
            and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))
        )

    def controllers(self) -> list[str]:
        return self.pods("app.kubernetes.io/name=buildkit-controller", SYSTEM)

    def gateways(self) -> list[str]:
        return self.pods(f"buildkit.smrt-devops.net/pool={POOL},buildkit.smrt-devops.net/purpose=gateway", "default")

    def leader(self) -> str:
        return self.world.kubectl(
            "-n", SYSTEM, "get", "lease", "bkpool-controller", "-o", "jsonpath={.spec.holderIdentity}"
        )

    def forward(self, namespace: str, pod: str, port: int) -> int:
        """Returns a port of this machine that is forwarded to this replica."""
        local = free_port()
        process = subprocess.Popen(
            [
                "kubectl",
                "--kubeconfig",
                self.world.cluster.kubeconfig,
                "-n",
                namespace,
                "port-forward",
                pod,
                f"{local}:{port}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.forwards.append(process)
        read_until(process, "Forwarding")
        return local

    def call(
        self, port: int, method: str, path: str, body: Any = None, *, bearer: str | None = None
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_TIMEOUT)
        with contextlib.closing(connection):
            headers = {"Authorization": f"Bearer {bearer or self.token}"}
            connection.request(
                method, f"/api/v1/{path}", None if body is None else json.dumps(body).encode(), headers
            )
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def allocate(self, port: int, **more: Any) -> dict[str, Any]:
        status, lease = self.call(port, "POST", "workers/allocate", {"poolName": POOL, **more})
        assert status == 200, lease
        return lease

    def release(self, port: int, lease: dict[str, Any]) -> None:
        assert self.call(port, "POST", "workers/release", {"token": lease["token"]})[0] == 200

    def certificates(self, lease: dict[str, Any], name: str) -> Certificates:
        return Certificates.of(lease, self.base / name)

    def build(self, certificates: Certificates, gateway: int, context: Path, name: str) -> Any:
        env = {**os.environ, "DOCKER_CONFIG": str(self.base / "docker"), "BUILDKIT_PROGRESS": "plain"}
        buildx = str(self.tools["buildx"])
        run(buildx, "rm", name, env=env)
        create = ("create", "--name", name, "--driver", "remote", "--driver-opt", certificates.driver_opt)
        run(buildx, *create, f"tcp://localhost:{gateway}", env=env).ok()
        return run(buildx, "build", "--builder", name, context, env=env)

    def start_build(self, certificates: Certificates, gateway: int, context: Context, name: str) -> Any:
        """Starts a build and returns its process."""
        env = {**os.environ, "DOCKER_CONFIG": str(self.base / "docker"), "BUILDKIT_PROGRESS": "plain"}
        buildx = str(self.tools["buildx"])
        create = ("create", "--name", name, "--driver", "remote", "--driver-opt", certificates.driver_opt)
        run(buildx, *create, f"tcp://localhost:{gateway}", env=env).ok()
        command = [buildx, "build", "--builder", name, str(context)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.forwards.append(process)
        return process

    def inside(self, script: str, *, check: bool = True) -> str:
        """Runs a script in the caller's pod."""
        return self.world.kubectl(
            *("exec", "caller", "--", "bash", "-c", f"set -euo pipefail; cd /home/bkpool; {script}"),
            check=check,
            timeout=SCRIPT_TIMEOUT,
        )

    def leased(self) -> list[str]:
        workers = self.world.objects("buildkitworkers", "-n", "default")
        return [worker["metadata"]["name"] for worker in workers if worker["spec"].get("allocation")]

    def all_free(self) -> None:
        eventually(lambda: not self.leased(), "every lease has ended")

    def settle(self) -> None:
        """Waits until all replicas are ready: the test before may have replaced some."""
        assert self.settled, "replicas were not ready again after an earlier test"
        self.settled = False
        eventually(lambda: len(self.controllers()) == len(self.gateways()) == 2, "all replicas are ready")
        self.settled = True

    def leaked(self) -> list[str]:
        """Returns the secrets found in the logs of the replicas, gateways and workers."""
        found = []
        for namespace, selector in (
            (SYSTEM, "app.kubernetes.io/name=buildkit-controller"),
            ("default", f"buildkit.smrt-devops.net/pool={POOL}"),
        ):
            # One pod at a time: for a selector, a pod that is being replaced can keep back the logs of all others.
            for pod in self.pods(selector, namespace):
                log = self.world.kubectl("-n", namespace, "logs", pod, "--all-containers")
                assert log, f"{pod} has a log to read"
                found += secrets_in(log)
        return found

    def close(self) -> None:
        while self.forwards:
            process = self.forwards.pop()
            process.kill()
            process.communicate()


CALLER = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "caller"},
    "spec": {
        "terminationGracePeriodSeconds": 1,
        "containers": [
            {
                "name": "caller",
                "image": IMAGE,
                "command": ["sleep", "infinity"],
                "imagePullPolicy": "IfNotPresent",
            }
        ],
    },
}


def _pool(image: str | None) -> dict[str, Any]:
    named = {"buildkitImage": image} if image else {}
    return {
        "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
        "kind": "BuildKitPool",
        "metadata": {"name": POOL},
        "spec": {"scaling": {"max": 4}, "gateway": {"replicas": 2}, **named},
    }


@pytest.fixture(scope="module")
def installed(world, image, tools, program, tmp_path_factory) -> Iterator[Installed]:
    kubectl = world.kubectl
    made = Installed(world, tmp_path_factory.mktemp("installed"), tools)
    buildkit = world.cluster.buildkit_image
    options = ["--image", IMAGE, *(["--allow-image", f"default={buildkit}"] if buildkit else [])]
    printed = run(sys.executable, "-m", "bkpool", "manifests", *options, env=dict(os.environ), cwd=ROOT).ok().out
    (made.base / "manifests.yaml").write_text(printed)
    kubectl("delete", "lease", "-n", SYSTEM, "bkpool-controller", "--ignore-not-found")
    try:
        kubectl("apply", "-f", str(made.base / "manifests.yaml"))
        kubectl("-n", SYSTEM, "rollout", "status", "deployment/buildkit-controller", "--timeout=240s")
        kubectl("apply", "-f", "-", stdin=json.dumps(_pool(buildkit)))
        kubectl("apply", "-f", "-", stdin=json.dumps(CALLER))
        kubectl("wait", "--for=condition=Ready", "pod/caller", "--timeout=180s")
        context = Context(made.base / "context", program).dockerfile("say in-the-cluster")
        kubectl("cp", str(tools["buildx"]), "caller:/home/bkpool/buildx")
        kubectl("cp", str(context), "caller:/home/bkpool/context")
        eventually(lambda: len(made.gateways()) == 2, "two gateways are ready", timeout=240)
        yield made
        made.close()
        leaked = made.leaked()
    finally:
        _uninstall(made)
    assert not leaked, leaked


def _uninstall(made: Installed) -> None:
    """Removes all of it. What was left would act on the pools of later tests, so no step depends on another one."""
    kubectl, objects = made.world.kubectl, made.world.objects
    policies = "validatingadmissionpolicy,validatingadmissionpolicybinding"
    controllers = ("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=buildkit-controller")
    do_all(
        made.close,
        partial(kubectl, "delete", "pod", "caller", "--ignore-not-found", "--wait=false"),
        partial(kubectl, "delete", "buildkitpools", "-A", "--all", "--wait=false"),
        # A registration that no gateway withdraws any more lives for a minute.
        partial(eventually, lambda: not objects("buildkitworkers", "-A"), "the workers are removed", timeout=240),
        partial(kubectl, "-n", SYSTEM, "delete", "deployment,service,pdb,networkpolicy,lease", "--all"),
        # Other tests have pools of their own.
        partial(kubectl, "delete", policies, f"bkpool-pools-{SYSTEM}", "--ignore-not-found"),
        partial(kubectl, "delete", "flowschema,prioritylevelconfiguration", "-l", "app.kubernetes.io/part-of=bkpool"),
        # Also those that are ending: until then they lead, and write.
        partial(eventually, lambda: not objects(*controllers), "the replicas are removed", timeout=180),
        partial(kubectl, "-n", SYSTEM, "delete", "lease", "--all"),
        made.world.empty,
        # One test has replaced the CAs. There is no lease any more, so the appliances of other tests make new ones.
        partial(kubectl, "-n", SYSTEM, "delete", "secret", "bkpool-pki", "--ignore-not-found"),
    )


@pytest.fixture(autouse=True)
def settled(installed: Installed) -> Iterator[None]:
    """All replicas are ready when a test begins, and a test that fails leaves no lease to the next one."""
    installed.settle()
    yield
    if left := installed.leased():
        installed.close()  # without a connection a lease ends sooner
        delete = ("delete", "buildkitworkers", "-n", "default", *left, "--timeout=60s")  # that ends their leases
        installed.world.kubectl(*delete, check=False)


SETUP = f"""
export BKCTL_ENDPOINT=http://buildkit-controller.buildkit-system.svc:8082
bkpool allocate --pool {POOL} --namespace default --ttl 1h > alloc.json
field() {{ python3 -c 'import json,sys; print(json.load(open("alloc.json"))[sys.argv[1]])' "$1"; }}
field caCert | base64 -d > ca.crt
field clientCert | base64 -d > client.crt
field clientKey | base64 -d > client.key
field gatewayEndpoint
"""
BUILD = """
export HOME=/home/bkpool
./buildx rm my-builder 2>/dev/null || true
./buildx create --name my-builder --driver remote \
  --driver-opt "cacert=$PWD/ca.crt,cert=$PWD/client.crt,key=$PWD/client.key" tcp://my-buildkit-pool.default.svc:1235
./buildx build --builder my-builder --progress plain context 2>&1
"""


ASKS = {
    "privileged": {"annotations": {"buildkit.smrt-devops.net/isolation": "privileged"}},
    "allow-image": {"spec": {"buildkitImage": "registry.example.com/mine:1"}},
    "gatewayImage": {"spec": {"gatewayImage": "registry.example.com/mine:1"}},
    "allow-host": {"spec": {"networking": {"external": {"hostname": f"buildkit-controller.{SYSTEM}.svc"}}}},
    "allow-load-balancer": {"spec": {"networking": {"serviceType": "LoadBalancer"}}},
    "allow-service-annotations": {"spec": {"networking": {"external": {"annotations": {"a": "b"}}}}},
}


@pytest.mark.parametrize("word", ASKS)
def test_the_api_server_refuses_a_pool_that_asks_for_what_is_not_allowed(installed, word):
    asked = ASKS[word]
    pool = {
        "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
        "kind": "BuildKitPool",
        "metadata": {"name": "hostile", "namespace": "default", "annotations": asked.get("annotations", {})},
        "spec": asked.get("spec", {}),
    }
    file = installed.base / "hostile.json"
    file.write_text(json.dumps(pool))
    kubectl = ("kubectl", "--kubeconfig", installed.world.cluster.kubeconfig)
    applied = run(*kubectl, "apply", "--dry-run=server", "-f", file, env=dict(os.environ))
    assert applied.code != 0
    assert word in applied.err
    assert "not allowed in namespace default" in applied.err


def test_a_pod_does_the_main_job(installed):
    output = installed.inside(f"export BKCTL_TOKEN={installed.token}; {SETUP}{BUILD}")
    assert SERVICE in output
    assert "in-the-cluster" in output
    installed.inside(
        "export BKCTL_ENDPOINT=http://buildkit-controller.buildkit-system.svc:8082; bkpool release --token alloc.json"
    )
    installed.all_free()


def test_a_service_account_builds_where_a_rule_allows_it(installed):
    kubectl = installed.world.kubectl
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    kubectl("create", "serviceaccount", "builder", "-n", "default")

    def token(account: str, audience: str = "buildkit-controller") -> str:
        return kubectl("create", "token", account, "-n", "default", "--audience", audience).strip()

    def asked(bearer: str) -> tuple[int, Any]:
        return installed.call(port, "POST", "workers/allocate", {"poolName": POOL}, bearer=bearer)

    def refused(bearer: str, code: int) -> bool:
        status, reply = asked(bearer)
        if status == 200:
            installed.release(port, reply)
        return status == code

    try:
        status, lease = asked(token("default"))
        assert status == 200, "nothing is configured yet, so every authenticated caller may build"
        installed.release(port, lease)
        status, reply = asked(token("builder", "somebody-else"))
        assert (status, "audience" in reply["error"]["message"]) == (401, True), reply

        rule = {"users": ["system:serviceaccount:default:build*", "group:nobody"], "pools": [POOL]}
        patch = {"spec": {"auth": {"rbac": {"rules": [rule]}}}}
        kubectl("patch", "buildkitpool", POOL, "-n", "default", "--type=merge", "-p", json.dumps(patch))
        others = token("default")
        eventually(lambda: refused(others, 403), "the rule is applied")
        assert "system:serviceaccount:default:default may not use" in asked(others)[1]["error"]["message"]
        status, lease = asked(token("builder"))
        assert status == 200, lease
        installed.release(port, lease)
        installed.inside(
            f"export BKCTL_TOKEN={token('builder')} BKCTL_ENDPOINT=http://buildkit-controller.{SYSTEM}.svc:8082; "
            f"bkpool allocate --pool {POOL} > mine.json; bkpool release --token mine.json"
        )
        gone = token("builder")
        kubectl("delete", "serviceaccount", "builder", "-n", "default")
        eventually(lambda: refused(gone, 401), "the token of a deleted account is refused")
    finally:
        kubectl("delete", "serviceaccount", "builder", "-n", "default", "--ignore-not-found")
        kubectl(
            *("patch", "buildkitpool", POOL, "-n", "default", "--type=merge"),
            *("-p", '{"spec": {"auth": null}}'),
        )
    installed.all_free()


def test_the_replicas_agree_on_the_state_of_an_issuer(installed):
    kubectl = installed.world.kubectl
    document = {
        "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
        "kind": "BuildKitOIDCConfig",
        "metadata": {"name": "world", "namespace": SYSTEM},
        "spec": {"issuer": "https://token.actions.githubusercontent.com", "audience": "buildkit-controller"},
    }
    kubectl("apply", "-f", "-", stdin=json.dumps(document))
    try:
        reply = eventually(
            lambda: kubectl("get", "buildkitoidcconfig", "world", "-n", SYSTEM, "-o", "jsonpath={.status.message}"),
            "the leader has judged it",
        )
        assert "condition" in reply
    finally:
        kubectl("delete", "buildkitoidcconfig", "world", "-n", SYSTEM)


def test_the_troubleshooting_commands_of_the_guide_work(installed):
    """The commands show the pool, its Service, pods and logs by label, buildkitworkers, and use openssl."""
    kubectl = installed.world.kubectl
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    lease = installed.allocate(port)
    assert POOL in kubectl("get", "buildkitpool", POOL, "-n", "default")
    assert "Ready" in kubectl("describe", "buildkitpool", POOL)
    assert "1235" in kubectl("get", "svc", POOL, "-n", "default")
    selector = f"buildkit.smrt-devops.net/pool={POOL},buildkit.smrt-devops.net/purpose=gateway"
    assert kubectl("get", "pods", "-n", "default", "-l", selector).count("Running") == 2
    assert "gateway.listening" in kubectl("logs", "-n", "default", "-l", selector, "--tail=-1")
    assert "replica.ready" in kubectl(
        "logs", "-n", SYSTEM, "-l", "app.kubernetes.io/name=buildkit-controller", "--tail=-1"
    )
    row = rf"{lease['workerName']}\s+{POOL}\s+Allocated"
    eventually(lambda: re.search(row, kubectl("get", "buildkitworkers", "-n", "default")), "the phase is shown")
    certificates = installed.certificates(lease, "openssl")
    shown = run(
        "openssl", "x509", "-in", certificates.directory / "client.crt", "-noout", "-subject", env=dict(os.environ)
    )
    assert f"alloc:{lease['token']}" in shown.ok().out
    gateway = installed.forward("default", installed.gateways()[0], 1235)
    d = certificates.directory
    files = ("-CAfile", d / "ca.crt", "-cert", d / "client.crt", "-key", d / "client.key")
    handshake = run(
        "openssl",
        "s_client",
        "-connect",
        f"localhost:{gateway}",
        *files,
        "-verify_return_error",
        "-brief",
        env=dict(os.environ),
    )
    assert "Verification: OK" in handshake.text
    installed.release(port, lease)
    installed.all_free()


def test_certificates_from_a_secret_work_until_the_lease_ends(installed, program):
    """Option C of the guide."""
    kubectl, name = installed.world.kubectl, "build-certs"
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    gateway = installed.forward("default", installed.gateways()[0], 1235)
    lease = installed.allocate(port)
    d = installed.certificates(lease, "stored").directory
    files = [f"--from-file={file}={d / file}" for file in ("ca.crt", "client.crt", "client.key")]
    kubectl("create", "secret", "generic", name, *files)
    read = json.loads(kubectl("get", "secret", name, "-o", "json"))["data"]
    kubectl("delete", "secret", name)
    again = {"caCert": read["ca.crt"], "clientCert": read["client.crt"], "clientKey": read["client.key"]}
    certificates = installed.certificates(again, "read-back")
    context = Context(installed.base / "stored-context", program).dockerfile("say from-a-secret")
    installed.build(certificates, gateway, context, "stored").ok()
    installed.release(port, lease)
    assert "released" in installed.build(certificates, gateway, context, "stored").text
    installed.all_free()


def test_every_replica_honours_what_another_one_did(installed, program):
    kubectl = installed.world.kubectl
    one, two = (installed.forward(SYSTEM, pod, 8082) for pod in installed.controllers())
    gateways = [installed.forward("default", pod, 1235) for pod in installed.gateways()]
    context = Context(installed.base / "honoured", program).dockerfile("say honoured")
    lease = installed.allocate(one)
    certificates = installed.certificates(lease, "honoured-certs")
    for number, gateway in enumerate(gateways):
        installed.build(certificates, gateway, context, f"honoured-{number}").ok()
    status, reply = installed.call(two, "POST", "workers/renew", {"token": lease["token"], "ttl": "2h"})
    assert status == 200, reply
    installed.release(two, lease)
    for number, gateway in enumerate(gateways):
        assert "released" in installed.build(certificates, gateway, context, f"over-{number}").text
    installed.all_free()
    assert "gateway" in kubectl("get", "pods", "-o", "name")


def test_the_same_job_at_two_replicas_gets_one_lease(installed):
    ports = [installed.forward(SYSTEM, pod, 8082) for pod in installed.controllers()]
    for attempt in range(5):
        answers: dict[int, Any] = {}

        def ask(port: int, job: str, answers: dict[int, Any]) -> None:
            answers[port] = installed.allocate(port, jobId=job)

        threads = [threading.Thread(target=ask, args=(port, f"job-{attempt}", answers)) for port in ports]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({lease["token"] for lease in answers.values()}) == 1
        installed.release(ports[0], answers[ports[0]])
        installed.all_free()


def test_waiting_callers_at_both_replicas_all_get_a_worker(installed):
    ports = [installed.forward(SYSTEM, pod, 8082) for pod in installed.controllers()]
    served: list[str] = []

    def one(port: int) -> None:
        lease = installed.allocate(port, wait="3m")
        served.append(lease["workerName"])
        installed.release(port, lease)

    threads = [threading.Thread(target=one, args=(ports[number % 2],)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(served) == 16
    installed.all_free()


def _builds(installed, seconds: int, count: int = 20) -> threading.Thread:
    """Starts builds on four leases in the caller's pod, all at once."""
    script = [
        f"export BKCTL_TOKEN={installed.token} BKCTL_ENDPOINT=http://buildkit-controller.buildkit-system.svc:8082"
    ]
    script.append("export HOME=/home/bkpool; rm -rf many; mkdir many")
    for lease in range(4):
        script.append(f"bkpool allocate --pool {POOL} --out many/{lease} >/dev/null")
        script.append(f"./buildx rm many-{lease} 2>/dev/null || true")
        opts = f"cacert=$PWD/many/{lease}/ca.crt,cert=$PWD/many/{lease}/client.crt,key=$PWD/many/{lease}/client.key"
        script.append(
            f'./buildx create --name many-{lease} --driver remote --driver-opt "{opts}" {SERVICE} >/dev/null'
        )
    script.append("echo begun >many/begun")
    step = json.dumps(["/program", "sleep", f"{seconds}s"])
    for number in range(count):
        dockerfile = f"FROM scratch\\nCOPY program /program\\nENV N={number}-$RANDOM\\nRUN {step}\\n"
        script.append(
            f"(printf '{dockerfile}' | ./buildx build --builder many-{number % 4} -f - context"
            f" >many/log-{number} 2>&1; echo $? >many/code-{number}) &"
        )
    script.append("wait")
    script += [f"bkpool release --token many/{lease}/lease.json >/dev/null" for lease in range(4)]
    installed.inside("rm -rf many")  # an earlier test's would say that this one has begun
    thread = threading.Thread(target=installed.inside, args=("\n".join(script),))
    thread.start()

    def begun() -> bool:
        assert thread.is_alive(), "the script has ended already"
        return "begun" in installed.inside("cat many/begun 2>/dev/null || true")

    eventually(begun, "leased", timeout=300)
    eventually(lambda: not thread.is_alive() or _many_connections(installed), "builds are under way")
    return thread


def _many_connections(installed) -> bool:
    workers = installed.world.objects("buildkitworkers", "-n", "default")
    return (
        sum(entry["connections"] for w in workers for entry in w["status"].get("gateways", ())) >= 1
        and len(workers) >= 4
    )


def _codes(installed) -> list[str]:
    return installed.inside("cat many/code-*").split()


def test_no_build_is_lost_when_the_leader_is_killed(installed):
    kubectl = installed.world.kubectl
    thread = _builds(installed, seconds=15)
    leader = installed.leader()
    kubectl("-n", SYSTEM, "delete", "pod", leader, "--grace-period=0", "--force")
    thread.join()
    assert _codes(installed) == ["0"] * 20, installed.inside("tail -n 3 many/log-*")
    eventually(lambda: installed.leader() not in {"", leader}, "another replica leads")
    installed.all_free()


def test_no_build_is_lost_in_a_rolling_update_of_everything(installed):
    kubectl = installed.world.kubectl
    thread = _builds(installed, seconds=25)
    kubectl("-n", SYSTEM, "rollout", "restart", "deployment/buildkit-controller")
    kubectl("rollout", "restart", f"deployment/{POOL}-gateway")
    kubectl("-n", SYSTEM, "rollout", "status", "deployment/buildkit-controller", "--timeout=240s")
    thread.join()
    assert _codes(installed) == ["0"] * 20, installed.inside("tail -n 3 many/log-*")
    kubectl("rollout", "status", f"deployment/{POOL}-gateway", "--timeout=240s")
    installed.all_free()


def test_a_lease_of_before_goes_on_when_the_cas_are_replaced(installed, program, tmp_path):
    kubectl = installed.world.kubectl
    context = Context(tmp_path / "context", program).dockerfile("say rotated")
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    before = installed.allocate(port)
    old = installed.certificates(before, "rotation-old")
    where = ("--backend", "kubernetes", "--kubeconfig", installed.world.cluster.kubeconfig)
    env = {**os.environ, "BKPOOL_HOME": str(tmp_path / "home")}
    rotated = run(sys.executable, "-m", "bkpool", "pki", "rotate", *where, env=env, cwd=ROOT).ok()
    assert json.loads(rotated.out)["restarted"] is True
    kubectl("-n", SYSTEM, "rollout", "status", "deployment/buildkit-controller", "--timeout=240s")

    def both_are_trusted() -> bool:
        encoded = kubectl("get", "secret", f"{POOL}-gateway", "-o", "jsonpath={.data.ca\\.crt}")
        return base64.b64decode(encoded).count(b"BEGIN CERTIFICATE") == 2

    eventually(both_are_trusted, "the gateways trust both CAs", timeout=240)
    gateway = installed.forward("default", installed.gateways()[0], 1235)
    installed.build(old, gateway, context, "rotation-old").ok()
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    after = installed.allocate(port, wait="3m")
    assert base64.b64decode(after["caCert"]).count(b"BEGIN CERTIFICATE") == 2
    installed.build(installed.certificates(after, "rotation-new"), gateway, context, "rotation-new").ok()
    refused = run(sys.executable, "-m", "bkpool", "pki", "rotate", *where, env=env, cwd=ROOT)
    assert refused.code != 0
    assert "the last rotation is not over" in refused.err
    for lease in (before, after):
        installed.release(port, lease)
    installed.all_free()


def test_a_gateway_with_a_frozen_watch_does_not_connect_a_former_tenant(installed, program, tmp_path):
    """Rule 10 (docs/rules.md#r10). A third gateway runs on this machine, behind a proxy that stops its watches."""
    world = installed.world
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    context = Context(tmp_path / "context", program).dockerfile("say mine")
    with FaultProxy(world.cluster.kubeconfig, tmp_path) as proxy:
        gateway, metrics = free_port(), free_port()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "bkpool", "up", "--backend", "kubernetes", "--roles", "gateway"),
                *("--pool", f"default/{POOL}", "--kubeconfig", str(proxy.kubeconfig)),
                *("--gateway-address", f"127.0.0.1:{gateway}", "--metrics-address", f"127.0.0.1:{metrics}"),
            ],
            env={**os.environ, "BKPOOL_HOME": str(tmp_path / "home"), "POD_NAME": "frozen"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            eventually(lambda: _ready(metrics), "the third gateway is ready")
            first = installed.allocate(port)
            old = installed.certificates(first, "frozen-old")
            proxy.frozen = True
            installed.release(port, first)
            installed.all_free()
            others = [installed.allocate(port) for _ in range(4)]
            assert first["workerName"] in {lease["workerName"] for lease in others}
            refused = installed.build(old, gateway, context, "frozen")
            assert refused.code != 0
            assert "lease" in refused.text
            assert not really_ran(refused, "mine")
            for lease in others:
                installed.release(port, lease)
        finally:
            process.terminate()
            try:
                process.wait(timeout=90)
            finally:
                process.kill()
                process.wait()
    installed.all_free()


def test_a_revoked_lease_is_cut_at_every_gateway_replica_within_two_seconds(installed, program, tmp_path):
    """One build and one more connection at each replica; the worker's pod is replaced before anybody gets it."""
    port = installed.forward(SYSTEM, installed.controllers()[0], 8082)
    lease = installed.allocate(port)
    certificates = installed.certificates(lease, "revoked")
    gateways = [installed.forward("default", gateway, 1235) for gateway in installed.gateways()]
    assert len(gateways) == 2
    context = Context(tmp_path / "context", program).dockerfile("sleep 300s")
    build = installed.start_build(certificates, gateways[0], context, "revoked")
    read_until(build, "sleeping")
    pod = _pod_uid(installed, lease)
    with contextlib.ExitStack() as stack:
        open_ones = [stack.enter_context(_relayed(certificates, gateway)) for gateway in gateways]
        status, answer = installed.call(port, "POST", "workers/revoke", {"workerName": lease["workerName"]})
        revoked = time.monotonic()
        assert status == 200, answer
        assert [one["workerName"] for one in answer["revoked"]] == [lease["workerName"]]
        for connection in open_ones:
            with contextlib.suppress(ConnectionError, ssl.SSLError):  # cut, also without TLS's own end
                while connection.recv(65536):
                    pass
        assert time.monotonic() - revoked < 2
    assert build.wait(timeout=WAIT_TIMEOUT) != 0
    installed.all_free()
    assert pod not in {pod["metadata"]["uid"] for pod in installed.world.objects("pods", "-n", "default")}
    refused = installed.build(certificates, gateways[1], context, "revoked")
    assert refused.code != 0
    assert "the lease was revoked by the admin" in refused.text


def _pod_uid(installed: Installed, lease: dict[str, Any]) -> str:
    name = f"-lbuildkit.smrt-devops.net/worker={lease['workerName']}"
    (pod,) = installed.world.objects("pods", "-n", "default", name)
    return str(pod["metadata"]["uid"])


def _relayed(certificates: Certificates, port: int) -> ssl.SSLSocket:
    """A connection through a gateway on which the worker has answered, so that it is relayed."""
    context = ssl.create_default_context(cafile=str(certificates.directory / "ca.crt"))
    context.load_cert_chain(certificates.directory / "client.crt", certificates.directory / "client.key")
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("127.0.0.1", port), timeout=WAIT_TIMEOUT)
    connection = context.wrap_socket(raw, server_hostname="localhost")
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
    assert connection.recv(9)[3] == 4, "the worker sends its SETTINGS"
    return connection


def _ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        with contextlib.closing(connection):
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
    return False
