"""The commands of the usage guide, unchanged except for absolute certificate paths, which buildx requires."""

from __future__ import annotations

import json

import pytest

from harness import Appliance, Context, from_registry, only_on, really_ran, run

POOL = "my-buildkit-pool"
SETUP = f"""
set -euo pipefail
bkctl allocate --pool {POOL} --namespace default --ttl 1h > alloc.json
"""
CURL = f"""
set -euo pipefail
curl -sS -X POST http://localhost:$API_PORT/api/v1/workers/allocate \\
  -H "Authorization: Bearer $TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{{"poolName": "{POOL}", "namespace": "default", "ttl": "1h"}}' \\
  > alloc.json
"""
CREATE = """
jq -r '.caCert' alloc.json | base64 -d > ca.crt
jq -r '.clientCert' alloc.json | base64 -d > client.crt
jq -r '.clientKey' alloc.json | base64 -d > client.key
GATEWAY_ENDPOINT=$(jq -r '.gatewayEndpoint' alloc.json)
openssl x509 -in client.crt -noout -subject
openssl x509 -in client.crt -noout -dates
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
  --tag $REGISTRY/myapp:latest \\
  --push \\
  context
"""
RELEASE = """
docker buildx rm my-builder
bkctl release --token "$(jq -r .token alloc.json)"
"""


@pytest.fixture(scope="module")
def guided(tmp_path_factory, tools, world, registry_host):
    """An appliance with the pool of the guide."""
    appliance = Appliance(tmp_path_factory.mktemp("guide"), tools, world=world)
    spec = {"scaling": {"mode": "auto", "min": 0, "max": 10}, "tls": {"enabled": True}}
    appliance.up_with(spec | world.trusting(registry_host), name=POOL)
    yield appliance
    appliance.finish()


def _shell(appliance, script, directory, registry_host):
    env = {
        **appliance.env,
        "API_PORT": str(appliance.ports["api"]),
        "TOKEN": (appliance.home / "admin.token").read_text().strip(),
        "REGISTRY": registry_host,
        "BUILDX_CONFIG": str(directory / "buildx"),  # without the builder of a test that failed
    }
    return run("bash", "-c", script, env=env, cwd=directory)


@pytest.mark.parametrize(
    "allocation",
    [
        pytest.param(SETUP, id="bkctl"),
        pytest.param(CURL, id="curl", marks=only_on("process", "only the program that calls the API is another one")),
    ],
)
def test_the_commands_of_the_guide_work(guided, allocation, tmp_path, program, registry_host):
    context = Context(tmp_path / "context", program)
    context.write("FROM scratch\nCOPY program /program\n")  # files only, because emulation is not promised
    answer = _shell(guided, allocation + CREATE + BUILD + RELEASE, tmp_path, registry_host).ok()
    lease = json.loads((tmp_path / "alloc.json").read_text())
    assert set(lease) == {
        *("workerName", "token", "endpoint", "gatewayEndpoint", "expiresAt", "caCert", "clientCert", "clientKey")
    }
    assert f"CN = alloc:{lease['token']}" in answer.out or f"CN=alloc:{lease['token']}" in answer.out
    index = from_registry(registry_host, "myapp/manifests/latest")
    platforms = {f"{m['platform']['os']}/{m['platform']['architecture']}" for m in index["manifests"]}
    assert {"linux/amd64", "linux/arm64"} <= platforms


def test_the_registry_cache_and_the_inline_cache_of_the_guide_work(guided, tmp_path, program, registry_host):
    """The second build runs on a new worker, so its cache comes from the registry."""
    context = Context(tmp_path / "context", program).dockerfile("say cached-in-the-registry")
    cache = f"type=registry,ref={registry_host}/cache/myapp"
    inline = f"type=registry,ref={registry_host}/myapp:buildcache"
    first = guided.builder(guided.allocate("--pool", POOL, name="one"), "cache-one")
    result = guided.build(
        first, context, "--cache-to", f"{cache},mode=max", "--tag", f"{registry_host}/myapp:latest", "--push"
    ).ok()
    assert really_ran(result, "cached-in-the-registry")
    guided.build(
        first, context, "--cache-to", "type=inline", "--tag", f"{registry_host}/myapp:buildcache", "--push"
    ).ok()
    second = guided.builder(guided.allocate("--pool", POOL, name="two"), "cache-two")  # a new worker without a cache
    result = guided.build(
        second, context, "--cache-from", cache, "--tag", f"{registry_host}/myapp:latest", "--push"
    ).ok()
    assert not really_ran(result, "cached-in-the-registry")
    third = guided.builder(guided.allocate("--pool", POOL, name="three"), "cache-three")
    result = guided.build(third, context, "--cache-from", inline, "--tag", f"{registry_host}/myapp:3", "--push").ok()
    assert not really_ran(result, "cached-in-the-registry")
