import pytest

from bkpool.core.ignored import CLUSTER_IGNORES, KIND_IGNORES, PROCESS_IGNORES, ignored_fields
from bkpool.core.objects import PoolSpec

PODS = {
    "buildkitImage": "moby/buildkit:rootless",
    "gatewayImage": "registry.example.com/bkpool:1",
    "resources": {"buildkit": {"limits": {"cpu": 2, "memory": "4Gi"}}},
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


@pytest.mark.parametrize(
    ("unread", "told"),
    [
        (CLUSTER_IGNORES, []),
        (KIND_IGNORES, AT_THE_GATEWAY),
        (PROCESS_IGNORES, sorted(["buildkitImage", "resources.buildkit.limits", *AT_THE_GATEWAY])),
    ],
)
def test_what_a_backend_does_not_read_is_named_to_the_leaf(unread, told):
    assert ignored_fields(PoolSpec.model_validate(PODS), unread) == told


def test_what_nobody_reads_is_named_on_every_backend():
    spec = PoolSpec.model_validate(
        {
            "tls": {"enabled": True},
            "scaling": {"mode": "auto"},
            "resources": {"sidecar": {}},
            "cache": {"backends": [{"type": "local", "local": {"iops": 3}}, {"type": "s3", "s3": {"bucket": "b"}}]},
        }
    )
    assert ignored_fields(spec, CLUSTER_IGNORES) == [
        "cache.backends[0].local.iops",
        "cache.backends[1]",
        "cache.backends[1].s3",
        "resources.sidecar",
        "scaling.mode",
        "tls",
    ]


def test_defaults_are_nobodys_wish():
    written = PoolSpec.model_validate(PoolSpec().model_dump(mode="json", by_alias=True, exclude_none=True))
    assert ignored_fields(written, PROCESS_IGNORES) == []


def test_the_go_controllers_own_gateway_cannot_run_here():
    spec = PoolSpec(gateway_image="ghcr.io/someone/buildkit-controller/gateway:latest")
    assert ignored_fields(spec, CLUSTER_IGNORES) == ["gatewayImage"]
