"""A real API server accepts every object in README, docs and examples, and the manifests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from bkpool.core.documents import read_documents
from bkpool.core.ignored import ignored_fields, ignored_in_config
from bkpool.install import crds
from bkpool.install.manifests import Install, render
from bkpool.workers.ignored_fields import IGNORED_IN_CLUSTER
from harness import eventually

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def shown():
    """Yields every YAML text with its file and line."""
    for file in sorted((ROOT / "examples").rglob("*.y*ml")):
        yield str(file.relative_to(ROOT)), file.read_text()
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for number, text in enumerate(_FENCE.findall(file.read_text()), 1):
            yield f"{file.relative_to(ROOT)}#{number}", text


def objects():
    for place, text in shown():
        for document in yaml.safe_load_all(text):
            if isinstance(document, dict) and {"apiVersion", "kind", "metadata"} <= document.keys():
                yield pytest.param(document, id=f"{place}:{document['kind']}/{document['metadata'].get('name')}")


@pytest.mark.parametrize("document", list(objects()))
async def test_every_example_is_valid(document, api, kubectl):
    await crds.install(api)
    if "namespace" in document["metadata"]:
        document["metadata"]["namespace"] = "default"  # the namespace of the example may not exist
    kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(document))


def test_no_field_of_an_example_is_ignored():
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        documents = read_documents(file.read_text(), source=file.name)
        for pool in documents.pools:
            assert ignored_fields(pool.spec, IGNORED_IN_CLUSTER) == [], file.name
        for config in documents.configs:
            assert ignored_in_config(config.spec) == [], file.name
            assert config.spec.rejection_reason is None, file.name


def test_the_manifests_are_applied_as_they_are_printed(kubectl, namespace):
    text = render(Install(namespace=namespace, pool_namespaces=(namespace,), image="registry.example.com/bkpool:1"))
    kubectl("apply", "-f", "-", stdin=text)
    kubectl("diff", "-f", "-", stdin=text)  # fails if there is a difference
    refused = kubectl("auth", "can-i", "get", "secrets", "-n", "kube-system", *_as(namespace), check=False)
    assert refused.strip() == "no"
    for right in (
        ("create", "buildkitworkers"),
        ("create", "pods"),
        ("patch", "deployments.apps"),
        ("create", "tokenreviews.authentication.k8s.io"),
        ("update", "buildkitoidcconfigs.buildkit.smrt-devops.net", "--subresource=status"),
    ):
        asked = ("auth", "can-i", *right, "-n", namespace, *_as(namespace))
        # The API server learns of new rights a moment later.
        eventually(lambda asked=asked: kubectl(*asked, check=False).strip() == "yes", str(right))
    kubectl("delete", "clusterrolebinding,clusterrole", f"bkpool-tokens-{namespace}")
    kubectl("delete", "prioritylevelconfiguration", f"bkpool-{namespace}")
    for name in ("", ".leader", ".events"):
        kubectl("delete", "flowschema", f"bkpool-{namespace}{name}")


def _as(namespace):
    return ("--as", f"system:serviceaccount:{namespace}:buildkit-controller")
