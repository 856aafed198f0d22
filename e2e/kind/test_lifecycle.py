"""The life cycle of a real kind cluster: it is made, interrupted, adopted, started again and deleted.

It has a name and ports of its own, so that the session's cluster is not in its way.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import docker
import pytest

from bkpool.core.errors import HostFault
from bkpool.kind.engine import Engine, engine_fault
from bkpool.kind.lifecycle import CONFIG, Cluster, HomeCluster
from bkpool.kind.marker import Marker
from bkpool.toolchain import Tool, Toolchain, default_cache
from kind_cluster import IMAGE_ARCHIVES, NODE_IMAGE, Kubectl, kind_of, shifted

NAME = "bkpool-e2e-life"
FOREIGN = "bkpool-e2e-foreign"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if fault := engine_fault():
        pytest.skip(fault)
    with Engine.connect() as engine:
        yield engine


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(scope="module")
def kind(engine: Engine, homes: Path) -> Iterator[HomeCluster]:
    kind = kind_of(engine, homes / "one")
    yield kind
    kind.delete()


@pytest.fixture(scope="module")
def config(homes: Path) -> Path:
    return shifted(CONFIG, homes, 200)


@pytest.fixture(autouse=True)
def users_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The kubeconfig of the user in both places that kubectl knows. Nothing may change them."""
    (tmp_path / ".kube").mkdir()
    default, named = tmp_path / ".kube" / "config", tmp_path / "named"
    for path in (default, named):
        path.write_text("current-context: mine\n")
    before = [path.stat() for path in (default, named)]
    # The docker CLI looks for its contexts there.
    monkeypatch.setenv("DOCKER_CONFIG", os.environ.get("DOCKER_CONFIG", str(Path.home() / ".docker")))
    monkeypatch.setenv("BKPOOL_CACHE", str(default_cache()))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(named))
    yield named
    after = [path.stat() for path in (default, named)]
    assert [(each.st_ino, each.st_mtime_ns) for each in after] == [(each.st_ino, each.st_mtime_ns) for each in before]


def wait(condition: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def test_the_rest_of_an_interrupted_start_is_removed_and_the_cluster_made(engine, kind, config, homes):
    script = (
        "import sys; from pathlib import Path; from bkpool.kind.engine import Engine; "
        "from bkpool.kind.lifecycle import HomeCluster; program, home, name, config, image = sys.argv[1:]; "
        "HomeCluster(Path(program), Engine.connect(), Path(home), print).ensure("
        "name, config=Path(config), node_image=image or None)"
    )
    program = Toolchain(default_cache()).ensure(Tool.KIND)
    command = [sys.executable, "-c", script, program, homes / "one", NAME, config, NODE_IMAGE or ""]
    with subprocess.Popen(command, start_new_session=True, cwd=Path(__file__).parents[2]) as up:
        wait(lambda: engine.nodes(NAME) or up.poll() is not None, "the half-made node")
        assert up.poll() is None, "the start has ended"
        os.killpg(up.pid, signal.SIGKILL)
    assert Marker.read(homes / "one") == Marker(NAME, "creating", made=True)
    (half_made,) = engine.nodes(NAME)

    cluster = kind.ensure(NAME, config=config, node_image=NODE_IMAGE)

    assert (cluster.node, cluster.made) == (half_made.name, True)
    assert cluster.worker_ports == tuple(range(12600, 12632))
    assert Marker.read(homes / "one") == Marker(NAME, "ready", made=True)
    assert stat.S_IMODE(cluster.kubeconfig.stat().st_mode) == 0o600
    assert "node/" + cluster.node in Kubectl(cluster.kubeconfig)("get", "nodes", "-o", "name")


@pytest.fixture
def cluster(kind: HomeCluster, config: Path) -> Cluster:
    """The cluster of the first test; made now if that test did not run."""
    return kind.ensure(NAME, config=config, node_image=NODE_IMAGE)


def test_another_home_adopts_the_cluster_and_does_not_delete_it(engine, kind, cluster, homes):
    assert kind.ensure(NAME) == cluster
    other = kind_of(engine, homes / "two")
    assert not other.ensure(NAME).made
    assert other.delete() is None
    assert engine.nodes(NAME)


def test_a_stopped_node_is_started_again(engine, kind, cluster):
    # Not into the creation of a pod: runc freezes its cgroup for a moment then, and with cgroup v1 what is killed
    # while it is frozen never ends.
    kubectl = Kubectl(cluster.kubeconfig)
    for deployment in ("coredns -n kube-system", "local-path-provisioner -n local-path-storage"):
        kubectl("rollout", "status", "--timeout=240s", "deployment", *deployment.split())
    client = docker.from_env()
    client.containers.get(cluster.node).kill()
    client.close()
    assert not engine.nodes(NAME)[0].running

    kind.ensure(NAME)

    assert engine.nodes(NAME)[0].running
    assert "default" in kubectl("get", "namespaces")


@pytest.mark.skipif(not IMAGE_ARCHIVES, reason="this machine has none of the archives that e2e/airgap makes")
def test_an_archive_is_loaded_once(kind, cluster):
    assert kind.load_archive(cluster, IMAGE_ARCHIVES[0])
    assert not kind.load_archive(cluster, IMAGE_ARCHIVES[0])


def test_the_error_of_a_used_port_names_it_and_nothing_is_left(engine, homes):
    late = kind_of(engine, homes / "late")
    with socket.create_server(("127.0.0.1", 12703)):
        try:
            with pytest.raises(HostFault, match=r"127\.0\.0\.1:12703 is in use") as raised:
                late.ensure(f"{NAME}-late", config=shifted(CONFIG, homes, 300), node_image=NODE_IMAGE)
        finally:
            assert late.delete() is None
    assert raised.value.code == "PortTaken"
    assert engine.nodes(f"{NAME}-late") == []


def test_a_cluster_without_the_ports_is_named_and_not_changed(engine, cluster, homes):
    client = docker.from_env()
    labels = {"io.x-k8s.kind.cluster": FOREIGN, "io.x-k8s.kind.role": "control-plane"}
    image = client.containers.get(cluster.node).image
    foreign = client.containers.create(image, name=f"{FOREIGN}-control-plane", labels=labels)
    try:
        with pytest.raises(HostFault, match=f"'{FOREIGN}' has no host ports for workers") as raised:
            kind_of(engine, homes / "three").ensure(FOREIGN)
        assert raised.value.code == "NoWorkerPorts"
        foreign.reload()
        assert foreign.status == "created"
    finally:
        foreign.remove(force=True)
        client.close()


def test_the_cluster_is_deleted_and_nothing_is_left_in_the_home(engine, kind, cluster, homes):
    assert kind.delete() == NAME
    assert engine.nodes(NAME) == []
    assert list((homes / "one").iterdir()) == []
    shutil.rmtree(homes / "one")
    assert kind_of(engine, homes / "two").delete() is None
