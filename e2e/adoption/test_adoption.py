"""A kind cluster that bkpool did not make: pytest-kind makes it, bkpool adopts it, builds on it and does not delete
it.

`nox -s kind` runs this module first and keeps the cluster. The other tests on kind then adopt the same one, so that
the session makes one cluster in all. pytest-kind is given kind, kubectl and the node image; it downloads nothing.
"""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_kind import KindCluster

from bkpool.kind.engine import engine_fault
from bkpool.kind.lifecycle import CONFIG
from bkpool.pki.authority import worker_uri
from bkpool.toolchain.table import Tool, release_of
from harness import Appliance, Context, really_ran
from kind_cluster import BUILDKIT_IMAGE, IMAGE_ARCHIVES, E2eCluster, shifted
from worlds import Pods

WORKER_IMAGE = "bkpool-e2e/worker:1"
"""The image of the workers here. Only pytest-kind's load_docker_image can have put it on the node."""

# pytest-kind ends `kubectl port-forward` by kill() and does not wait for it.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KindCluster]:
    """A cluster as pytest-kind's fixture makes it, but with a configuration. That fixture has no option for one."""
    if fault := engine_fault():
        pytest.skip(fault)
    option = request.config.getoption
    directory = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)  # pytest-kind makes .pytest-kind/ in the current directory
        cluster = KindCluster(
            option("cluster_name"),
            directory / "kubeconfig",
            image=option("kind_image"),
            kind_path=Path(option("kind_bin")),
            kubectl_path=Path(option("kind_kubectl_bin")),
        )
        _remove(cluster)  # what an interrupted run left
        cluster.create(config_file=shifted(CONFIG, directory))
        cluster.load_docker_image(_worker_image())
        yield cluster
        if not option("keep_cluster"):
            cluster.delete()


def _remove(cluster: KindCluster) -> None:
    kubeconfig = ("--kubeconfig", cluster.kubeconfig_path)  # without it kind looks into the user's own
    subprocess.run([cluster.kind_path, "delete", "cluster", "--name", cluster.name, *kubeconfig], check=True)


def _worker_image() -> str:
    """BuildKit's image under a name of the tests, in the container engine."""
    if IMAGE_ARCHIVES:
        for archive in IMAGE_ARCHIVES:
            subprocess.run(["docker", "load", "--quiet", "--input", archive], check=True)
        image = BUILDKIT_IMAGE
    else:
        image = f"docker.io/moby/buildkit:v{release_of(Tool.BUILDKITD).version}-rootless"
        subprocess.run(["docker", "pull", "--quiet", image], check=True)
    subprocess.run(["docker", "tag", str(image), WORKER_IMAGE], check=True)
    return WORKER_IMAGE


@pytest.fixture(scope="module")
def appliance(
    cluster: KindCluster, tmp_path_factory: pytest.TempPathFactory, tools: dict[str, Path]
) -> Iterator[Appliance]:
    """bkpool on that cluster, with one warm worker."""
    known = E2eCluster(
        cluster.name, cluster.kubeconfig_path, (), f"{cluster.name}-control-plane", "", buildkit_image=WORKER_IMAGE
    )
    appliance = Appliance(tmp_path_factory.mktemp("appliance"), tools, Pods(known))
    appliance.up_with({"scaling": {"min": 1, "max": 2}})
    appliance.all_idle()
    yield appliance
    appliance.finish()


def test_the_main_job_runs_on_a_cluster_that_bkpool_did_not_make(appliance: Appliance, context: Context) -> None:
    certificates = appliance.allocate()
    builder = appliance.builder(certificates, "adopted")
    assert really_ran(appliance.build(builder, context.dockerfile("say adopted")).ok(), "adopted")
    appliance.release(certificates.lease).ok()


def test_pytest_kind_finds_bkpools_objects(appliance: Appliance, cluster: KindCluster) -> None:
    appliance.all_idle()
    assert cluster.kubectl("get", "buildkitpools", "-o", "name").split() == [
        "buildkitpool.buildkit.smrt-devops.net/default"
    ]
    chosen = ("-l", "buildkit.smrt-devops.net/purpose=worker", "-o", "jsonpath={.items[*].spec.containers[*].image}")
    assert set(cluster.kubectl("get", "pods", *chosen).split()) == {WORKER_IMAGE}


def test_a_forwarded_port_reaches_the_worker(appliance: Appliance, cluster: KindCluster) -> None:
    appliance.all_idle()
    worker = "buildkitworker/default-worker-0"
    uid = cluster.kubectl("get", worker, "-o", "jsonpath={.metadata.uid}")
    with cluster.port_forward("pod/default-worker-0", 1234) as port:
        pem = ssl.get_server_certificate(("127.0.0.1", port))
    assert worker_uri(uid).encode() in ssl.PEM_cert_to_DER_cert(pem)


def test_a_purge_leaves_the_cluster_and_says_so(appliance: Appliance, cluster: KindCluster) -> None:
    purged = appliance.down("--purge").ok()
    assert f"The cluster {cluster.name} was not created by this appliance, so it stays." in purged.err
    assert f"node/{cluster.name}-control-plane" in cluster.kubectl("get", "nodes", "-o", "name")
    assert not (appliance.home / "kind.json").exists()
