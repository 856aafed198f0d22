from __future__ import annotations

import asyncio
import subprocess

import pytest

from bkpool.core.errors import Forbidden, InvalidInput, WorkerFailed
from bkpool.core.names import (
    ANNOTATION_AUTHORITY,
    ANNOTATION_CACHE_OWNER,
    ANNOTATION_ISOLATION,
    ANNOTATION_WORKER_UID,
    LABEL_LEASED,
    LABEL_WORKER,
    WORKER_PORT,
)
from bkpool.core.pool import LocalCache, Pool
from bkpool.core.resource import Metadata
from bkpool.pki.authority import Leaf
from bkpool.workers.pods import pod_spec
from bkpool.workers.pods.pod_spec import ANNOTATION_EVICT, PRIVILEGED_IMAGE, ROOTLESS_IMAGE, PodRequest
from support.objects import pool, slot

SLOT = slot(3)


def isolated(isolation: str) -> Pool:
    return Pool(metadata=Metadata(name="p", annotations={ANNOTATION_ISOLATION: isolation}))


def pod(wanted_pool: Pool | None = None, owner: str | None = None, **more):
    return pod_spec.pod(PodRequest(SLOT, "uid-1", owner, wanted_pool or pool(), ROOTLESS_IMAGE, **more))


def container(document):
    (only,) = document["spec"]["containers"]
    return only


def test_the_images_are_buildkits_own_and_pinned():
    assert ROOTLESS_IMAGE == f"{PRIVILEGED_IMAGE}-rootless"  # noqa: SIM300 - both are ours
    assert PRIVILEGED_IMAGE.startswith("docker.io/moby/buildkit:v0.")


def test_a_pod_is_called_as_its_worker_and_owned_by_its_pool():
    metadata = pod(authority="mark")["metadata"]
    assert (metadata["name"], metadata["namespace"]) == SLOT.worker[::-1]
    assert metadata["labels"][LABEL_WORKER] == "p-worker-3"
    assert metadata["annotations"] == {
        ANNOTATION_WORKER_UID: "uid-1",
        ANNOTATION_AUTHORITY: "mark",
        ANNOTATION_EVICT: "true",
    }
    assert metadata["ownerReferences"][0]["uid"] == "pool-uid"
    assert "ownerReferences" not in pod(isolated("rootless"))["metadata"]  # a pool that is gone owns nothing


def test_a_pod_for_a_holder_is_marked_from_the_beginning():
    metadata = pod(owner="anna")["metadata"]
    assert metadata["labels"][LABEL_LEASED] == "true"
    assert metadata["annotations"][ANNOTATION_EVICT] == "false"
    assert metadata["annotations"][ANNOTATION_CACHE_OWNER] == "anna"


def test_with_a_volume_the_claim_has_the_cache_owner_and_the_pod_does_not():
    local = pool(cache={"backends": [{"type": "local", "local": {"size": "5Gi", "storage_class": "fast"}}]})
    made = pod(local, owner="anna")
    assert ANNOTATION_CACHE_OWNER not in made["metadata"]["annotations"]
    assert made["spec"]["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "p-worker-3"}
    claim = pod_spec.volume(SLOT, local, local.spec.cache.local, "anna")
    assert claim["metadata"]["annotations"] == {ANNOTATION_CACHE_OWNER: "anna"}
    assert claim["spec"]["resources"]["requests"]["storage"] == "5Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "storageClassName" not in pod_spec.volume(SLOT, local, LocalCache(), None)["spec"]


def test_rootless_pods_are_no_more_than_they_must_be():
    for isolation in ("rootless", "baseline"):
        only = container(pod(isolated(isolation)))
        assert "command" not in only
        assert "--oci-worker-no-process-sandbox" in only["args"]
        security = only["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"], "add": ["SETUID", "SETGID"]}
        assert "allowPrivilegeEscalation" not in security
        assert ("seccompProfile" in security, "appArmorProfile" in security) == (isolation == "rootless",) * 2


def test_a_privileged_pod_runs_buildkitd_itself_in_any_image():
    made = pod(isolated("privileged"))
    only = container(made)
    assert only["command"] == ["buildkitd"]
    assert only["securityContext"] == {"privileged": True, "runAsUser": 0, "runAsGroup": 0}
    assert "--oci-worker-no-process-sandbox" not in only["args"]
    assert "securityContext" not in made["spec"]


def test_a_pod_with_a_user_namespace_is_root_only_inside_of_it():
    made = pod(isolated("userns"))
    assert made["spec"]["hostUsers"] is False
    only = container(made)
    assert only["command"] == ["buildkitd"], "rootlesskit would need a second namespace of ids"
    assert "--root=/var/lib/buildkit" in only["args"]
    for other in ("rootless", "baseline", "privileged"):
        assert "hostUsers" not in pod(isolated(other))["spec"]


def test_another_isolation_is_refused_by_its_annotation():
    with pytest.raises(WorkerFailed, match=r"isolation\]: 'none' is not an isolation") as refused:
        pod(isolated("none"))
    assert "rootless, baseline, userns, privileged" in refused.value.hint


def test_an_untrusted_pool_has_no_volume_and_is_never_privileged():
    cache = {"backends": [{"type": "local"}]}
    untrusted = pool(untrusted=True, cache=cache)
    assert pod(untrusted)["spec"]["volumes"][-1] == {"name": "cache", "emptyDir": {}}
    assert "persistentVolumeClaim" in pod(pool(cache=cache))["spec"]["volumes"][-1]
    for isolation in ("rootless", "baseline", "userns"):
        assert not pod(untrusted.but(metadata=isolated(isolation).metadata))["spec"]["automountServiceAccountToken"]
    with pytest.raises(WorkerFailed, match="untrusted pool cannot be privileged") as refused:
        pod(untrusted.but(metadata=isolated("privileged").metadata))
    assert refused.value.field == f"metadata.annotations[{ANNOTATION_ISOLATION}]"


def test_pods_have_the_settings_of_their_pool():
    resources = {"requests": {"cpu": "500m"}, "limits": {"memory": "4Gi"}}
    made = pod(
        pool(resources={"buildkit": resources}, buildkit_image="mine:1", gateway={"drain_timeout": "10m"}),
        host_port=12400,
    )
    only = container(made)
    assert (only["resources"], only["image"]) == (resources, "mine:1")
    assert made["spec"]["terminationGracePeriodSeconds"] == 630
    assert only["ports"] == [{"name": "buildkit", "containerPort": WORKER_PORT, "hostPort": 12400}]
    assert not made["spec"]["automountServiceAccountToken"]


def test_a_secret_holds_the_workers_key_and_the_ca_that_it_trusts():
    secret = pod_spec.secret(SLOT, pool(), Leaf(b"cert", b"key"), b"ca")
    assert secret["data"] == {"ca.crt": "Y2E=", "tls.crt": "Y2VydA==", "tls.key": "a2V5"}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("spec.containers[0].resources.requests: Invalid value", "spec.resources.buildkit"),
        ("spec.containers[0].image: Required value", "spec.buildkitImage"),
        ("spec.resources[storage]: Invalid value", "spec.cache.backends[].local.size"),
        ("spec.egress[1].to[0].ipBlock.cidr: Invalid value", "spec.networking.egress.allowedCIDRs"),
        ("something else", None),
    ],
)
def test_what_is_not_admitted_names_the_field_that_it_came_from(message, field):
    refused = pod_spec.refusal(InvalidInput(f"Kubernetes: POST /x: {message}", hint="h"), "pod")
    assert refused.field == field
    assert refused.message.endswith(f"the pod is not admitted: POST /x: {message}")
    assert refused.hint == (f"Correct {field} of the pool." if field else "h")


def test_a_refusal_of_pod_security_names_the_annotation_for_isolation():
    refused = pod_spec.refusal(Forbidden('violates PodSecurity "baseline:latest"', hint="rights"), "pod")
    assert ANNOTATION_ISOLATION in refused.hint


async def test_the_hook_waits_while_somebody_is_connected_and_no_longer():
    """The real script in the real shell, with the port of a listener here in place of the worker's."""
    server = await asyncio.start_server(lambda _reader, writer: writers.append(writer), "127.0.0.1", 0)
    writers: list[asyncio.StreamWriter] = []
    port = server.sockets[0].getsockname()[1]
    hook = container(pod())["lifecycle"]["preStop"]["exec"]["command"]
    assert f":{WORKER_PORT:04X}" in hook[-1]
    script = hook[-1].replace(f"{WORKER_PORT:04X}", f"{port:04X}").replace("sleep 1", "sleep 0.02")

    async def run(**environment: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", script, env=environment, stderr=subprocess.DEVNULL
        )

    async with server, asyncio.timeout(60):
        try:
            assert await (await run()).wait() == 0  # nobody is there
            _, client = await asyncio.open_connection("127.0.0.1", port)
            assert await (await run(PATH="/nowhere")).wait() == 0  # no `sleep`: neither a spin nor a failure
            waiting = await run(PATH="/usr/bin:/bin")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await waiting.wait()
            client.transport.abort()
            assert await waiting.wait() == 0
        finally:  # since Python 3.12 the server waits for its connections, also after a failure
            for writer in writers:
                writer.transport.abort()
