"""Option B of the usage guide, unchanged: a job gets its ID token from GitHub and a worker from the API, with curl.

The development issuer answers as GitHub's does. Only one thing is not from the guide: a ~/.curlrc, which makes the
name of the API in a cluster lead to this machine.
"""

from __future__ import annotations

import json

import pytest

from harness import Appliance, Context, free_port, from_registry, only_on, run

pytestmark = only_on("process", "only curl differs from test_guide.py and test_ci.py, which every backend has")

POOL = "my-buildkit-pool"
TOKEN = """
set -euo pipefail
TOKEN=$(curl -H "Authorization: bearer $ACTIONS_ID_TOKEN_REQUEST_TOKEN" \\
  "$ACTIONS_ID_TOKEN_REQUEST_URL&audience=buildkit-controller" | jq -r .value)
"""
ALLOCATE = """
curl -X POST http://buildkit-controller.buildkit-system.svc:8082/api/v1/workers/allocate \\
  -H "Authorization: Bearer $TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{"poolName": "my-buildkit-pool", "namespace": "default", "ttl": "1h"}' > alloc.json
"""
CREATE = """
jq -r '.caCert' alloc.json | base64 -d > ca.crt
jq -r '.clientCert' alloc.json | base64 -d > client.crt
jq -r '.clientKey' alloc.json | base64 -d > client.key
GATEWAY_ENDPOINT=$(jq -r '.gatewayEndpoint' alloc.json)
docker buildx create \\
  --name my-builder \\
  --driver remote \\
  --driver-opt "cacert=$PWD/ca.crt,cert=$PWD/client.crt,key=$PWD/client.key" \\
  $GATEWAY_ENDPOINT \\
  --use
"""
BUILD = """
docker buildx build \\
  --builder my-builder \\
  --platform linux/amd64,linux/arm64 \\
  --tag $REGISTRY/option-b:latest \\
  --push \\
  context
"""
RELEASE = """
docker buildx rm my-builder
curl -sS -X POST http://buildkit-controller.buildkit-system.svc:8082/api/v1/workers/release \\
  -H "Content-Type: application/json" \\
  -d "{\\"token\\": \\"$(jq -r .token alloc.json)\\"}"
"""


@pytest.fixture
def guided(tmp_path_factory, tools, world, registry_host):
    """An appliance with the pool of the guide. A rule of the pool decides who may use it."""
    appliance = Appliance(tmp_path_factory.mktemp("option-b"), tools, world=world)
    appliance.issuer_port = free_port()
    rules = [{"users": ["octo*"], "pools": [POOL]}]
    spec = {"scaling": {"mode": "auto", "min": 0, "max": 10}, "auth": {"rbac": {"rules": rules}}}
    issuer = ("--dev-issuer", "--dev-issuer-address", f"127.0.0.1:{appliance.issuer_port}")
    appliance.up_with(spec | world.trusting(registry_host), *issuer, name=POOL)
    yield appliance
    appliance.finish()


def job(appliance, actor, script, directory, registry_host):
    """Runs the script as a job of this actor, with the variables that GitHub sets."""
    (directory / ".curlrc").write_text(
        f'connect-to = "buildkit-controller.buildkit-system.svc:8082:127.0.0.1:{appliance.ports["api"]}"\n'
        "silent\nshow-error\n"
    )
    url = f"http://127.0.0.1:{appliance.issuer_port}/actions/token?api-version=2.0&actor={actor}"
    env = {
        **appliance.env,
        "HOME": str(directory),
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-the-runner",
        "ACTIONS_ID_TOKEN_REQUEST_URL": url,
        "REGISTRY": registry_host,
    }
    return run("bash", "-c", script, env=env, cwd=directory)


def test_the_commands_of_option_b_work(guided, tmp_path, program, registry_host):
    Context(tmp_path / "context", program).write("FROM scratch\nCOPY program /program\n")
    script = TOKEN + ALLOCATE + CREATE + BUILD + RELEASE
    answer = job(guided, "octocat", script, tmp_path, registry_host).ok()
    assert answer.out.endswith('{"status":"released"}')
    assert len(json.loads((tmp_path / "alloc.json").read_text())) == 8
    index = from_registry(registry_host, "option-b/manifests/latest")
    platforms = {f"{m['platform']['os']}/{m['platform']['architecture']}" for m in index["manifests"]}
    assert {"linux/amd64", "linux/arm64"} <= platforms


def test_another_actor_gets_no_worker_but_the_reason(guided, tmp_path, registry_host):
    job(guided, "mallory", TOKEN + ALLOCATE, tmp_path, registry_host).ok()  # curl itself succeeds
    error = json.loads((tmp_path / "alloc.json").read_text())["error"]
    assert error["code"] == "Forbidden"
    assert "mallory" in error["message"]
