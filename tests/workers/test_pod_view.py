from __future__ import annotations

import pytest

from bkpool.core.names import ANNOTATION_CACHE_OWNER, Key, Slot
from bkpool.workers.pods import pod_spec, pod_view
from bkpool.workers.pods.pod_view import Stage, View
from bkpool.workers.pods.start_deadline import Deadlines, StartDeadline
from support.objects import pool, slot


def pod(*, node: str | None = "node-1", phase: str = "Pending", state=None, conditions=(), **status):
    """As the builder makes it, with a status as the API server reports it."""
    made = pod_spec.pod(pod_spec.PodRequest(slot(0), "uid-1", None, pool(), "an/image:1", 12400))
    made["metadata"]["uid"] = "pod-uid"
    if node:
        made["spec"]["nodeName"] = node
    statuses = [] if state is None else [{"name": "buildkitd", "state": state}]
    made["status"] = {"phase": phase, "containerStatuses": statuses, "conditions": list(conditions), **status}
    return made


def waiting(reason: str, message: str = ""):
    return pod(state={"waiting": {"reason": reason, "message": message}})


def unscheduled(message: str):
    return pod(
        node=None,
        conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}],
    )


def test_what_was_written_is_read_again():
    made = pod(podIP="10.0.0.9")
    assert pod_view.slot_in(made) == slot(0)
    assert (pod_view.worker_uid(made), pod_view.host_port(made), pod_view.address(made)) == (
        "uid-1",
        12400,
        "10.0.0.9",
    )
    assert pod_view.claim_of(made) is None
    assert not pod_view.protected(made)
    local = pool(cache={"backends": [{"type": "local"}]})
    with_volume = pod_spec.pod(pod_spec.PodRequest(slot(0), "uid-1", "anna", local, "i"))
    assert pod_view.claim_of(with_volume) == Key("default", "p-worker-0")
    assert pod_view.protected(with_volume)
    claim = pod_spec.volume(slot(0), local, local.spec.cache.local, "anna")
    assert pod_view.cache_owner(claim) == "anna"
    claim["metadata"]["annotations"] = {ANNOTATION_CACHE_OWNER: ""}
    assert pod_view.cache_owner(claim) is None


def test_a_pod_with_an_odd_name_or_another_pools_label_is_in_no_slot():
    made = pod()
    made["metadata"]["labels"].clear()
    assert pod_view.slot_in(made) is None
    made["metadata"]["name"] = "something"
    assert pod_view.slot_in(made) is None
    assert pod_view.slot_called(Key("n", "p-worker-2")) == Slot("n", "p", 2)


@pytest.mark.parametrize(
    ("document", "view"),
    [
        (pod(node=None), View(Stage.SCHEDULING, "waiting for a node")),
        (
            unscheduled("0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 No ..."),
            View(Stage.SCHEDULING, "waiting for a node: 0/1 nodes are available: 1 Insufficient cpu", trouble=True),
        ),
        (pod(), View(Stage.CREATING, "waiting for its container on node node-1 (ContainerCreating)")),
        (
            waiting("ImagePullBackOff", 'Back-off pulling image "an/image:1": ErrImagePull: no such host'),
            View(
                Stage.PULLING,
                "the image an/image:1 cannot be pulled on node node-1: no such host",
                trouble=True,
                field="spec.buildkitImage",
            ),
        ),
        (
            waiting("InvalidImageName", "whatever"),
            View(
                Stage.PULLING,
                "spec.buildkitImage: 'an/image:1' is not the name of an image",
                trouble=True,
                final=True,
                field="spec.buildkitImage",
            ),
        ),
        (
            waiting("CreateContainerConfigError", 'secret "x" not found'),
            View(
                Stage.CREATING,
                'its container cannot be made on node node-1 (CreateContainerConfigError): secret "x" not found',
                trouble=True,
            ),
        ),
        (pod(phase="Running", state={"running": {}}), View(Stage.RUNNING)),
        (pod(phase="Running", state={"terminated": {"exitCode": 1}}), View(Stage.ENDED)),
        (pod(phase="Failed"), View(Stage.ENDED)),
    ],
)
def test_how_far_a_pod_has_come(document, view):
    assert pod_view.look(document) == view


def test_a_host_port_that_is_taken_is_recognised():
    message = "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports. preemption: ..."
    assert pod_view.look(unscheduled(message)).port_taken


def terminated(reason: str, code: int = 1, message: str = ""):
    return pod(phase="Failed", state={"terminated": {"reason": reason, "exitCode": code, "message": message}})


@pytest.mark.parametrize(
    ("document", "message", "has_log"),
    [
        (terminated("OOMKilled", 137), "buildkitd was killed: out of memory (OOMKilled; the limit is 1Gi)", True),
        (terminated("Error", 2), "buildkitd ended with exit code 2", True),
        (
            terminated("StartError", 128, "no such file"),
            "the image's program could not be started: no such file",
            False,
        ),
        (
            pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
            "the pod p-worker-0 was evicted: The node was low on resource: memory.",
            False,
        ),
        (pod(phase="Failed", reason="OutOfcpu", message="x"), "the pod p-worker-0 has failed (OutOfcpu): x", False),
    ],
)
def test_how_a_pod_ended(document, message, has_log):
    document["spec"]["containers"][0]["resources"] = {"limits": {"memory": "1Gi"}}
    ending = pod_view.ending(document)
    assert (ending.message, ending.has_log) == (message, has_log)


def test_a_pod_is_doubtful_while_it_is_deleted_or_its_node_is_silent():
    lost = [{"type": "Ready", "status": "False"}]
    assert not pod_view.may_be_ending(pod(phase="Running", state={"running": {}}))
    assert pod_view.may_be_ending(pod(phase="Running", state={"running": {}}, conditions=lost))
    assert not pod_view.may_be_ending(pod(conditions=lost))  # it has only just begun
    going = pod(phase="Running", state={"running": {}})
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert pod_view.may_be_ending(going)


# --- deadline -------------------------------------------------------------------------------------------------------

CREATING = View(Stage.CREATING, "waiting for its container")
UNSCHEDULED = View(Stage.SCHEDULING, "no node", trouble=True)


def test_trouble_is_reported_at_once_and_so_is_its_end():
    deadline = StartDeadline(Deadlines())
    assert deadline.message_to_report(UNSCHEDULED, 0.0) == "no node"
    assert deadline.message_to_report(UNSCHEDULED, 1.0) is None
    assert deadline.message_to_report(CREATING, 2.0) == ""
    assert deadline.message_to_report(View(Stage.RUNNING), 3.0) is None


def test_an_ordinary_wait_is_reported_only_if_it_is_long():
    deadline = StartDeadline(Deadlines())
    assert deadline.message_to_report(CREATING, 0.0) is None
    assert deadline.time_to_change(1.0) == 4.0
    assert deadline.message_to_report(CREATING, 5.0) == "waiting for its container"
    assert deadline.time_to_change(5.0) == Deadlines().creating - 5.0


def test_each_stage_has_its_own_deadline():
    deadline = StartDeadline(Deadlines(scheduling=10, creating=20))
    deadline.message_to_report(UNSCHEDULED, 0.0)
    assert not deadline.has_passed(UNSCHEDULED, 9.9)
    assert deadline.has_passed(UNSCHEDULED, 10.0)
    deadline.message_to_report(CREATING, 100.0)
    assert not deadline.has_passed(CREATING, 119.0)
    assert deadline.has_passed(CREATING, 120.0)
    assert deadline.has_passed(View(Stage.CREATING, final=True), 100.0)
