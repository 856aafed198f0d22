"""The documents of a worker in a cluster: its pod, Secret, ConfigMap and volume claim.

Pure functions. Nothing here asks a cluster, or decides when a document is written.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from bkpool.core.errors import BkpoolError, WorkerFailed
from bkpool.core.names import (
    ANNOTATION_AUTHORITY,
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
from bkpool.workers.spec_digest import spec_digest
from bkpool.workers.step_log import step_log_environment

_IMAGE = f"docker.io/moby/buildkit:v{release_of(Tool.BUILDKITD).version}"
ROOTLESS_IMAGE, PRIVILEGED_IMAGE = f"{_IMAGE}-rootless", _IMAGE

CONTAINER = "buildkitd"
CACHE_VOLUME = "cache"
SELECTOR = f"{LABEL_MANAGED}={MANAGER},{LABEL_PURPOSE}={PURPOSE_WORKER}"
"""The label selector of all objects of workers."""
ANNOTATION_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"

_USER = 1000  # of the rootless image
_TLS, _CONFIG = "/etc/bkpool/tls", "/etc/bkpool/config"
_GRACE_AFTER_DRAIN = 30  # seconds beyond drainTimeout: for the hook to notice the end, and for buildkitd to end

# The kubelet runs this before it sends SIGTERM. When a node is drained or the pod is deleted, running builds may
# finish, and clients may still begin new ones on their open connections. After SIGTERM buildkitd 0.34.2 lets running
# builds finish too, but accepts no new ones (docs/clients.md#stopping). Older versions, which a pool may name as its
# image, ended at once.
# The script looks for established connections (state 01) to the worker's port (04D2 is 1234) in proc(5)'s list of a
# network namespace. Only `sleep` is not built into the shell. In an image without it the wait ends at once.
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
    """How strongly a pool's pods are isolated from their node."""

    ROOTLESS = "rootless"
    BASELINE = "baseline"
    USERNS = "userns"
    """Root in a user namespace that the kubelet makes for the pod (`hostUsers: false`)."""
    PRIVILEGED = "privileged"

    @property
    def rootless(self) -> bool:
        """Whether buildkitd runs as a user, in a namespace that rootlesskit makes."""
        return self in {Isolation.ROOTLESS, Isolation.BASELINE}


@dataclass(frozen=True, slots=True)
class PodRequest:
    """What is needed to make a pod."""

    slot: Slot
    worker_uid: str
    owner: str | None
    """Digest of the owner of its cache; None: nobody yet."""
    pool: Pool
    image: str
    """Used if the pool names none."""
    host_port: int | None = None
    authority: str = ""
    """The mark of the CA of its certificate."""

    def with_host_port(self, host_port: int) -> PodRequest:
        """The same request, for a pod that is reached by a port of its node."""
        return replace(self, host_port=host_port)


def isolation(pool: Pool) -> Isolation:
    """The isolation in the pool's annotation, or the default.

    Raises:
        WorkerFailed: The annotation has another value, or `privileged` in an untrusted pool.
    """
    field = f"metadata.annotations[{ANNOTATION_ISOLATION}]"
    given = pool.metadata.annotations.get(ANNOTATION_ISOLATION, Isolation.ROOTLESS)
    try:
        asked = Isolation(given)
    except ValueError:
        raise WorkerFailed(
            f"{field}: {given[:40]!r} is not an isolation", hint=f"Use one of: {', '.join(Isolation)}.", field=field
        ) from None
    if pool.spec.untrusted and asked is Isolation.PRIVILEGED:
        raise WorkerFailed(
            f"{field}: an untrusted pool cannot be privileged, because a build could take over its node",
            hint="Remove the annotation, or spec.untrusted.",
            field=field,
        )
    return asked


def pod(request: PodRequest) -> Doc:
    """The pod of a worker.

    Raises:
        WorkerFailed: The pool asks for what is not possible; the message names the field.
    """
    pool, slot = request.pool, request.slot
    level = isolation(pool)
    local = pool.spec.local_cache
    annotations = {
        ANNOTATION_WORKER_UID: request.worker_uid,
        ANNOTATION_AUTHORITY: request.authority,
        ANNOTATION_EVICT: "false" if request.owner else "true",
        **({ANNOTATION_CACHE_OWNER: request.owner} if request.owner and local is None else {}),
    }
    leased = {LABEL_LEASED: "true"} if request.owner else {}
    volumes = [
        {"name": "tls", "secret": {"secretName": slot.worker.name, "defaultMode": 0o440}},
        {"name": "config", "configMap": {"name": config_name(slot)}},
        {"name": CACHE_VOLUME, **_cache(slot, local)},
    ]
    spec: Doc = {
        "restartPolicy": "Never",  # the controller makes another pod, and counts failures
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(pool.spec.gateway.drain_timeout.total_seconds()) + _GRACE_AFTER_DRAIN,
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "containers": [_container(request, level)],
        "volumes": volumes,
    }
    if level is Isolation.USERNS:
        spec["hostUsers"] = False
    if level.rootless:
        spec["securityContext"] = {"fsGroup": _USER, "fsGroupChangePolicy": "OnRootMismatch"}
    metadata = _metadata(slot, slot.worker.name, pool, LABEL_WORKER) | {"annotations": annotations}
    metadata["labels"] |= leased
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pod_digest(pool: Pool, image: str, toml: str) -> str:
    """The digest of what of a pool's spec reaches the buildkitd in its pods. A NetworkPolicy changes beside them.

    Args:
        pool: The pool.
        image: Used if the pool names none.
        toml: The rendered configuration.

    Raises:
        WorkerFailed: The pool asks for what is not possible.
    """
    spec = pool.spec
    resources = spec.resources.buildkit.model_dump(mode="json", by_alias=True)
    has_volume = spec.local_cache is not None
    step_log = step_log_environment(spec)
    more = (step_log,) if step_log else ()  # else the digest is that of earlier versions
    return spec_digest(spec.buildkit_image or image, resources, str(isolation(pool)), has_volume, toml, *more)


def secret(slot: Slot, pool: Pool, leaf: Leaf, ca_pem: bytes) -> Doc:
    """The worker's certificate and key, and the CA of those who may connect."""
    files = {"ca.crt": ca_pem, "tls.crt": leaf.cert_pem, "tls.key": leaf.key_pem or b""}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": _metadata(slot, slot.worker.name, pool, LABEL_WORKER),
        "data": {name: base64.b64encode(content).decode() for name, content in files.items()},
    }


def has_user_namespace(pod: Doc) -> bool:
    """Whether the pod asks for a user namespace of its own."""
    return pod["spec"].get("hostUsers") is False


def no_user_namespaces() -> WorkerFailed:
    """The error for a cluster whose pods cannot have user namespaces."""
    field = f"metadata.annotations[{ANNOTATION_ISOLATION}]"
    return WorkerFailed(
        f"{field}: pods of this cluster cannot have user namespaces (its API server drops hostUsers)",
        hint="Use Kubernetes 1.33 or newer, or another isolation.",
        field=field,
    )


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
    """The claim of a slot's cache. It outlives the workers of the slot, and has the owner of the cache."""
    metadata = _metadata(slot, slot.worker.name, pool, LABEL_WORKER)
    if owner:
        metadata["annotations"] = {ANNOTATION_CACHE_OWNER: owner}
    spec: Doc = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": local.size}}}
    if local.storage_class is not None:
        spec["storageClassName"] = local.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def protection(*, held: bool) -> Doc:
    """Metadata that tells an autoscaler and a PodDisruptionBudget whether they may remove the pod."""
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
"""A part of a field's path in our documents, and the pool's field that it came from. The first that fits counts."""


def refusal(error: BkpoolError, what: str) -> WorkerFailed:
    """Turns a refusal of the API server into an error that names the pool's field.

    Args:
        error: InvalidInput or Forbidden.
        what: The document, for the message.
    """
    field = next((ours for theirs, ours in _FIELDS if theirs in error.message), None)
    named = f"{field}: " if field else ""
    hint = f"Correct {field} of the pool." if field else error.hint
    if "PodSecurity" in error.message:
        hint = f"Set the pool's annotation {ANNOTATION_ISOLATION} to what its namespace admits, or relabel that."
    return WorkerFailed(
        f"{named}the {what} is not admitted: {error.message.removeprefix('Kubernetes: ')}", hint=hint, field=field
    )


def _container(request: PodRequest, level: Isolation) -> Doc:
    spec, rootless = request.pool.spec, level.rootless
    root = "/home/user/.local/share/buildkit" if rootless else "/var/lib/buildkit"  # as in the images
    socket = "unix:///run/user/1000/buildkit/buildkitd.sock" if rootless else "unix:///run/buildkit/buildkitd.sock"
    # BUILDKIT_HOST is for `kubectl exec … buildctl`
    variables = {"BUILDKIT_HOST": socket, **step_log_environment(spec)}
    port: Doc = {"name": "buildkit", "containerPort": WORKER_PORT}
    if request.host_port is not None:
        port["hostPort"] = request.host_port
    container: Doc = {
        "name": CONTAINER,
        "image": spec.buildkit_image or request.image,
        "imagePullPolicy": "IfNotPresent",
        "args": list(_arguments(socket, root, rootless=rootless)),
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "ports": [port],
        "resources": spec.resources.buildkit.model_dump(mode="json", by_alias=True),
        "securityContext": _security(level),
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
    yield f"--addr=tcp://0.0.0.0:{WORKER_PORT}"  # Go listens on IPv6 as well then
    yield f"--tlscacert={_TLS}/ca.crt"
    yield f"--tlscert={_TLS}/tls.crt"
    yield f"--tlskey={_TLS}/tls.key"
    if rootless:
        yield "--oci-worker-no-process-sandbox"  # a pod may not mount its own /proc


def _security(level: Isolation) -> Doc:
    if not level.rootless:  # in a user namespace these are rights over the pod, and none over the node
        return {"privileged": True, "runAsUser": 0, "runAsGroup": 0}
    context: Doc = {
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"], "add": ["SETUID", "SETGID"]},  # newuidmap and newgidmap
    }
    if level is Isolation.ROOTLESS:
        context |= {"seccompProfile": {"type": "Unconfined"}, "appArmorProfile": {"type": "Unconfined"}}
    return context


def _cache(slot: Slot, local: LocalCache | None) -> Doc:
    return {"emptyDir": {}} if local is None else {"persistentVolumeClaim": {"claimName": slot.worker.name}}


def _metadata(slot: Slot, name: str, pool: Pool, *more: str) -> Doc:
    return labelled(Key(slot.namespace, name), pool, **dict.fromkeys(more, slot.worker.name))


def labelled(key: Key, pool: Pool, **more: str) -> Doc:
    """The metadata of an object for the workers of a pool. The object is deleted with the pool."""
    labels = {
        LABEL_MANAGED: MANAGER,
        "app.kubernetes.io/name": "buildkit",
        LABEL_POOL: pool.key.name,
        LABEL_PURPOSE: PURPOSE_WORKER,
        **more,
    }
    metadata: Doc = {"name": key.name, "namespace": key.namespace, "labels": labels}
    if pool.uid:  # a pool that is gone cannot own anything
        metadata["ownerReferences"] = [
            {"apiVersion": API_VERSION, "kind": pool.kind, "name": pool.key.name, "uid": pool.uid}
        ]
    return metadata
