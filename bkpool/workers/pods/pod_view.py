"""Reads from a pod's document how its worker is, as texts for a person.

Pure. A pod that runs is not ready: only buildkitd's own answer says so, rule 9 (docs/rules.md#r9).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from bkpool.core.errors import InvalidInput
from bkpool.core.names import (
    ANNOTATION_AUTHORITY,
    ANNOTATION_CACHE_OWNER,
    ANNOTATION_HISTORY,
    ANNOTATION_SPEC_DIGEST,
    ANNOTATION_WORKER_UID,
    HISTORY_OLD,
    LABEL_LEASED,
    LABEL_POOL,
    Key,
    Slot,
    slot_of,
)
from bkpool.kube import Doc, paths
from bkpool.workers.pods.pod_spec import CACHE_VOLUME

_LONGEST = 400  # characters of a message of Kubernetes
_PULL = {"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "ImageInspectError", "SignatureValidationFailed"}
_NEVER = {"InvalidImageName": "is not the name of an image", "ErrImageNeverPull": "is not on the node"}
_UNMADE = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_BACK_OFF = re.compile(r'^Back-off pulling image "[^"]*"(: ErrImagePull: )?')
_PORT_TAKEN = "didn't have free ports"  # kube-scheduler, plugins/nodeports
_IMAGE_FIELD = "spec.buildkitImage"


class Stage(StrEnum):
    """How far a pod has come. Each stage has its own deadline."""

    SCHEDULING = "scheduling"
    PULLING = "pulling"
    CREATING = "creating"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class View:
    """A pod that starts."""

    stage: Stage
    message: str = ""
    """What it waits for; empty if that is not worth a report."""
    trouble: bool = False
    """It will probably not start without help, so this is reported at once."""
    final: bool = False
    """It can never start."""
    field: str | None = None
    """The pool's field that has caused this."""
    port_taken: bool = False
    """Its host port is in use on every node."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How the only container of a pod has ended."""

    message: str
    hint: str = ""
    field: str | None = None
    has_log: bool = False
    """Its log may show the reason."""


def slot_called(key: Key) -> Slot | None:
    """The slot whose worker has this name; None if no slot can have it."""
    try:
        return slot_of(key)
    except InvalidInput:
        return None


def slot_in(doc: Doc) -> Slot | None:
    """The slot of a pod or claim; None if its name and its labels do not fit."""
    slot = slot_called(paths.key_of(doc))
    return slot if slot and doc["metadata"].get("labels", {}).get(LABEL_POOL) == slot.pool else None


def uid(doc: Doc) -> str:
    """The uid of the document itself."""
    return str(doc["metadata"]["uid"])


def worker_uid(pod: Doc) -> str:
    """The uid of the worker that the pod was made for."""
    return str(_annotations(pod).get(ANNOTATION_WORKER_UID, ""))


def pool_of(pod: Doc) -> Key:
    """The pool of a worker's pod, by its label."""
    metadata = pod["metadata"]
    return Key(metadata["namespace"], metadata.get("labels", {}).get(LABEL_POOL, ""))


def authority(pod: Doc) -> str:
    """The mark of the CA that has signed the worker's certificate; empty if each pool had no CA of its own yet."""
    return str(_annotations(pod).get(ANNOTATION_AUTHORITY, ""))


def spec_digest(pod: Doc) -> str:
    """The digest of what of the pool's spec the pod was made with; empty if an earlier version made it."""
    return str(_annotations(pod).get(ANNOTATION_SPEC_DIGEST, ""))


def cache_owner(doc: Doc) -> str | None:
    """Digest of the owner of the cache in a claim, or in a pod whose cache ends with it; None: it was never used."""
    return _annotations(doc).get(ANNOTATION_CACHE_OWNER) or None


def claim_of(pod: Doc) -> Key | None:
    """The volume claim that holds the pod's cache; None: the cache ends with the pod."""
    for volume in pod["spec"].get("volumes") or ():
        if volume["name"] == CACHE_VOLUME and "persistentVolumeClaim" in volume:
            return Key(pod["metadata"]["namespace"], volume["persistentVolumeClaim"]["claimName"])
    return None


def has_old_history(pod: Doc) -> bool:
    """Whether its volume has the build history of callers before, which nobody may read."""
    return _annotations(pod).get(ANNOTATION_HISTORY) == HISTORY_OLD


def protected(pod: Doc) -> bool:
    """Whether the pod asks others to leave it alone, because its worker is leased."""
    return bool(pod["metadata"].get("labels", {}).get(LABEL_LEASED) == "true")


def deleted(doc: Doc) -> bool:
    """Whether it is being deleted."""
    return doc["metadata"].get("deletionTimestamp") is not None


def ended(pod: Doc) -> bool:
    """Whether its container has ended, or will never start."""
    return pod.get("status", {}).get("phase") in {"Failed", "Succeeded"} or "terminated" in _state(pod)


def may_be_ending(pod: Doc) -> bool:
    """Whether a pod that has answered may stop doing so: it is being deleted, or its node may be lost."""
    conditions = pod.get("status", {}).get("conditions") or ()
    lost = "running" in _state(pod) and any(c["type"] == "Ready" and c["status"] != "True" for c in conditions)
    return deleted(pod) or lost


def address(pod: Doc) -> str | None:
    """The pod's own IP address; None: it has none yet."""
    return pod.get("status", {}).get("podIP") or None


def host_port(pod: Doc) -> int | None:
    """The port of its node that leads to it; None: there is none."""
    for container in pod["spec"].get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("hostPort"):
                return int(port["hostPort"])
    return None


def look(pod: Doc) -> View:
    """How far a pod has come, and what it waits for."""
    if ended(pod):
        return View(Stage.ENDED)
    if not pod["spec"].get("nodeName"):
        return _unscheduled(pod)
    state = _state(pod)
    return View(Stage.RUNNING) if "running" in state else _waiting(pod, state.get("waiting", {}))


def ending(pod: Doc) -> Ending:
    """How an ended pod has ended."""
    status, name = pod.get("status", {}), paths.key_of(pod).name
    reason, text = status.get("reason", ""), _short(status.get("message", ""))
    if reason == "Evicted":
        return Ending(
            f"the pod {name} was evicted: {text}", hint="Give its node, or the pool's pods, more of what it lacked."
        )
    state = _state(pod).get("terminated")
    if state is None:
        return Ending(f"the pod {name} has failed ({reason or 'no reason was given'}): {text or 'no message'}")
    why, code = state.get("reason", ""), state.get("exitCode")
    if why == "OOMKilled":
        limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory")
        field = "spec.resources.buildkit.limits.memory"
        return Ending(
            f"buildkitd was killed: out of memory (OOMKilled; the limit is {limit or 'the memory of its node'})",
            hint=f"Raise {field} of the pool.",
            field=field,
            has_log=True,
        )
    if why in {"StartError", "ContainerCannotRun"}:
        return Ending(
            f"the image's program could not be started: {_short(state.get('message', ''))}",
            hint=f"Check {_IMAGE_FIELD}, and the pool's isolation.",
            field=_IMAGE_FIELD,
        )
    other = f" ({why})" if why not in {"", "Error", "Completed"} else ""
    return Ending(f"buildkitd ended with exit code {code}{other}", has_log=True)


def _waiting(pod: Doc, waiting: Doc) -> View:
    node, image = pod["spec"]["nodeName"], pod["spec"]["containers"][0]["image"]
    reason, text = waiting.get("reason", "ContainerCreating"), _short(waiting.get("message", ""))
    if reason in _NEVER:
        message = f"{_IMAGE_FIELD}: {image!r} {_NEVER[reason]}"
        return View(Stage.PULLING, message, trouble=True, final=True, field=_IMAGE_FIELD)
    if reason in _PULL:
        cause = _BACK_OFF.sub("", text)
        message = f"the image {image} cannot be pulled on node {node}"
        return View(Stage.PULLING, f"{message}: {cause}" if cause else message, trouble=True, field=_IMAGE_FIELD)
    if reason in _UNMADE:
        return View(Stage.CREATING, f"its container cannot be made on node {node} ({reason}): {text}", trouble=True)
    return View(Stage.CREATING, f"waiting for its container on node {node} ({reason})")


def _unscheduled(pod: Doc) -> View:
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            text = condition.get("message", "")
            # The scheduler's further sentences are about preemption.
            message = _short(text.split(". ")[0].rstrip(".")) or condition.get("reason", "")
            taken = _PORT_TAKEN in text
            return View(Stage.SCHEDULING, f"waiting for a node: {message}", trouble=True, port_taken=taken)
    return View(Stage.SCHEDULING, "waiting for a node")


def _state(pod: Doc) -> Doc:
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    state: Doc = statuses[0].get("state") or {} if statuses else {}
    return state


def _annotations(doc: Doc) -> Doc:
    return doc["metadata"].get("annotations") or {}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
