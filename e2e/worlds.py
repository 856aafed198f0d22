"""The backends for the end-to-end tests: one `harness.World` for processes and one for pods.

A test that needs more than `World` offers works on one backend only, and is marked with `only_on("process", why)`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bkpool.home.runtime_directory import home_digest
from bkpool.pki import storage
from bkpool.pki.authority import Authority
from harness import Appliance, do_all, eventually
from kind_cluster import E2eCluster, Kubectl

SYSTEM = "buildkit-system"


class Processes:
    """Workers that are processes of this machine."""

    name = "process"
    registry_address = "127.0.0.1"

    def options(self) -> list[str]:
        return ["--backend", "process"]

    def workers(self, appliance: Appliance) -> list[int]:
        named = {pid for pid in appliance.daemons() if _name(pid).startswith("buildkitd")}
        # A child that it has just forked has its name until it runs another program.
        return sorted(pid for pid in named if _parent(pid) not in named)

    def kill_worker(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)

    def trusting(self, registry: str) -> dict[str, Any]:
        # BuildKit uses plain HTTP for loopback by default.
        return {"networking": {"hostPorts": [int(registry.rpartition(":")[2])]}}

    def authority(self, appliance: Appliance) -> Authority:
        return storage.load_or_create(appliance.home / "pki", datetime.now(UTC)).authority

    def clean(self, appliance: Appliance) -> None:
        left = appliance.daemons()
        cgroups = _cgroups(appliance.home)
        if not left:
            shutil.rmtree(appliance.home, ignore_errors=True)  # quicker than the command
        if appliance.home.exists():  # it is on a disk of its own, or has files of a user's other ids
            appliance.down("--purge")
        assert left == [], "processes of a worker were still running after `down`"
        assert cgroups == [], "cgroups of workers were left after `down`"


@dataclass
class Pods:
    """Workers that are pods of a kind cluster.

    All tests of a run share it, but only one test at a time has pools in it.
    """

    cluster: E2eCluster
    name: str = "kind"

    def __post_init__(self) -> None:
        self.registry_address = self.cluster.host_address
        self.kubectl = Kubectl(self.cluster.kubeconfig)
        self.image = ["--buildkit-image", self.cluster.buildkit_image] if self.cluster.buildkit_image else []

    def options(self) -> list[str]:
        return ["--backend", "kind", "--cluster", self.cluster.name, *self.image]

    def objects(self, *what: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", *what, "-o", "json"))["items"]
        return items

    def pods(self) -> list[dict[str, Any]]:
        return self.objects("pods", "-A", "-l", "buildkit.smrt-devops.net/purpose=worker")

    def workers(self, appliance: Appliance) -> list[tuple[str, str]]:
        return sorted(
            (pod["metadata"]["name"], pod["metadata"]["uid"])
            for pod in self.pods()
            if pod["status"]["phase"] in {"Pending", "Running"} and "deletionTimestamp" not in pod["metadata"]
        )

    def kill_worker(self, worker: tuple[str, str]) -> None:
        script = "for p in /proc/[0-9]*; do read -r c <$p/comm; [ $c = buildkitd ] && kill -9 ${p#/proc/}; done; true"
        self.kubectl("exec", worker[0], "--", "sh", "-c", script, check=False)

    def trusting(self, registry: str) -> dict[str, Any]:
        return {"buildkitConfig": f'[registry."{registry}"]\nhttp = true\n'}

    def authority(self, appliance: Appliance) -> Authority:
        secret = json.loads(self.kubectl("-n", SYSTEM, "get", "secret", "bkpool-pki", "-o", "json"))["data"]
        return Authority(base64.b64decode(secret["ca.crt"]), base64.b64decode(secret["ca.key"]))

    def clean(self, appliance: Appliance) -> None:
        """Removes the pools and all their objects. The cluster stays for the next test."""
        do_all(self.empty, lambda: shutil.rmtree(appliance.home, ignore_errors=True))

    def empty(self) -> None:
        """Removes all pools, issuers, workers and their objects. No appliance may run. Fails if a worker stays."""
        labelled = ("-A", "-l", "app.kubernetes.io/managed-by=bkpool", "--grace-period=1", "--timeout=120s")
        # The keys of the appliance have no label. The next test adopts them.
        ours = (*labelled, "--field-selector=metadata.namespace!=" + SYSTEM)
        kinds = ("pods", "pvc", "secrets", "configmaps")
        do_all(
            partial(self.kubectl, "delete", "buildkitpools,buildkitoidcconfigs", "-A", "--all", "--wait=false"),
            partial(self.kubectl, "delete", "buildkitworkers", "-A", "--all", "--wait=false"),
            partial(eventually, self._no_worker_is_left, "all workers are removed; does an appliance still run?"),
            *(partial(self.kubectl, "delete", kind, *ours, check=False) for kind in kinds),
        )

    def _no_worker_is_left(self) -> bool:
        """Whether there is no worker. Takes off the finalizers of those that are left."""
        left = self.objects("buildkitworkers", "-A")
        for worker in left:
            metadata = worker["metadata"]
            patch = ("-p", '{"metadata":{"finalizers":null}}', "--type=merge")
            if metadata.get("finalizers"):
                self.kubectl(
                    "-n", metadata["namespace"], "patch", "buildkitworker", metadata["name"], *patch, check=False
                )
        return not left


def _cgroups(home: Path) -> list[str]:
    name = f"bkpool-{home_digest(home)}"
    return [f"{top}/{name}" for top, names, _ in os.walk("/sys/fs/cgroup") if name in names]


def _parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""
