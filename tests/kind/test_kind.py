"""The cluster of a home, with a stand-in for kind and for the engine. e2e/kind uses the real ones."""

from __future__ import annotations

import fcntl
import io
import json
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from bkpool.core.errors import BkpoolError, HostFault, InvalidInput
from bkpool.kind import command, lifecycle
from bkpool.kind.command import KindLimits, parse_stage
from bkpool.kind.engine import Node, port_mappings
from bkpool.kind.image_archive import archive_images
from bkpool.kind.lifecycle import HomeCluster
from bkpool.kind.marker import Marker
from bkpool.kind.ports import worker_ports

ROOT = Path(__file__).parents[2]
MAPPED = {6443: ("127.0.0.1", 37789), 12400: ("127.0.0.1", 12400), 12401: ("127.0.0.1", 12401)}


class World:
    """An engine with clusters in it, and a kind program that a test controls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clusters = directory / "clusters"
        self.clusters.mkdir()
        self.calls = directory / "calls"
        self.failure_output = directory / "failure-output"
        self.hanging = directory / "hanging"
        self.reported: list[str] = []
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

    def kind(self, home: str = "home", **options: Any) -> HomeCluster:
        program = self.directory / "kind"
        program.write_text(
            f"""#!/bin/sh
echo "$1 $2" >>{self.calls}
echo "$*" >>{self.directory}/arguments
[ -z "$KUBECONFIG" ] || exit 9
if [ -e {self.directory}/hang-$1 ]; then
  echo half
  touch {self.clusters}/$4
  sleep 99999 &
  echo $$ $! >{self.hanging}.new
  mv {self.hanging}.new {self.hanging}
  wait
fi
case "$1 $2" in
  "create cluster")
    [ ! -e {self.failure_output} ] || {{ cat {self.failure_output}; exit 1; }}
    [ ! -e {self.directory}/die ] || {{ kill -9 $PPID; read line <{self.directory}/go-on; }}
    echo " • Preparing nodes 📦   ..."
    touch {self.clusters}/$4 ;;
  "delete cluster") rm -f {self.clusters}/$4 ;;
  "get kubeconfig") echo "name: $4" ;;
esac
"""
        )
        program.chmod(0o755)
        return HomeCluster(program, self, self.directory / home, self.reported.append, **options)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("KUBECONFIG", "/the/users/own")
    monkeypatch.setattr(lifecycle, "await_api_server", lambda name, kubeconfig, timeout: None)
    return World(tmp_path)


def test_the_cluster_is_created_once_and_adopted_later(world):
    first = world.kind().ensure("bkpool")
    assert (first.made, first.worker_ports, first.node) == (True, (12400, 12401), "bkpool-control-plane")
    assert "cluster bkpool: preparing nodes" in world.reported
    assert first.kubeconfig.read_text() == "name: bkpool\n"
    assert stat.S_IMODE(first.kubeconfig.stat().st_mode) == 0o600
    assert world.kind().ensure("bkpool") == first
    assert world.called().count("create cluster") == 1


def test_a_cluster_gets_the_time_that_is_asked_for(world, monkeypatch):
    waited = []
    monkeypatch.setattr(lifecycle, "await_api_server", lambda name, kubeconfig, timeout: waited.append(timeout))
    world.kind(ready_timeout=timedelta(minutes=7)).ensure("bkpool")
    assert "--wait 7m" in (world.directory / "arguments").read_text()
    assert waited == [timedelta(minutes=7)]


def test_another_home_adopts_the_cluster_and_never_deletes_it(world):
    world.kind("one").ensure("bkpool")
    assert not world.kind("two").ensure("bkpool").made
    assert world.kind("two").delete() is None
    assert world.nodes("bkpool")
    assert world.kind("one").delete() == "bkpool"
    assert not world.nodes("bkpool")
    assert list((world.directory / "one").iterdir()) == []
    assert world.kind("one").delete() is None


def test_the_rest_of_an_interrupted_start_is_removed_first(world):
    (world.directory / "home").mkdir(mode=0o700)
    Marker("bkpool", "creating", made=True).write(world.directory / "home")
    (world.clusters / "bkpool").touch()
    assert world.kind().ensure("bkpool").made
    assert world.called()[:2] == ["delete cluster", "create cluster"]


def test_a_cluster_that_somebody_deleted_is_created_again(world):
    world.kind().ensure("bkpool")
    (world.clusters / "bkpool").unlink()
    assert world.kind().ensure("bkpool").made
    assert world.called().count("create cluster") == 2


def test_a_home_refuses_a_second_cluster(world):
    world.kind().ensure("bkpool")
    with pytest.raises(HostFault, match=r"^BKPOOL_KIND_CLUSTER: .* has the cluster 'bkpool', not 'other'") as raised:
        world.kind().ensure("other", where="BKPOOL_KIND_CLUSTER")
    assert raised.value.code == "OtherCluster"


def test_a_stopped_node_is_started(world):
    world.kind().ensure("bkpool")
    world.stopped = True
    world.kind().ensure("bkpool")
    assert world.started == ["bkpool-control-plane"]


def test_a_foreign_cluster_without_worker_ports_is_refused_and_not_touched(world):
    (world.clusters / "bkpool").touch()
    world.ports = {6443: ("127.0.0.1", 37789), 80: ("127.0.0.1", 80)}
    with pytest.raises(HostFault, match=r"^--cluster: .*'bkpool' has no host ports for workers") as raised:
        world.kind().ensure("bkpool")
    assert "kind delete cluster --name bkpool" in raised.value.hint
    assert world.called() == []
    assert not (world.directory / "home" / "kind.json").exists()


@pytest.mark.parametrize(
    ("output", "code", "message"),
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
def test_an_error_of_kind_shows_the_end_of_its_output(world, output, code, message):
    world.failure_output.write_text(output)
    with pytest.raises(HostFault, match=message) as raised:
        world.kind().ensure("bkpool")
    assert raised.value.code == code
    assert Marker.read(world.directory / "home") is None


@pytest.mark.parametrize("name", ["", "-x", "UPPER", "a b", "a" * 51, "x;y"])
def test_a_bad_name_is_refused_before_kind_is_called(world, name):
    with pytest.raises(InvalidInput, match="--cluster"):
        world.kind().ensure(name)
    assert world.called() == []


def test_nothing_is_deleted_if_the_marker_is_damaged(world):
    home = world.directory / "home"
    home.mkdir(mode=0o700)
    (home / "kind.json").write_text("{")
    for act in (lambda: world.kind().ensure("bkpool"), world.kind().delete):
        with pytest.raises(HostFault, match=r"kind\.json: is damaged"):
            act()


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}/exe").exists()


@pytest.fixture
def hours_later(world, monkeypatch):
    """As soon as kind hangs, hours have gone by."""

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return time.monotonic() + 36_000 * world.hanging.exists()

    monkeypatch.setattr(command, "time", Clock)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("create", "`kind create cluster --name bkpool .*` has not ended after 32m, its last line: half"),
        ("get", "`kind get kubeconfig --name bkpool` has not ended after 1m"),
        ("load", "`kind load docker-image there:1 --name bkpool` has not ended after 30m"),
        ("delete", "`kind delete cluster --name bkpool .*` has not ended after 5m"),
    ],
)
@pytest.mark.usefixtures("hours_later")
def test_a_kind_that_hangs_is_ended_with_what_it_started(world, action, says):
    cluster = world.kind().ensure("bkpool") if action in {"load", "delete"} else None
    (world.directory / f"hang-{action}").touch()
    kind = world.kind()
    work = {"load": lambda: kind.load_image(cluster, "there:1"), "delete": kind.delete}
    with pytest.raises(HostFault, match=says) as raised:
        work.get(action, lambda: kind.ensure("bkpool"))()
    assert "docker ps" in raised.value.hint
    left = [int(pid) for pid in world.hanging.read_text().split()]
    deadline = time.monotonic() + 30
    while any(map(runs, left)) and time.monotonic() < deadline:  # they were killed; the kernel takes a moment
        time.sleep(0.01)
    assert [pid for pid in left if runs(pid)] == []


@pytest.mark.usefixtures("hours_later")
def test_what_a_kind_that_was_ended_has_left_is_removed_by_the_next_start(world):
    (world.directory / "hang-create").touch()
    with pytest.raises(HostFault, match="has not ended"):
        world.kind().ensure("bkpool")
    for file in (world.directory / "hang-create", world.hanging, world.calls):
        file.unlink()
    assert world.kind().ensure("bkpool").made
    assert world.called()[:2] == ["delete cluster", "create cluster"]


def test_the_wait_for_the_kind_of_an_earlier_start_has_an_end(world):
    home = world.directory / "home"
    home.mkdir(mode=0o700)
    with (home / "kind.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kind = world.kind(limits=KindLimits(create=0.0), ready_timeout=timedelta(seconds=1))
        with pytest.raises(
            HostFault, match=r"kind of an earlier start has not ended after 1s: it holds .*kind\.lock"
        ):
            kind.ensure("bkpool")
    assert world.called() == []


def test_stages_are_reported_without_emoji():
    assert parse_stage(" • Ensuring node image (kindest/node:v1.35.0) 🖼  ...\n", "b") == (
        "cluster b: ensuring node image (kindest/node:v1.35.0)"
    )
    assert parse_stage(" • Waiting ≤ 2m0s for control-plane = Ready ⏳  ...\n", "b") == (
        "cluster b: waiting ≤ 2m0s for control-plane = Ready"
    )
    assert parse_stage(" ✓ Preparing nodes 📦 \n", "b") is None
    assert parse_stage("Have a nice day! 👋\n", "b") is None


def test_worker_ports_are_in_the_range_and_the_same_on_both_sides():
    assert worker_ports(
        {80: ("", 80), 12400: ("", 12401), 12403: ("127.0.0.1", 12403), 12402: ("127.0.0.1", 12402)}
    ) == (12402, 12403)


def test_port_mappings_are_read_from_an_inspection():
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


def test_the_configuration_equals_the_one_of_the_checkout_and_binds_workers_to_loopback():
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


def test_an_archive_is_loaded_only_if_the_node_lacks_its_image(world, archive):
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


def test_an_image_that_the_engine_lacks_is_not_loaded(world):
    cluster = world.kind().ensure("bkpool")
    assert not world.kind().load_image(cluster, "moby/buildkit:v9")
    assert world.kind().load_image(cluster, "there:1")
    assert world.called().count("load docker-image") == 1


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_the_error_names_a_file_that_is_not_an_archive(tmp_path, content):
    path = tmp_path / "image.tar"
    if content:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"--image-archive: .*image\.tar"):
        archive_images(path, "--image-archive")


@pytest.mark.slow
def test_a_start_waits_for_the_kind_program_of_a_killed_appliance(world):
    """The stand-in kills its parent, as the kernel might, and continues for a while with the inherited lock."""
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
test_kind.HomeCluster(Path({str(program)!r}), world, world.directory / "home", lambda text: None).ensure("bkpool")
"""
    )
    assert subprocess.run([sys.executable, script], check=False).returncode == -9
    (world.directory / "die").unlink()
    assert Marker.read(world.directory / "home") == Marker("bkpool", "creating", made=True)

    def report(text: str) -> None:
        world.reported.append(text)
        if "waiting for the kind" in text:
            go_on.write_text("\n")

    assert HomeCluster(program, world, world.directory / "home", report).ensure("bkpool").made
    assert "waiting for the kind of an earlier start to end" in world.reported
    assert world.called() == ["create cluster", "delete cluster", "create cluster", "get kubeconfig"]


def test_a_missing_kind_program_is_a_bkpool_error(world):
    with pytest.raises(BkpoolError):
        HomeCluster(world.directory / "no-such-kind", world, world.directory / "home", print).ensure("bkpool")
