"""The documents that make a worker in a cluster: its pod, Secret, configuration and volume claim.

Pure functions of what is wanted. Nothing here asks a cluster, or decides when a document is written.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.core.names import (
    ANNOTATION_CACHE_OWNER,
    ANNOTATION_ISOLATION,
    ANNOTATION_WORKER_UID,
    API_VERSION,
    LABEL_LEASED,
    LABEL_MANAGED,
    LABEL_POOL,
    LABEL_PURPOSE,
    LABEL_WORKER,
    MANAGER,
    PURPOSE_WORKER,
    WORKER_PORT,
    Key,
    Slot,
)
from bkpool.core.pool import LocalCache, Pool
from bkpool.kube import Doc
from bkpool.pki.authority import Leaf
from bkpool.toolchain.table import Tool, release_of

_IMAGE = f"docker.io/moby/buildkit:v{release_of(Tool.BUILDKITD).version}"
ROOTLESS_IMAGE, PRIVILEGED_IMAGE = f"{_IMAGE}-rootless", _IMAGE

CONTAINER = "buildkitd"
CACHE_VOLUME = "cache"
SELECTOR = f"{LABEL_MANAGED}={MANAGER},{LABEL_PURPOSE}={PURPOSE_WORKER}"
"""What is a worker's: the label selector of everything that is watched."""
ANNOTATION_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"

_USER = 1000  # of the rootless image
_TLS, _CONFIG = "/etc/bkpool/tls", "/etc/bkpool/config"
_LAST_MINUTE = 30  # seconds beyond drainTimeout: for the hook to see the end, and buildkitd to end itself

# While a node is drained, or the pod deleted by hand, a build in it may go on: buildkitd itself dies at once on
# SIGTERM. Established (01) connections to port 1234 (04D2), as proc(5) tells them of a network namespace. Shell
# built-ins but for `sleep`: an image without it ends the wait, and does not spin.
_WAIT_FOR_BUILDS = f"""
while :; do
  open=
  for file in /proc/net/tcp /proc/net/tcp6; do
    [ -r "$file" ] || continue
    while read -r _ local _ state _; do
      case "$local $state" in *:{WORKER_PORT:04X}" 01") open=1 ;; esac
    done <"$file"
  done
  [ "$open" ] || exit 0
  sleep 1 || exit 0
done
"""


class Isolation(StrEnum):
    """How far a pool's pods are kept from their node."""

    ROOTLESS = "rootless"
    BASELINE = "baseline"
    PRIVILEGED = "privileged"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pod that is to be."""

    slot: Slot
    worker_uid: str
    owner: str | None
    """Digest of whom its cache belongs to; None: nobody yet."""
    pool: Pool
    image: str
    """Where the pool names none."""
    host_port: int | None = None

    def at(self, host_port: int) -> Wanted:
        """The same, reached by a port of its node."""
        return replace(self, host_port=host_port)


def isolation(pool: Pool) -> Isolation:
    """What the pool's annotation asks for.

    Raises:
        WorkerFailed: It asks for something else, or for `privileged` in an untrusted pool: that would be the node.
    """
    field = f"metadata.annotations[{ANNOTATION_ISOLATION}]"
    given = pool.metadata.annotations.get(ANNOTATION_ISOLATION, Isolation.ROOTLESS)
    try:
        asked = Isolation(given)
    except ValueError:
        raise WorkerFailed(
            f"{field}: {given[:40]!r} is no isolation", hint=f"Use one of: {', '.join(Isolation)}.", field=field
        ) from None
    if pool.spec.untrusted and asked is Isolation.PRIVILEGED:
        raise WorkerFailed(
            f"{field}: an untrusted pool cannot be privileged, because a build could take over its node",
            hint="Remove the annotation, or spec.untrusted.",
            field=field,
        )
    return asked


def pod(wanted: Wanted) -> Doc:
    """The pod of a worker.

    Raises:
        WorkerFailed: The pool asks for what cannot be; the message names the field.
    """
    pool, slot = wanted.pool, wanted.slot
    kept = isolation(pool)
    rootless = kept is not Isolation.PRIVILEGED
    local = pool.spec.local_cache
    annotations = {
        ANNOTATION_WORKER_UID: wanted.worker_uid,
        ANNOTATION_EVICT: "false" if wanted.owner else "true",
        **({ANNOTATION_CACHE_OWNER: wanted.owner} if wanted.owner and local is None else {}),
    }
    leased = {LABEL_LEASED: "true"} if wanted.owner else {}
    volumes = [
        {"name": "tls", "secret": {"secretName": slot.worker.name, "defaultMode": 0o440}},
        {"name": "config", "configMap": {"name": config_name(slot)}},
        {"name": CACHE_VOLUME, **_cache(slot, local)},
    ]
    spec: Doc = {
        "restartPolicy": "Never",  # the controller starts it again, and counts
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(pool.spec.gateway.drain_timeout.total_seconds()) + _LAST_MINUTE,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "containers": [_container(wanted, kept)],
        "volumes": volumes,
    }
    if rootless:
        spec["securityContext"] = {"fsGroup": _USER, "fsGroupChangePolicy": "OnRootMismatch"}
    metadata = _metadata(slot, slot.worker.name, pool, LABEL_WORKER) | {"annotations": annotations}
    metadata["labels"] |= leased
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def secret(slot: Slot, pool: Pool, leaf: Leaf, ca_pem: bytes) -> Doc:
    """The worker's identity, and whom it believes."""
    files = {"ca.crt": ca_pem, "tls.crt": leaf.cert_pem, "tls.key": leaf.key_pem or b""}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": _metadata(slot, slot.worker.name, pool, LABEL_WORKER),
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def config(slot: Slot, pool: Pool, toml: str) -> Doc:
    """The configuration of all workers of a pool."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(slot, config_name(slot), pool),
        "data": {"buildkitd.toml": toml},
    }


def config_name(slot: Slot) -> str:
    """The name of the ConfigMap of the slot's pool."""
    return f"{slot.pool}-buildkitd"


def volume(slot: Slot, pool: Pool, local: LocalCache, owner: str | None) -> Doc:
    """The claim of a slot's cache, which outlives its workers; it says whose the cache is."""
    metadata = _metadata(slot, slot.worker.name, pool, LABEL_WORKER)
    if owner:
        metadata["annotations"] = {ANNOTATION_CACHE_OWNER: owner}
    spec: Doc = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": local.size}}}
    if local.storage_class is not None:
        spec["storageClassName"] = local.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def protection(*, held: bool) -> Doc:
    """The metadata by which an autoscaler and a PodDisruptionBudget know whether they may take the pod away."""
    return {
        "labels": {LABEL_LEASED: "true" if held else None},
        "annotations": {ANNOTATION_EVICT: "false" if held else "true"},
    }


_FIELDS = (
    ("containers[0].resources", "spec.resources.buildkit"),
    ("containers[0].image", "spec.buildkitImage"),
    ("terminationGracePeriodSeconds", "spec.gateway.drainTimeout"),
    ("spec.resources", "spec.cache.backends[].local.size"),
    ("storageClassName", "spec.cache.backends[].local.storageClass"),
    ("data", "spec.buildkitConfig"),
    ("spec.egress", "spec.networking.egress.allowedCIDRs"),
)
"""What is in our documents, and the pool's field that it came from; the first that fits."""


def refusal(error: BkpoolError, what: str) -> WorkerFailed:
    """What it means that the API server does not admit a document of ours.

    Args:
        error: InvalidInput or Forbidden.
        what: The document, for the message.
    """
    field = next((ours for theirs, ours in _FIELDS if theirs in error.message), None)
    named = f"{field}: " if field else ""
    hint = f"Correct {field} of the pool." if field else error.hint
    if "PodSecurity" in error.message:
        hint = f"Set the pool's annotation {ANNOTATION_ISOLATION} to one that the namespace admits, or label it anew."
    return WorkerFailed(
        f"{named}the {what} is not admitted: {error.message.removeprefix('Kubernetes: ')}", hint=hint, field=field
    )


def _container(wanted: Wanted, kept: Isolation) -> Doc:
    spec = wanted.pool.spec
    rootless = kept is not Isolation.PRIVILEGED
    root = "/home/user/.local/share/buildkit" if rootless else "/var/lib/buildkit"  # as the images have them
    socket = "unix:///run/user/1000/buildkit/buildkitd.sock" if rootless else "unix:///run/buildkit/buildkitd.sock"
    port: Doc = {"name": "buildkit", "containerPort": WORKER_PORT}
    if wanted.host_port is not None:
        port["hostPort"] = wanted.host_port
    container: Doc = {
        "name": CONTAINER,
        "image": spec.buildkit_image or wanted.image,
        "imagePullPolicy": "IfNotPresent",
        "args": list(_arguments(socket, root, rootless=rootless)),
        "env": [{"name": "BUILDKIT_HOST", "value": socket}],  # so that `kubectl exec … buildctl` finds it
        "ports": [port],
        "resources": spec.resources.buildkit.model_dump(mode="json", by_alias=True),
        "securityContext": _security(kept),
        "lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", _WAIT_FOR_BUILDS]}}},
        "volumeMounts": [
            {"name": "tls", "mountPath": _TLS, "readOnly": True},
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": CACHE_VOLUME, "mountPath": root},
        ],
    }
    if not rootless:
        container["command"] = ["buildkitd"]  # the rootless image's own entrypoint would wrap it
    return container


def _arguments(socket: str, root: str, *, rootless: bool) -> Iterator[str]:
    yield f"--config={_CONFIG}/buildkitd.toml"
    yield f"--root={root}"
    yield f"--addr={socket}"
    yield f"--addr=tcp://0.0.0.0:{WORKER_PORT}"  # IPv6 as well: Go listens on every family then
    yield f"--tlscacert={_TLS}/ca.crt"
    yield f"--tlscert={_TLS}/tls.crt"
    yield f"--tlskey={_TLS}/tls.key"
    if rootless:
        yield "--oci-worker-no-process-sandbox"  # a pod may not mount a /proc of its own


def _security(kept: Isolation) -> Doc:
    if kept is Isolation.PRIVILEGED:
        return {"privileged": True, "runAsUser": 0, "runAsGroup": 0}
    context: Doc = {
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"], "add": ["SETUID", "SETGID"]},  # newuidmap and newgidmap
    }
    if kept is Isolation.ROOTLESS:
        context |= {"seccompProfile": {"type": "Unconfined"}, "appArmorProfile": {"type": "Unconfined"}}
    return context


def _cache(slot: Slot, local: LocalCache | None) -> Doc:
    return {"emptyDir": {}} if local is None else {"persistentVolumeClaim": {"claimName": slot.worker.name}}


def _metadata(slot: Slot, name: str, pool: Pool, *more: str) -> Doc:
    return labelled(Key(slot.namespace, name), pool, **dict.fromkeys(more, slot.worker.name))


def labelled(key: Key, pool: Pool, **more: str) -> Doc:
    """The metadata of an object of this name that is a pool's workers', and ends with the pool."""
    labels = {
        LABEL_MANAGED: MANAGER,
        "app.kubernetes.io/name": "buildkit",
        LABEL_POOL: pool.key.name,
        LABEL_PURPOSE: PURPOSE_WORKER,
        **more,
    }
    metadata: Doc = {"name": key.name, "namespace": key.namespace, "labels": labels}
    if pool.uid:  # a pool that is gone owns nothing any more
        metadata["ownerReferences"] = [
            {"apiVersion": API_VERSION, "kind": pool.kind, "name": pool.key.name, "uid": pool.uid}
        ]
    return metadata
