"""Fixtures of the tests that need a cluster. The session shares one cluster. Each test has another namespace."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from kind.objects import custom_resources, store  # noqa: F401 - fixtures

from bkpool.kube import ClusterAccess, KubeApi
from kind_cluster import E2eCluster, Kubectl


@pytest.fixture(scope="session")
def zipapp() -> Path:
    """dist/bkpool.pyz, built from this checkout."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, root / "scripts" / "build-zipapp"], check=True, cwd=root)
    return root / "dist" / "bkpool.pyz"


@pytest.fixture(scope="session")
def kubeconfig(cluster: E2eCluster) -> Path:
    return cluster.kubeconfig


@pytest.fixture
async def api(cluster: E2eCluster) -> AsyncIterator[KubeApi]:
    api = await KubeApi.connect(ClusterAccess(kubeconfig=cluster.kubeconfig))
    yield api
    await api.close()


@pytest.fixture
def namespace(kubectl: Kubectl) -> Iterator[str]:
    """Makes a new namespace. The test does not wait for its deletion."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    try:
        # Without it no pod can be created.
        kubectl("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=120s")
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")
