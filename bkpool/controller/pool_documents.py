"""What all documents of a pool have in common: their owner, their labels, and where they are in the API.

Pure: no document is complete here, and nothing asks the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bkpool.core.names import API_VERSION, LABEL_MANAGED, LABEL_POOL, LABEL_PURPOSE, MANAGER, PURPOSE_GATEWAY
from bkpool.core.pool import Pool
from bkpool.kube import Doc, paths

_PLURALS = {
    "ServiceAccount": "serviceaccounts",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Service": "services",
    "Secret": "secrets",
    "Deployment": "deployments",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "NetworkPolicy": "networkpolicies",
}
LABELS = {LABEL_MANAGED: MANAGER, "app.kubernetes.io/name": "buildkit"}
"""Of everything that is made for a pool."""


def labels_of(pool: Pool, purpose: str) -> Doc:
    """What selects the pods of a pool that have this purpose."""
    return {LABEL_POOL: pool.key.name, LABEL_PURPOSE: purpose}


def gateway_labels(pool: Pool) -> Doc:
    """What selects the pods of a pool's gateway."""
    return labels_of(pool, PURPOSE_GATEWAY)


def gateway_name(pool: Pool) -> str:
    """The name of all objects of the pool's gateway except its Service."""
    return f"{pool.key.name}-gateway"


def pool_document(
    pool: Pool, api_version: str, kind: str, name: str, *, annotations: Mapping[str, str] | None = None, **rest: Any
) -> Doc:
    """A document that the pool owns, so that it is deleted with the pool."""
    owner = {"apiVersion": API_VERSION, "kind": Pool.KIND, "name": pool.key.name, "uid": pool.uid, "controller": True}
    metadata: Doc = {
        "name": name,
        "namespace": pool.key.namespace,
        "labels": {**LABELS, **gateway_labels(pool)},
        "ownerReferences": [owner],
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **rest}


def path_of(doc: Doc) -> str:
    """The API path of a document that is made here."""
    plural, metadata = _PLURALS[doc["kind"]], doc["metadata"]
    if doc["apiVersion"] == "v1":
        return paths.core(plural, metadata["namespace"], metadata["name"])
    return paths.group(doc["apiVersion"], plural, metadata["namespace"], metadata["name"])


def is_of_a_pool(existing: Doc) -> bool:
    """Whether an existing object was made for a pool, by bkpool or by the older Go controller."""
    metadata = existing["metadata"]
    owners = [(owner["apiVersion"], owner["kind"]) for owner in metadata.get("ownerReferences", ())]
    return metadata.get("labels", {}).get(LABEL_MANAGED) == MANAGER or (API_VERSION, Pool.KIND) in owners
