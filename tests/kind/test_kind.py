"""What a home does about its cluster, with a stand-in for kind and for the engine; e2e/kind has the real ones."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from bkpool.core.errors import BkpoolError, HostFault, InvalidInput
from bkpool.kind import lifecycle
from bkpool.kind.engine import Node, port_mappings
from bkpool.kind.lifecycle import Kind, Marker, archive_images, stage, worker_ports

ROOT = Path(__file__).parents[2]
MAPPED = {6443: ("127.0.0.1", 37789), 12400: ("127.0.0.1", 12400), 12401: ("127.0.0.1", 12401)}


class World:
    """An engine with clusters in it, and a kind that does as it is told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clusters = directory / "clusters"
        self.clusters.mkdir()
        self.calls = directory / "calls"
        self.says = directory / "says"
        self.told: list[str] = []
        self.started: list[str] = []
        self.ports = MAPPED
        self.stopped = False

    def nodes(self, name: str) -> list[Node]:
        if not (self.clusters / name).exists():
            return []
        return [Node(f"{name}-control-plane", "control-plane", not self.stopped, self.ports)]

    def start(self, node: str) -> None:
        self.started.append(node)

    def run(self, node: str, command: list[str]) -> str | None:
        assert command[:2] == ["crictl", "inspecti"]
        return json.dumps({"status": {"id": "sha256:aa"}}) if command[2] == "there:1" else None

    def has_image(self, reference: str) -> bool:
        return reference == "there:1"

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def kind(self, home: str = "home") -> Kind:
        program = self.directory / "kind"
        program.write_text(
            f"""#!/bin/sh
echo "$1 $2" >>{self.calls}
[ -z "$KUBECONFIG" ] || exit 9
case "$1 $2" in
  "create cluster")
    [ ! -e {self.says} ] || {{ cat {self.says}; exit 1; }}
    [ ! -e {self.directory}/die ] || {{ kill -9 $PPID; read line <{self.directory}/go-on; }}
    echo " • Preparing nodes 📦   ..."
    touch {self.clusters}/$4 ;;
  "delete cluster") rm -f {self.clusters}/$4 ;;
  "get kubeconfig") echo "name: $4" ;;
esac
"""
        )
        program.chmod(0o755)
        return Kind(program, self, self.directory / home, lambda told: self.told.append(told["progress"]))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("KUBECONFIG", "/the/users/own")
    monkeypatch.setattr(lifecycle, "_await_api", lambda name, kubeconfig: None)
    return World(tmp_path)


def test_it_is_made_once_and_adopted_afterwards(world):
    first = world.kind().ensure("bkpool")
    assert (first.made, first.worker_ports, first.node) == (True, (12400, 12401), "bkpool-control-plane")
    assert "cluster bkpool: preparing nodes" in world.told
    assert first.kubeconfig.read_text() == "name: bkpool\n"
    assert stat.S_IMODE(first.kubeconfig.stat().st_mode) == 0o600
    assert world.kind().ensure("bkpool") == first
    assert world.called().count("create cluster") == 1


def test_another_home_adopts_it_and_never_deletes_it(world):
    world.kind("one").ensure("bkpool")
    assert not world.kind("two").ensure("bkpool").made
    assert world.kind("two").delete() is None
    assert world.nodes("bkpool")
    assert world.kind("one").delete() == "bkpool"
    assert not world.nodes("bkpool")
    assert list((world.directory / "one").iterdir()) == []
    assert world.kind("one").delete() is None


def test_what_an_interrupted_start_left_is_removed_first(world):
    (world.directory / "home").mkdir(mode=0o700)
    Marker("bkpool", "creating", made=True).write(world.directory / "home")
    (world.clusters / "bkpool").touch()
    assert world.kind().ensure("bkpool").made
    assert world.called()[:2] == ["delete cluster", "create cluster"]


def test_a_cluster_that_somebody_deleted_is_made_again(world):
    world.kind().ensure("bkpool")
    (world.clusters / "bkpool").unlink()
    assert world.kind().ensure("bkpool").made
    assert world.called().count("create cluster") == 2


def test_a_home_keeps_to_its_cluster(world):
    world.kind().ensure("bkpool")
    with pytest.raises(HostFault, match="has the cluster 'bkpool', not 'other'") as raised:
        world.kind().ensure("other")
    assert raised.value.code == "OtherCluster"


def test_a_stopped_node_is_started(world):
    world.kind().ensure("bkpool")
    world.stopped = True
    world.kind().ensure("bkpool")
    assert world.started == ["bkpool-control-plane"]


def test_a_cluster_of_somebody_else_without_the_ports_is_named_and_left_alone(world):
    (world.clusters / "bkpool").touch()
    world.ports = {6443: ("127.0.0.1", 37789), 80: ("127.0.0.1", 80)}
    with pytest.raises(HostFault, match="'bkpool' has no host ports for workers") as raised:
        world.kind().ensure("bkpool")
    assert "kind delete cluster --name bkpool" in raised.value.hint
    assert world.called() == []
    assert not (world.directory / "home" / "kind.json").exists()


@pytest.mark.parametrize(
    ("said", "code", "message"),
    [
        (
            "ERROR: failed to create cluster\ndocker: Bind for 127.0.0.1:12407 failed: port is already allocated.",
            "PortTaken",
            "127.0.0.1:12407 is in use",
        ),
        (
            "Error starting userland proxy: listen tcp4 127.0.0.1:12400: bind: address already in use.",
            "PortTaken",
            "127.0.0.1:12400 is in use",
        ),
        ("write /var/lib/docker/x: no space left on device", "DiskFull", "no space left"),
        ('ERROR: failed to pull image "kindest/node:v1"\nlast words', "HostFault", "kindest/node.*last words"),
    ],
)
def test_what_kind_says_becomes_a_fault_with_its_own_words(world, said, code, message):
    world.says.write_text(said)
    with pytest.raises(HostFault, match=message) as raised:
        world.kind().ensure("bkpool")
    assert raised.value.code == code
    assert Marker.read(world.directory / "home") is None


@pytest.mark.parametrize("name", ["", "-x", "UPPER", "a b", "a" * 51, "x;y"])
def test_a_bad_name_is_refused_before_anything_is_done(world, name):
    with pytest.raises(InvalidInput, match="--cluster"):
        world.kind().ensure(name)
    assert world.called() == []


def test_a_damaged_marker_is_no_reason_to_delete_anything(world):
    home = world.directory / "home"
    home.mkdir(mode=0o700)
    (home / "kind.json").write_text("{")
    for act in (lambda: world.kind().ensure("bkpool"), world.kind().delete):
        with pytest.raises(HostFault, match=r"kind\.json: is damaged"):
            act()


def test_stages_are_told_without_their_pictures():
    assert stage(" • Ensuring node image (kindest/node:v1.35.0) 🖼  ...\n", "b") == (
        "cluster b: ensuring node image (kindest/node:v1.35.0)"
    )
    assert stage(" • Waiting ≤ 2m0s for control-plane = Ready ⏳  ...\n", "b") == (
        "cluster b: waiting ≤ 2m0s for control-plane = Ready"
    )
    assert stage(" ✓ Preparing nodes 📦 \n", "b") is None
    assert stage("Have a nice day! 👋\n", "b") is None


def test_only_ports_of_the_range_that_are_the_same_on_both_sides_are_for_workers():
    assert worker_ports(
        {80: ("", 80), 12400: ("", 12401), 12403: ("127.0.0.1", 12403), 12402: ("127.0.0.1", 12402)}
    ) == (12402, 12403)


def test_mappings_are_read_from_what_the_engine_tells():
    bindings = {
        "12400/tcp": [{"HostIp": "127.0.0.1", "HostPort": "12400"}],
        "53/udp": [{"HostIp": "", "HostPort": "53"}],
        "6443/tcp": [{"HostIp": "127.0.0.1", "HostPort": "37789"}],
        "9/tcp": None,
    }
    assert port_mappings({"HostConfig": {"PortBindings": bindings}}) == {
        12400: ("127.0.0.1", 12400),
        6443: ("127.0.0.1", 37789),
    }
    assert port_mappings({"HostConfig": {"PortBindings": None}}) == {}


def test_the_configuration_is_the_one_at_the_top_and_binds_workers_to_loopback():
    assert lifecycle.CONFIG.read_bytes() == (ROOT / "kind-config.yaml").read_bytes()
    (node,) = yaml.safe_load(lifecycle.CONFIG.read_text())["nodes"]
    mappings = {
        each["containerPort"]: (each["listenAddress"], each["hostPort"]) for each in node["extraPortMappings"]
    }
    assert {address for address, _ in mappings.values()} == {"127.0.0.1"}
    assert worker_ports(mappings) == tuple(range(12400, 12432))


@pytest.fixture
def archive(tmp_path: Path) -> Callable[..., Path]:
    def make(**members: bytes) -> Path:
        path = tmp_path / "image.tar"
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name.replace("_", "."))
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make


def test_an_archive_is_loaded_only_where_its_image_is_not_there_yet(world, archive):
    cluster = world.kind().ensure("bkpool")

    def manifest(tag: str, config: str) -> Path:
        return archive(manifest_json=json.dumps([{"Config": config, "RepoTags": [tag], "Layers": []}]).encode())

    kind_of_home = world.kind()
    assert not kind_of_home.load_archive(cluster, manifest("there:1", "aa.json"))
    assert not kind_of_home.load_archive(cluster, manifest("there:1", "blobs/sha256/aa"))
    assert kind_of_home.load_archive(cluster, manifest("there:1", "bb.json"))
    assert kind_of_home.load_archive(cluster, manifest("other:1", "aa.json"))
    assert kind_of_home.load_archive(cluster, archive(index_json=b"{}"))
    assert world.called().count("load image-archive") == 3


def test_an_image_that_the_engine_lacks_is_left_to_the_node(world):
    cluster = world.kind().ensure("bkpool")
    assert not world.kind().load_image(cluster, "moby/buildkit:v9")
    assert world.kind().load_image(cluster, "there:1")
    assert world.called().count("load docker-image") == 1


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_what_is_no_archive_is_named(tmp_path, content):
    path = tmp_path / "image.tar"
    if content:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"--image-archive: .*image\.tar"):
        archive_images(path)


def test_who_comes_after_a_killed_appliance_waits_for_its_kind(world):
    """The stand-in kills its parent, as the kernel might, and goes on for a while with the lock in its hands."""
    (world.directory / "die").touch()
    go_on = world.directory / "go-on"
    subprocess.run(["mkfifo", go_on], check=True)
    script = world.directory / "up.py"
    program = world.directory / "kind"
    world.kind()
    script.write_text(
        f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "kind")!r}]
from pathlib import Path
import test_kind
world = object.__new__(test_kind.World)
world.directory = Path({str(world.directory)!r}); world.clusters = world.directory / "clusters"
test_kind.Kind(Path({str(program)!r}), world, world.directory / "home", lambda told: None).ensure("bkpool")
"""
    )
    assert subprocess.run([sys.executable, script], check=False).returncode == -9
    (world.directory / "die").unlink()
    assert Marker.read(world.directory / "home") == Marker("bkpool", "creating", made=True)

    def told(what: dict) -> None:
        world.told.append(what["progress"])
        if "waiting for the kind" in what["progress"]:
            go_on.write_text("\n")

    assert Kind(program, world, world.directory / "home", told).ensure("bkpool").made
    assert "waiting for the kind of an earlier start to end" in world.told
    assert world.called() == ["create cluster", "delete cluster", "create cluster", "get kubeconfig"]


def test_faults_are_faults(world):
    with pytest.raises(BkpoolError):
        Kind(world.directory / "no-such-kind", world, world.directory / "home", print).ensure("bkpool")
