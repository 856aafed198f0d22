"""The kind cluster of the end-to-end tests, with another name and other host ports than a user's.

`nox -s kind` lets pytest-kind make it (e2e/adoption), and bkpool adopts it. In a single run of pytest, bkpool makes
it. A cluster named `bkpool` may run at the same time. If no image can be pulled, e2e/airgap/up makes the images, and
its environment file (sourced by scripts/test) names them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import docker
import yaml

from bkpool.kind.engine import Engine
from bkpool.kind.lifecycle import CONFIG, HomeCluster
from bkpool.toolchain import Tool, Toolchain, default_cache

NAME = "bkpool-e2e"
SHIFT = 100
"""The difference between the host ports of the tests' cluster and those of kind-config.yaml."""
NODE_IMAGE = os.environ.get("BKPOOL_E2E_NODE_IMAGE") or None
BUILDKIT_IMAGE = os.environ.get("BKPOOL_E2E_BUILDKIT_IMAGE") or None
"""None for the default of bkpool, which the node pulls."""
IMAGE_ARCHIVES = tuple(Path(file) for file in os.environ.get("BKPOOL_E2E_IMAGE_ARCHIVE", "").split(":") if file)
KUBECTL_TIMEOUT = 300.0
"""Seconds for one command of kubectl: longer than any `--timeout` of the tests, which says better what is missing."""
KEEP = bool(os.environ.get("BKPOOL_E2E_KEEP"))
"""Whether the cluster stays for the next run, which then adopts it."""


def shifted(config: Path, directory: Path, by: int = SHIFT) -> Path:
    """Writes a copy of a kind configuration with other host ports. Returns its path."""
    document = yaml.safe_load(config.read_text())
    for node in document["nodes"]:
        for mapping in node["extraPortMappings"]:
            mapping["containerPort"] = mapping["hostPort"] = mapping["hostPort"] + by
    made = directory / f"kind-config-{by}.yaml"
    made.write_text(yaml.safe_dump(document))
    return made


def kind_of(engine: Engine, home: Path) -> HomeCluster:
    """Returns the life cycle under test for one home. It reports its progress on stderr."""
    return HomeCluster(
        Toolchain(default_cache()).ensure(Tool.KIND),
        engine,
        home,
        lambda text: print(text, file=sys.stderr),
    )


@dataclass(frozen=True)
class E2eCluster:
    """What a test needs to know about its cluster."""

    name: str
    kubeconfig: Path
    worker_ports: tuple[int, ...]
    node: str
    host_address: str
    """The address of this machine as seen from the cluster."""
    buildkit_image: str | None = BUILDKIT_IMAGE


@contextmanager
def e2e_cluster() -> Iterator[E2eCluster]:
    """Yields the cluster of the tests with their images loaded.

    Concurrent runs share it. The last one deletes it, unless BKPOOL_E2E_KEEP is set.
    """
    home = default_cache() / "e2e" / "kind"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with Engine.connect() as engine:
            kind = kind_of(engine, home)
            cluster = kind.ensure(NAME, config=shifted(CONFIG, home), node_image=NODE_IMAGE)
            for archive in IMAGE_ARCHIVES:
                kind.load_archive(cluster, archive)
        yield E2eCluster(
            cluster.name, cluster.kubeconfig, cluster.worker_ports, cluster.node, _gateway_of(cluster.node)
        )
        if not KEEP and _alone(users):
            with Engine.connect() as engine:
                kind = kind_of(engine, home)
                if kind.delete() is None:  # e2e/adoption made it, and bkpool deletes no cluster that it adopted
                    program = Toolchain(default_cache()).ensure(Tool.KIND)
                    # Without the option kind looks into the user's own kubeconfig.
                    options = ("--name", NAME, "--kubeconfig", str(home / "kubeconfig"))
                    subprocess.run([program, "delete", "cluster", *options], check=True)


def _alone(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _gateway_of(node: str) -> str:
    client = docker.from_env()
    (network,) = client.containers.get(node).attrs["NetworkSettings"]["Networks"].values()
    client.close()
    return str(network["Gateway"])


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one cluster. It ignores KUBECONFIG of the user."""

    kubeconfig: Path

    def __call__(
        self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = KUBECTL_TIMEOUT
    ) -> str:
        """Runs kubectl and returns its standard output; without `check` also if it fails or does not end."""
        program = shutil.which("kubectl")
        assert program, "the tests on kind need kubectl on PATH"
        try:
            done = subprocess.run(
                [program, "--kubeconfig", self.kubeconfig, *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            assert not check, f"kubectl {' '.join(arguments)}: it has not ended within {timeout:g} s"
            return ""
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout
