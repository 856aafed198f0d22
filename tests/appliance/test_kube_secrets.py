"""The Secrets of an appliance in its cluster: made once, then read, and never replaced when they are damaged."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import pytest

from bkpool.appliance.kube_secrets import API_CA, load_or_create_api_authority
from bkpool.core.errors import Forbidden, HostFault, NotFound
from bkpool.pki.bundle import ClusterSecrets

NOW = datetime.now(UTC)
OTHERS = ClusterSecrets.create(NOW)
NAMESPACE = "system"


class Cluster:
    """A KubeApi with Secrets."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict] = {}
        self.allowed = True

    async def get(self, path: str) -> dict:
        if not self.allowed:
            raise Forbidden("Kubernetes: secrets is forbidden")
        if path not in self.secrets:
            raise NotFound(path)
        return self.secrets[path]

    async def create(self, path: str, body: dict) -> dict:
        self.secrets[f"{path}/{body['metadata']['name']}"] = body
        return body


async def test_the_ca_of_the_api_is_made_once():
    cluster = Cluster()
    first = await load_or_create_api_authority(cluster, NAMESPACE, OTHERS, NOW)
    again = await load_or_create_api_authority(cluster, NAMESPACE, OTHERS, NOW)
    assert (first.cert_pem, first.key_pem) == (again.cert_pem, again.key_pem)
    (secret,) = cluster.secrets.values()
    assert secret["metadata"]["name"] == API_CA
    assert base64.b64decode(secret["data"]["ca.crt"]) == first.cert_pem, "what callers trust"


async def test_a_damaged_ca_of_the_api_is_an_error_and_is_not_replaced():
    cluster = Cluster()
    await load_or_create_api_authority(cluster, NAMESPACE, OTHERS, NOW)
    (secret,) = cluster.secrets.values()
    secret["data"]["ca.key"] = "bm9uc2Vuc2U="
    with pytest.raises(HostFault, match=API_CA):
        await load_or_create_api_authority(cluster, NAMESPACE, OTHERS, NOW)
    assert secret["data"]["ca.key"] == "bm9uc2Vuc2U="


async def test_manifests_of_before_are_named_when_the_right_to_read_it_is_missing():
    cluster = Cluster()
    cluster.allowed = False
    with pytest.raises(Forbidden) as refused:
        await load_or_create_api_authority(cluster, NAMESPACE, OTHERS, NOW)
    assert "bkpool manifests" in refused.value.hint
