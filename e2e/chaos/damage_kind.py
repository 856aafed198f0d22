"""Carries out faults on a kind cluster: pods, the API server as the appliance sees it, and the network to the pods.

The appliance runs outside the cluster and reaches the API server through a proxy (kind/faults.py). Only the proxy is
cut, because other tests use the cluster too. Packets to and from pods are dropped on this machine by rules, which are
always removed at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chaos.damage import end_appliance, resume
from chaos.schedule import Fault
from kind.faults import FaultProxy
from kind.pod_route import routed_pods

from harness import Appliance, alive, eventually
from kind_cluster import e2e_cluster
from worlds import Pods

UP = 60.0
"""Seconds until the appliance must be up. They are longer than six cuts of the API server in a row."""
GONE = 60.0
"""Seconds until all objects of a deleted pool or pod must be gone."""
_MARK = ("-m", "comment", "--comment", "bkpool-chaos", "-j", "DROP")


class ProxiedPods(Pods):
    """Pods of a cluster. The appliance reaches its API server through a proxy."""

    proxy: FaultProxy

    def options(self) -> list[str]:
        return ["--backend", "kubernetes", "--kubeconfig", str(self.proxy.kubeconfig), *self.image]


@contextmanager
def kind_world(base: Path, tools: dict[str, Path]) -> Iterator[tuple[Appliance, KindDamage]]:
    """Starts an appliance outside the tests' cluster. Yields it and the object that breaks both."""
    with e2e_cluster() as cluster, FaultProxy(cluster.kubeconfig, base) as proxy:
        world = ProxiedPods(cluster)
        world.proxy = proxy
        appliance = Appliance(base / "appliance", tools, world=world)
        with routed_pods(world) as subnet:
            damage = KindDamage(appliance, world, subnet)
            damage.mend_all()  # the rules of a run that was killed
            try:
                yield appliance, damage
            finally:
                damage.mend_all()
                appliance.down("--now")
                world.clean(appliance)


class KindDamage:
    """Faults of a kind cluster and of an appliance outside it."""

    def __init__(self, appliance: Appliance, world: ProxiedPods, subnet: str) -> None:
        self._appliance = appliance
        self._world = world
        self._subnet = subnet

    def workers(self) -> dict[str, tuple[str, str]]:
        return {worker[0]: worker for worker in self._world.workers(self._appliance)}

    def do(self, fault: Fault, victim: str) -> Callable[[], None]:
        if fault.lane == "appliance":
            end_appliance(self._appliance, fault.kind)
            return self._up
        proxy = self._world.proxy
        match fault.kind:
            case "cut-api":
                proxy.down()
                return proxy.up
            case "freeze-watches":
                proxy.frozen = True
                return lambda: setattr(proxy, "frozen", False)
            case "expire-watches":
                proxy.expire_watches()
            case "cut-pods":
                self._packets("-I")
                return lambda: self._packets("-D")
            case _:
                return self._to_pod(fault.kind, victim)
        return lambda: None

    def _to_pod(self, kind: str, name: str) -> Callable[[], None]:
        pids = _of_pod(self.workers().get(name, (name, "no such pod"))[1])
        if kind == "delete-pod":
            force = ("--grace-period=0", "--force", "--wait=false", "--ignore-not-found")
            self._world.kubectl("delete", "pod", name, *force)
            eventually(lambda: not any(map(alive, pids)), "the kubelet has killed the pod's buildkitd", GONE)
            return lambda: None
        number = signal.SIGKILL if kind == "kill-worker" else signal.SIGSTOP
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return lambda: [resume(pid) for pid in pids if kind == "stop-worker"]

    def _up(self) -> None:
        """Repeats `bkpool up` until it succeeds, as a supervisor would. It fails while the API server is cut."""
        deadline = time.monotonic() + UP
        while True:
            try:
                self._appliance.up()
                return
            except AssertionError as error:
                if "API server" not in str(error) or time.monotonic() > deadline:
                    raise

    def mend_all(self) -> None:
        """Undoes all faults that the driver has not undone yet."""
        self._world.proxy.up()
        self._world.proxy.frozen = False
        while self._packets("-D"):
            pass

    def left_over(self) -> Iterator[str]:
        known = {worker["metadata"]["name"]: worker for worker in self._world.objects("buildkitworkers", "-A")}
        for name, worker in known.items():
            if worker["spec"].get("allocation"):
                yield f"a lease on {name}"
        pods = {pod["metadata"]["name"] for pod in self._world.pods()}
        yield from (f"the pod {name}, which is no worker" for name in pods - known.keys())

    def left_behind(self) -> Iterator[str]:
        kubectl = self._world.kubectl
        kubectl("delete", "buildkitpools", "--all", "--wait=false")
        kinds = ("buildkitworkers", "pods", "pvc", "secrets")
        ours = ("-n", "default", "-l", "app.kubernetes.io/managed-by=bkpool", "--no-headers")
        with suppress(AssertionError):
            eventually(lambda: not kubectl("get", ",".join(kinds), *ours), "the pool is gone", timeout=GONE)
        yield from kubectl("get", ",".join(kinds), *ours, "-o", "name").splitlines()
        self._appliance.down("--now").ok()

    def _packets(self, do: str) -> bool:
        """Adds (-I) or removes (-D) the rules that drop packets from and to pods.

        Returns whether one of the two commands succeeded.
        """
        rules = (("OUTPUT", "-d", self._subnet), ("INPUT", "-s", self._subnet))
        argv = [["iptables", "-w", do, *rule, *_MARK] for rule in rules]
        done = [
            subprocess.run(line, check=False, capture_output=True) for line in argv
        ]  # both, also if the first one fails
        return any(one.returncode == 0 for one in done)


def _of_pod(uid: str) -> list[int]:
    """Returns the process ids of a pod's buildkitd on this machine. The node is a container here."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            group: Any = (entry / "cgroup").read_text()
            ours = uid in group or uid.replace("-", "_") in group
            if ours and (entry / "comm").read_text().strip() == "buildkitd":
                found.append(int(entry.name))
    return found
