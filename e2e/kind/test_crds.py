"""The definitions at a real API server: what it accepts, what it rejects, and that it names the field.

Nothing is stored: every object is sent with `--dry-run=server`.
"""

from __future__ import annotations

import json

import pytest
import yaml
from pydantic import ValidationError

from bkpool.core.pool import PoolSpec
from bkpool.install import crds

HEAD = {
    "apiVersion": "buildkit.smrt-devops.net/v1alpha1",
    "kind": "BuildKitPool",
    "metadata": {"name": "tried", "namespace": "default"},
}

OF_THE_GO_CONTROLLER = """
scaling: {}
resources: {buildkit: {}, sidecar: {}}
cache: {gc: {}}
tls: {}
auth: {}
networking: {}
gateway: {}
observability: {metrics: {}, logging: {}}
---
scaling:
  mode: auto
  min: 0
  max: 10
  scaleDownDelay: 15m
  scaleDownSchedule: 0 18 * * 1-5
  targetCPUUtilization: 70
  targetMemoryUtilization: 80
  targetActiveConnections: 10
---
resources:
  buildkit: {requests: {cpu: 1, memory: 2Gi}, limits: {cpu: 2000m, memory: 4Gi}}
---
cache:
  backends:
    - {type: registry, registry: {endpoint: registry.example.com, mode: max}}
    - {type: s3, s3: {bucket: b, region: r}}
    - {type: local, local: {storageClass: fast, size: 100Gi}}
  gc: {enabled: true, schedule: 0 2 * * *, keepStorage: 10GB, keepDuration: 168h}
---
tls:
  enabled: true
  mode: auto
  auto: {serverCertDuration: 8760h, rotateBeforeExpiry: 720h, organization: o}
---
tls: {enabled: true, mode: manual, manual: {serverCertSecret: a, caSecret: b}}
---
auth: {methods: [mtls]}
---
auth:
  methods:
    - {type: mtls, mtls: {required: true}}
    - {type: token, token: {secretRef: s}}
    - {type: oidc, oidc: {issuer: "https://issuer.example.com", audience: a, claimsMapping: {user: actor}}}
  rbac: {enabled: true, rules: [{users: ["*"], pools: [p]}]}
---
networking:
  serviceType: ClusterIP
  port: 1235
  allowedCIDRs: [10.0.0.0/8]
  annotations: {a: b}
  external: {enabled: true, hostname: build.example.com, annotations: {c: d}}
---
gateway:
  enabled: true
  replicas: 2
  resources: {cpu: 500m, memory: 256Mi}
  tokenTTL: 1h
  maxTokenTTL: 24h
  serviceType: LoadBalancer
  loadBalancerClass: inner
  port: 1235
  nodePort: 30123
  gatewayAPI: {enabled: true, hostname: h.example.com, gatewayRef: {name: g}}
  ingress: {enabled: false}
---
observability: {metrics: {enabled: true, port: 9090}, logging: {level: info, format: json}}
---
buildkitImage: moby/buildkit:rootless
gatewayImage: registry.example.com/gateway:1
buildkitConfig: debug = true
"""

ISSUER = "https://issuer.example.com"
REFUSED = [
    ("{scaling: {min: 3, max: 2}}", "spec.scaling.min", True),
    ("{scaling: {min: 11}}", "spec.scaling.min", True),
    ("{scaling: {max: -1}}", "spec.scaling.max", True),
    ("{scaling: {max: '3'}}", "spec.scaling.max", True),
    ("{scaling: {mode: odd}}", "spec.scaling.mode", False),
    ("{scaling: {scaleDownDelay: banana}}", "spec.scaling.scaleDownDelay", True),
    ("{scaling: {scaleDownSchedule: often}}", "spec.scaling.scaleDownSchedule", False),
    ("{resources: {buildkit: {limits: {cpu: lots}}}}", "spec.resources.buildkit.limits.cpu", True),
    ("{resources: {buildkit: {limits: {cpu: -2}}}}", "spec.resources.buildkit.limits.cpu", True),
    ("{cache: {reuse: sometimes}}", "spec.cache.reuse", True),
    ("{cache: {backends: [{type: local}, {type: local}]}}", "spec.cache.backends", True),
    ("{cache: {backends: [{type: tape}]}}", "spec.cache.backends[0].type", True),
    ("{cache: {backends: [{local: {}}]}}", "spec.cache.backends[0].type", True),
    ("{cache: {gc: {keepStorage: lots}}}", "spec.cache.gc.keepStorage", True),
    ("{tls: {auto: {}, manual: {}}}", "spec.tls", False),
    ("{tls: {auto: {serverCertDuration: 1h, rotateBeforeExpiry: 2h}}}", "spec.tls.auto.rotateBeforeExpiry", False),
    ("{auth: {methods: [{type: odd}]}}", "spec.auth.methods[0].type", True),
    ("{auth: {methods: [odd]}}", "spec.auth.methods[0]", True),
    ("{auth: {methods: [token]}}", "spec.auth.methods[0]", True),
    ("{auth: {methods: [{type: token}]}}", "spec.auth.methods[0]", True),
    ("{auth: {methods: [{token: {secretRef: s}}]}}", "spec.auth.methods[0].type", True),
    ("{auth: {methods: [{type: token, token: {}}]}}", "spec.auth.methods[0].token", True),
    ("{auth: {methods: [{type: token, token: {secretRef: s, file: /f}}]}}", "spec.auth.methods[0].token", True),
    ("{auth: {methods: [{type: token, token: {file: f}}]}}", "spec.auth.methods[0].token.file", True),
    ("{auth: {methods: [{type: oidc, oidc: {audience: a}}]}}", "methods[0].oidc.issuer", True),
    ("{auth: {methods: [{type: oidc, oidc: {conditions: [{claim: c}]}}]}}", "methods[0].oidc.conditions[0]", True),
    ("{auth: {rbac: {rules: [{users: ['']}]}}}", "spec.auth.rbac.rules[0].users[0]", True),
    ("{auth: {limits: {identity: {leases: 0}}}}", "spec.auth.limits.identity.leases", True),
    ("{networking: {egress: {policy: odd}}}", "spec.networking.egress.policy", True),
    ("{networking: {egress: {allowedCIDRs: [odd]}}}", "spec.networking.egress.allowedCIDRs[0]", True),
    ("{untrusted: 'yes'}", "spec.untrusted", True),
    ("{networking: {allowedCIDRs: [odd]}}", "spec.networking.allowedCIDRs[0]", True),
    ("{networking: {allowedCIDRs: [10.0.0.1]}}", "spec.networking.allowedCIDRs[0]", True),
    ("{networking: {serviceType: Odd}}", "spec.networking.serviceType", True),
    ("{networking: {external: {hostname: 'https://x'}}}", "spec.networking.external.hostname", True),
    ("{gateway: {tokenTTL: 0s}}", "spec.gateway.tokenTTL", True),
    ("{gateway: {tokenTTL: -1h}}", "spec.gateway.tokenTTL", True),
    ("{gateway: {tokenTTL: 48h}}", "spec.gateway.tokenTTL", True),
    ("{gateway: {replicas: 0}}", "spec.gateway.replicas", True),
    ("{gateway: {port: 70000}}", "spec.gateway.port", True),
    ("{gateway: {gatewayAPI: {enabled: true}, ingress: {enabled: true}}}", "spec.gateway", False),
    ("{surprise: 1}", "spec.surprise", False),
]


@pytest.fixture
async def installed(api, kubectl):
    await crds.install(api)

    def tried(spec, **options):
        document = yaml.safe_dump({**HEAD, "spec": yaml.safe_load(spec)})
        return kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=document, **options)

    return tried


async def test_the_definitions_are_served_at_once_and_can_be_installed_again(api, kubectl):
    await crds.install(api)
    await crds.install(api)
    assert "SHORTNAMES" in kubectl("api-resources", "--api-group=buildkit.smrt-devops.net")
    for name in ("buildkitpools", "bkpool", "bkworker", "buildkitoidcconfigs", "buildkit"):
        kubectl("get", name)


@pytest.mark.parametrize("spec", ["{}", *OF_THE_GO_CONTROLLER.split("---\n")])
def test_every_field_of_the_go_controller_is_accepted_and_stored(installed, spec):
    stored = json.loads(installed(spec))["spec"]
    wanted = yaml.safe_load(spec)
    assert _within(wanted, stored), "no field is pruned"
    PoolSpec.model_validate(stored)


def _within(part, whole):
    if isinstance(part, dict):
        return all(key in whole and _within(value, whole[key]) for key, value in part.items())
    if isinstance(part, list):
        return len(part) == len(whole) and all(map(_within, part, whole))
    return part == whole


def test_an_empty_spec_gets_the_defaults_of_bkpool(installed):
    stored = json.loads(installed("{}"))["spec"]
    assert PoolSpec.model_validate(stored).model_dump() == PoolSpec().model_dump()


@pytest.mark.parametrize(("spec", "field", "by_bkpool_too"), REFUSED)
def test_a_wrong_value_is_refused_and_its_field_is_named(installed, spec, field, by_bkpool_too):
    with pytest.raises(AssertionError, match=r"invalid|unknown field|BadRequest") as refused:
        installed(spec)
    assert field in str(refused.value)
    if by_bkpool_too:
        with pytest.raises(ValidationError):
            PoolSpec.model_validate(yaml.safe_load(spec))


def test_only_the_spec_is_required(installed, kubectl):
    with pytest.raises(AssertionError, match="spec"):
        kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(HEAD))


def test_kubectl_explains_every_field(installed, kubectl):
    body = kubectl("explain", "buildkitpool.spec", "--recursive")
    for field in (
        "scaleDownDelay",
        "keepDuration",
        "rotateBeforeExpiry",
        "claims\t",
        "loadBalancerClass",
        "hostname",
    ):
        assert (field in body) == (field != "claims\t")
    assert "A Go duration" in kubectl("explain", "buildkitpool.spec.gateway.tokenTTL")


def test_kubectl_shows_the_columns(installed, kubectl, namespace):
    pool = {**HEAD, "metadata": {"name": "shown", "namespace": namespace}, "spec": {}}
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(pool))
    status = {"status": {"phase": "Ready", "workers": 4, "ready": 3, "idle": 1, "allocated": 2, "connections": 5}}
    status["status"]["endpoint"] = "tcp://shown:1235"
    kubectl(
        *("patch", "bkpool", "shown", "-n", namespace, "--subresource=status", "--type=merge"),
        *("-p", json.dumps(status)),
    )
    header, row = kubectl("get", "bkpool", "shown", "-n", namespace).splitlines()
    assert " ".join(header.split()) == "NAME PHASE WORKERS READY IDLE ALLOCATED CONNECTIONS ENDPOINT AGE"
    assert row.split()[:-1] == ["shown", "Ready", "4", "3", "1", "2", "5", "tcp://shown:1235"]
    worker = {
        **HEAD,
        "kind": "BuildKitWorker",
        "metadata": {"name": "shown-worker-0", "namespace": namespace},
        "spec": {
            "poolRef": {"name": "shown"},
            "allocation": {"jobId": "job-7", "expiresAt": "2040-01-01T12:00:00Z", "another": "version's"},
        },
    }
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(worker))
    header, row = kubectl("get", "bkworker", "-n", namespace).splitlines()
    assert " ".join(header.split()) == "NAME POOL PHASE POD JOB EXPIRES AGE"
    assert "job-7" in row
    assert "2040-01-01T12:00:00Z" in row, "a time in the future is shown in full"
    stored = json.loads(kubectl("get", "bkworker", "shown-worker-0", "-n", namespace, "-o", "json"))
    assert stored["spec"]["allocation"]["another"] == "version's"
    kubectl("delete", "bkpool,bkworker", "--all", "-n", namespace)
