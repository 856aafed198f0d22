"""The names that other people's scripts depend on: group, labels, ports, and how a slot is a name.

A worker is called `<pool>-worker-<slot>`; creating one is create-if-absent, so the store's own uniqueness keeps a
pool at its maximum (DESIGN rule 3).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from bkpool.core.errors import InvalidInput

GROUP = "buildkit.smrt-devops.net"
API_VERSION = f"{GROUP}/v1alpha1"

LABEL_POOL = f"{GROUP}/pool"
LABEL_PURPOSE = f"{GROUP}/purpose"
LABEL_WORKER = f"{GROUP}/worker"
LABEL_REQUEST = f"{GROUP}/request"
"""Hash of (identity, jobId) on a leased worker: how a repeated request finds its lease."""
LABEL_LEASED = f"{GROUP}/leased"
"""`true` on the pod of a leased worker: what a PodDisruptionBudget selects."""
LABEL_MANAGED = "app.kubernetes.io/managed-by"
MANAGER = "bkpool"

PURPOSE_WORKER, PURPOSE_GATEWAY = "worker", "gateway"

ANNOTATION_WORKER_UID = f"{GROUP}/worker-uid"
ANNOTATION_CACHE_OWNER = f"{GROUP}/cache-owner"
ANNOTATION_ISOLATION = f"{GROUP}/isolation"
"""On a pool: how far its pods are kept from their node (`rootless`, `baseline`, `privileged`)."""

FINALIZER = f"{GROUP}/lease"
"""On a worker while it is leased, and only then, so that a namespace can be deleted while no appliance runs."""

API_PORT = 8082
GATEWAY_PORT = 1235
WORKER_PORT = 1234
METRICS_PORT = 9090
DEV_ISSUER_PORT = 8888

SYSTEM_NAMESPACE = "buildkit-system"
"""Where the appliance itself is, in a cluster."""
DEFAULT_NAMESPACE = "default"
AUDIENCE = "buildkit-controller"
"""For whom callers' tokens are made, where nothing else is said: the Go controller's, so that workflows stay."""
DEFAULT_POOL = "default"

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""How this machine calls itself: what is heard there, nobody else hears."""

DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""RFC 1123, as Kubernetes wants names."""
_DNS_LABEL = re.compile(DNS_LABEL)
_WORKER = re.compile(r"(?P<pool>.+)-worker-(?P<slot>0|[1-9][0-9]{0,4})")


class Key(NamedTuple):
    """Where an object is: its namespace and name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Slot(NamedTuple):
    """One place in a pool; it outlives the workers in it, and its cache has its name."""

    namespace: str
    pool: str
    number: int

    @property
    def worker(self) -> Key:
        """The worker that stands, or would stand, in this slot."""
        return Key(self.namespace, f"{self.pool}-worker-{self.number}")


@lru_cache(maxsize=16_384)  # asked for every worker in every decision
def slot_of(worker: Key) -> Slot:
    """The slot of a worker, from its name.

    Raises:
        InvalidInput: The name is not that of a slot.
    """
    match = _WORKER.fullmatch(worker.name)
    if match is None:
        raise InvalidInput(
            f"metadata.name: {worker.name!r} is not the name of a slot",
            hint="A worker is called <pool>-worker-<slot>; only bkpool makes them.",
            field="metadata.name",
        )
    return Slot(worker.namespace, match["pool"], int(match["slot"]))


def check_name(value: str, *, field: str) -> str:
    """Returns the value if it is a DNS label (RFC 1123), as Kubernetes wants names.

    Raises:
        InvalidInput: It is not.
    """
    if _DNS_LABEL.fullmatch(value) is None:
        raise InvalidInput(
            f"{field}: {value[:80]!r} is not a valid name",
            hint="Use at most 63 lower-case letters, digits and '-', beginning and ending with a letter or digit.",
            field=field,
        )
    return value
