"""Carries out faults on a kind cluster: pods, the API server as the appliance sees it, and the network to the pods.

The appliance runs beside the cluster and reaches the API server through a proxy (kind/faults.py), which is what is
cut: the cluster itself is other people's too. Packets to and from pods are dropped on this machine, by rules that are
taken out again at the end whatever happens.
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

from harness import Appliance, alive, eventually
from kind_cluster import e2e_cluster
from worlds import Pods

UP = 60.0
"""Seconds for the appliance to come up: six cuts of the API server, one after the other, would not fill them."""
GONE = 60.0
"""Seconds for everything of a deleted pool, or pod, to go."""
_MARK = ("-m", "comment", "--comment", "bkpool-chaos", "-j", "DROP")


class Beside(Pods):
    """Pods of a cluster whose API server is reached through a proxy."""

    proxy: FaultProxy

    def options(self) -> list[str]:
        return ["--backend", "kubernetes", "--kubeconfig", str(self.proxy.kubeconfig), *self.image]


@contextmanager
def kind_world(base: Path, tools: dict[str, Path]) -> Iterator[tuple[Appliance, KindDamage]]:
    """An appliance beside the tests' cluster, and the means to break both."""
    with e2e_cluster() as cluster, FaultProxy(cluster.kubeconfig, base) as proxy:
        world = Beside(cluster)
        world.proxy = proxy
        appliance = Appliance(base / "appliance", tools, world=world)
        damage = KindDamage(appliance, world)
        with damage.routed():
            try:
                yield appliance, damage
            finally:
                damage.mend_all()
                appliance.down("--now")
                world.clean(appliance)


class KindDamage:
    """A kind cluster and an appliance beside it."""

    def __init__(self, appliance: Appliance, world: Beside) -> None:
        self._appliance = appliance
        self._world = world
        (node,) = world.objects("nodes")
        self._subnet = node["spec"]["podCIDR"]
        self._node = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Pods are reached from this machine by their own addresses."""
        route = (self._subnet, "via", self._node)
        made = subprocess.run(["ip", "route", "add", *route], check=False, capture_output=True).returncode == 0
        try:
            yield
        finally:
            if made:
                subprocess.run(["ip", "route", "del", *route], check=False)

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
        """`bkpool up` until it succeeds, as a supervisor would: it says so and ends where the API server is cut."""
        deadline = time.monotonic() + UP
        while True:
            try:
                self._appliance.up()
                return
            except AssertionError as error:
                if "API server" not in str(error) or time.monotonic() > deadline:
                    raise

    def mend_all(self) -> None:
        """Whatever the driver had no time for."""
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
        yield from (f"the pod {name}, which no worker is" for name in pods - known.keys())

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
        """Drops packets from and to pods (-I), or no longer (-D); returns whether there was such a rule."""
        rules = (("OUTPUT", "-d", self._subnet), ("INPUT", "-s", self._subnet))
        argv = [["iptables", "-w", do, *rule, *_MARK] for rule in rules]
        done = [
            subprocess.run(line, check=False, capture_output=True) for line in argv
        ]  # both, whatever the first says
        return all(one.returncode == 0 for one in done)


def _of_pod(uid: str) -> list[int]:
    """The buildkitd of a pod, as this machine counts processes: its node is a container here."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            group: Any = (entry / "cgroup").read_text()
            ours = uid in group or uid.replace("-", "_") in group
            if ours and (entry / "comm").read_text().strip() == "buildkitd":
                found.append(int(entry.name))
    return found
