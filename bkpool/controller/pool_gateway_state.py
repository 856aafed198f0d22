"""What the controller remembers of one pool's gateway, and what it reads from the objects of the cluster.

Nothing here talks to the cluster.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass, field

from bkpool.core.names import LABEL_PURPOSE, PURPOSE_GATEWAY
from bkpool.kube import Doc


@dataclass(slots=True)
class GatewayState:
    """What is known of one pool's gateway."""

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    rights: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the rights of its gateways are applied."""
    version: tuple[str, int | None] | None = None
    """The pool's uid and generation that were looked at last."""
    applied: dict[str, str] = field(default_factory=dict)
    """Digests of the documents that were applied, by path."""
    made: dict[str, str] = field(default_factory=dict)
    """Digests of what the cluster made of them, by path."""
    objects: dict[str, Doc] = field(default_factory=dict)
    """The newest known object of each watched kind."""
    bundle: dict[str, bytes] | None = None
    """The certificates in the Secret; None: they must be read."""
    node: str | None = None
    """The address of a node that runs the gateway, for a NodePort."""


def trouble_of(deployment: Doc | None) -> str:
    """Why the gateway's pods do not start, where the Deployment's status says so; else empty."""
    conditions = (deployment or {}).get("status", {}).get("conditions", ())
    bad = {("ReplicaFailure", "True"), ("Progressing", "False")}
    found = next((one for one in conditions if (one["type"], one["status"]) in bad), None)
    if deployment is None or found is None:
        return ""
    look = f"kubectl -n {deployment['metadata']['namespace']} describe pods -l {LABEL_PURPOSE}={PURPOSE_GATEWAY}"
    return f"gateway: {found.get('message') or found.get('reason')} See: {look}"


def content_digest(doc: Doc) -> str:
    """A digest of the parts of an object that only bkpool should change."""
    return digest_of({part: doc.get(part) for part in ("spec", "data")})


def digest_of(doc: Doc) -> str:
    """A digest of a whole document."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
