import pytest

from bkpool.core.auth import OIDCConfigSpec
from bkpool.core.ignored import (
    IgnoredFields,
    ignored_fields,
    ignored_in_config,
)
from bkpool.core.pool import Pool, PoolSpec
from bkpool.core.resource import Metadata
from bkpool.workers.config import not_taken
from bkpool.workers.ignored_fields import (
    IGNORED_BY_PROCESSES,
    IGNORED_IN_CLUSTER,
    IGNORED_IN_HOST_NETWORK,
    IGNORED_WITH_HOST_GATEWAY,
)

PODS = {
    "buildkitImage": "moby/buildkit:rootless",
    "gatewayImage": "registry.example.com/bkpool:1",
    "resources": {"buildkit": {"limits": {"cpu": 2, "memory": "4Gi", "example.com/gpu": 1}, "requests": {"pids": 5}}},
    "networking": {"external": {"hostname": "build.example.com"}, "allowedCIDRs": ["10.0.0.0/8"]},
    "gateway": {"tokenTTL": "2h", "replicas": 3, "port": 443, "resources": {"cpu": "500m"}},
    "cache": {"backends": [{"type": "local", "local": {"size": "5Gi"}}]},
}
AT_THE_GATEWAY = [
    "gateway.port",
    "gateway.replicas",
    "gateway.resources.cpu",
    "gatewayImage",
    "networking.allowedCIDRs",
    "networking.external.hostname",
]

NO_LIMITS_OF_PROCESSES = ["resources.buildkit.limits.example.com/gpu", "resources.buildkit.requests.pids"]


@pytest.mark.parametrize(
    ("ignored_here", "expected"),
    [
        (IGNORED_IN_CLUSTER, []),
        (IGNORED_WITH_HOST_GATEWAY, AT_THE_GATEWAY),
        (IGNORED_BY_PROCESSES, sorted(["buildkitImage", *NO_LIMITS_OF_PROCESSES, *AT_THE_GATEWAY])),
    ],
)
def test_fields_that_a_runtime_does_not_read_are_named_with_their_full_path(ignored_here, expected):
    assert ignored_fields(PoolSpec.model_validate(PODS), ignored_here) == expected


def test_unknown_fields_are_named_for_every_runtime():
    spec = PoolSpec.model_validate(
        {
            "tls": {"enabled": True},
            "scaling": {"mode": "auto"},
            "resources": {"sidecar": {}},
            "cache": {"backends": [{"type": "local", "local": {"iops": 3}}, {"type": "s3", "s3": {"bucket": "b"}}]},
        }
    )
    assert ignored_fields(spec, IGNORED_IN_CLUSTER) == [
        "cache.backends[0].local.iops",
        "cache.backends[1]",
        "cache.backends[1].s3",
        "resources.sidecar",
        "scaling.mode",
        "tls",
    ]


def test_defaults_are_not_named():
    written = PoolSpec.model_validate(PoolSpec().model_dump(mode="json", by_alias=True, exclude_none=True))
    assert ignored_fields(written, IGNORED_BY_PROCESSES) == []


def test_the_gateway_image_of_the_go_controller_is_named():
    spec = PoolSpec(gateway_image="ghcr.io/someone/buildkit-controller/gateway:latest")
    assert ignored_fields(spec, IGNORED_IN_CLUSTER) == ["gatewayImage"]


METHODS = {
    "auth": {
        "methods": [
            "mtls",
            {"type": "mtls", "mtls": {"required": False, "clientCASecret": "c"}, "token": {"secretRef": "s"}},
            {"type": "token", "token": {"secretRef": "s"}},
            {"type": "token", "token": {"file": "/f"}},
            {
                "type": "oidc",
                "oidc": {"issuer": "https://i.example.com", "audience": "a", "clientSecretRef": {"name": "n"}},
            },
        ],
        "rbac": {"enabled": True, "rules": [{"users": ["*"]}]},
        "limits": {"identity": {"leases": 1}},
    },
}
NOWHERE = [
    "auth.methods[1].mtls.clientCASecret",
    "auth.methods[1].mtls.required",
    "auth.methods[1].token",
    "auth.methods[4].oidc.clientSecretRef",
]


@pytest.mark.parametrize(
    ("ignored_here", "expected"),
    [
        (IGNORED_IN_CLUSTER, ["auth.methods[3].token.file"]),
        (IGNORED_WITH_HOST_GATEWAY, ["auth.methods[3].token.file"]),
        (IGNORED_BY_PROCESSES, ["auth.methods[1].token.secretRef", "auth.methods[2].token.secretRef"]),
    ],
)
def test_sources_of_tokens_that_a_runtime_does_not_read_are_named(ignored_here, expected):
    assert ignored_fields(PoolSpec.model_validate(METHODS), ignored_here) == sorted([*NOWHERE, *expected])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"untrusted": True}, ["networking.egress.policy"]),
        ({"untrusted": True, "networking": {"egress": {"policy": "public"}}}, ["networking.egress.policy"]),
        ({"networking": {"egress": {"allowedCIDRs": ["10.0.0.0/8"]}}}, ["networking.egress.allowedCIDRs"]),
        ({}, []),
    ],
)
def test_egress_is_named_for_processes_in_the_network_of_the_host(spec, expected):
    parsed = PoolSpec.model_validate(spec)
    assert ignored_fields(parsed, IGNORED_IN_HOST_NETWORK) == expected
    for ignored_here in (IGNORED_BY_PROCESSES, IGNORED_WITH_HOST_GATEWAY, IGNORED_IN_CLUSTER):
        assert ignored_fields(parsed, ignored_here) == []


def test_ports_of_the_host_are_named_where_workers_are_pods():
    parsed = PoolSpec.model_validate({"networking": {"hostPorts": [5000]}})
    assert ignored_fields(parsed, IGNORED_IN_CLUSTER) == ["networking.hostPorts"]
    assert ignored_fields(parsed, IGNORED_IN_HOST_NETWORK) == ["networking.hostPorts"]
    assert ignored_fields(parsed, IGNORED_BY_PROCESSES) == []


def test_unknown_fields_of_an_issuer_are_named():
    given = {"issuer": "https://i.example.com", "audience": "a", "clientID": "c", "pools": ["*"], "enabled": False}
    assert ignored_in_config(OIDCConfigSpec.model_validate(given)) == []
    secret = {"clientSecretRef": {"name": "n", "key": "k"}, "claimsMapping": {"user": "sub", "email": "mail"}}
    assert ignored_in_config(OIDCConfigSpec.model_validate({**given, **secret})) == [
        "claimsMapping.email",
        "clientSecretRef",
    ]


def test_the_result_is_remembered_until_the_spec_changes():
    remembered = IgnoredFields(IGNORED_BY_PROCESSES)
    before = Pool(metadata=Metadata(name="p"), spec=PoolSpec.model_validate({"buildkitImage": "x"}))
    assert remembered.of(before) == ["buildkitImage"]
    assert remembered.of(before.but(status=before.status.but(workers=1))) is remembered.of(before)
    assert remembered.of(before.but(spec=PoolSpec())) == []


def test_the_result_is_remembered_when_the_pool_is_read_again():
    """The store reads a pool anew after each change of its status."""
    remembered = IgnoredFields(IGNORED_BY_PROCESSES)

    def read(generation, uid="uid-1", **spec):
        return Pool(metadata=Metadata(name="p", uid=uid, generation=generation), spec=PoolSpec.model_validate(spec))

    found = remembered.of(read(1, buildkitImage="x"))
    assert remembered.of(read(1, buildkitImage="x")) is found == ["buildkitImage"]
    assert remembered.of(read(2)) == []
    assert remembered.of(read(2, "uid-2", buildkitImage="x")) == ["buildkitImage"]


def test_parts_of_the_pools_own_configuration_that_are_not_taken_are_named_beside_the_fields():
    remembered = IgnoredFields(IGNORED_BY_PROCESSES, not_taken)
    spec = PoolSpec(buildkit_config='root = "/elsewhere"\n', buildkit_image="moby/buildkit")
    pool = Pool(metadata=Metadata(name="p"), spec=spec)
    assert remembered.of(pool) == ["buildkitConfig.root", "buildkitImage"]
