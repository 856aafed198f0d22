"""Names and defaults that users' scripts depend on: the API group, labels, ports, and the names of workers.

A worker is called `<pool>-worker-<slot>`. A worker is created only if it does not exist, so the uniqueness of names
in the store keeps a pool within its maximum (rule 3, docs/rules.md#r3).
"""

from __future__ import annotations

import re
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

from bkpool.core.errors import InvalidInput

GROUP = "buildkit.smrt-devops.net"
API_VERSION = f"{GROUP}/v1alpha1"

LABEL_POOL = f"{GROUP}/pool"
LABEL_PURPOSE = f"{GROUP}/purpose"
LABEL_WORKER = f"{GROUP}/worker"
LABEL_REQUEST = f"{GROUP}/request"
"""Hash of (identity, jobId) on a leased worker, by which a repeated request finds its lease."""
LABEL_LEASED = f"{GROUP}/leased"
"""`true` on the pod of a leased worker. A PodDisruptionBudget selects it."""
LABEL_MANAGED = "app.kubernetes.io/managed-by"
MANAGER = "bkpool"

PURPOSE_WORKER, PURPOSE_GATEWAY = "worker", "gateway"

ANNOTATION_WORKER_UID = f"{GROUP}/worker-uid"
ANNOTATION_AUTHORITY = f"{GROUP}/authority"
"""On a worker's pod: which CA has signed its certificate. Pods from before each pool had a CA do not have it."""
ANNOTATION_SPEC_DIGEST = f"{GROUP}/spec-digest"
"""On a worker's pod: the digest of what of the pool's spec it was made with (`workers.spec_digest`)."""
ANNOTATION_CACHE_OWNER = f"{GROUP}/cache-owner"
ANNOTATION_HISTORY = f"{GROUP}/history"
"""On a worker's pod until its history may be read: `HISTORY_OLD`."""
HISTORY_OLD = "of-callers-before"
ANNOTATION_ISOLATION = f"{GROUP}/isolation"
"""On a pool: how strictly its pods are isolated from their node (`rootless`, `baseline`, `userns`, `privileged`)."""
ANNOTATION_SOURCE = f"{GROUP}/source"
"""On a pool: `file`, if it came from a file of `up -f` and follows these files (`core.removal`)."""
ANNOTATION_REMOVING = f"{GROUP}/removing"
"""On a pool that is being removed: since when (RFC 3339)."""
ANNOTATION_REMOVE_CACHES = f"{GROUP}/remove-caches"
"""On such a pool: `at-once`, if its caches are not kept for a day."""

FINALIZER = f"{GROUP}/lease"
"""On a worker exactly while it is leased, so that a namespace can be deleted while no appliance runs."""

API_PORT = 8082
GATEWAY_PORT = 1235
WORKER_PORT = 1234
METRICS_PORT = 9090
DEV_ISSUER_PORT = 8888

SYSTEM_NAMESPACE = "buildkit-system"
"""The namespace of the appliance itself in a cluster."""
DEFAULT_NAMESPACE = "default"
AUDIENCE = "buildkit-controller"
"""The audience of callers' tokens where nobody sets another one: that of the Go controller, so that existing
workflows keep working."""
DEFAULT_POOL = "default"
END_WHEN_UNUSED = "endWhenUnused"
"""Metadata of a lease whose only user is the command that made it: with the value "true" it ends soon after its last
connection. In the metadata, because a service of an earlier version keeps it there and ignores it."""
DEFAULT_WAIT = timedelta(minutes=5)
"""How long an allocate request waits that names no wait, unless the appliance allows less."""

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""The names of this machine for itself. Only programs on this machine can connect to them."""

DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""RFC 1123, as Kubernetes wants names."""
LONGEST_NAME = 63
"""Characters of a DNS label, and of the value of a label in Kubernetes."""
_DNS_LABEL = re.compile(DNS_LABEL)
_WORKER = re.compile(r"(?P<pool>.+)-worker-(?P<slot>0|[1-9][0-9]{0,4})")


class Key(NamedTuple):
    """The namespace and name of an object."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Slot(NamedTuple):
    """A numbered place for a worker in a pool. It outlives its workers, and its cache has its name."""

    namespace: str
    pool: str
    number: int

    @property
    def worker(self) -> Key:
        """The name of the worker in this slot, whether it exists or not."""
        return Key(self.namespace, f"{self.pool}-worker-{self.number}")


@lru_cache(maxsize=16_384)  # asked several times for each change of a worker
def slot_of(worker: Key) -> Slot:
    """The slot of a worker, from its name.

    Raises:
        InvalidInput: The name is not that of a worker in a slot.
    """
    match = _WORKER.fullmatch(worker.name)
    if match is None:
        raise InvalidInput(
            f"metadata.name: {worker.name!r} is not the name of a worker",
            hint="A worker is called <pool>-worker-<slot>. Only bkpool creates workers.",
            field="metadata.name",
        )
    return Slot(worker.namespace, match["pool"], int(match["slot"]))


def longest_pool_name(most_workers: int) -> int:
    """How many characters the name of a pool may have, so that the names of all its workers can be names.

    Args:
        most_workers: The pool's `scaling.max`.
    """
    return LONGEST_NAME - len(f"-worker-{most_workers - 1}")


def check_name(value: str, *, field: str) -> str:
    """Returns the value if it is a DNS label (RFC 1123), as Kubernetes wants names.

    Raises:
        InvalidInput: It is not.
    """
    if len(value) > LONGEST_NAME:
        raise InvalidInput(
            f"{field}: {value[:20]!r}... has {len(value)} characters, and a name has at most {LONGEST_NAME}",
            hint="Give a shorter name.",
            field=field,
        )
    if _DNS_LABEL.fullmatch(value) is None:
        raise InvalidInput(
            f"{field}: {value!r} is not a valid name",
            hint="Use at most 63 lower-case letters, digits and '-', beginning and ending with a letter or digit.",
            field=field,
        )
    return value
