"""The node of a fake cluster: it gives pods an address, lets them run, and removes those that are deleted.

It starts no container. It also binds volume claims and calls Deployments available, because their controllers are
missing as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from itertools import count
from typing import Any

from support.fake_kinds import Doc, Refused, Where
from support.fake_objects import FakeObjects, HistoryEntry

NODE = "fake-node"


async def _nothing(_: Doc) -> None:
    pass


class FakeKubelet:
    """Lets pods run.

    Args:
        objects: The content of the cluster.
        network: The first two numbers of the addresses of pods. Those of 127.0.0.0/8 are all on this machine.
        start: Seconds from a pod's creation until it runs.
        run: Called before a pod is said to run.
        ended: Called when a pod has gone.
    """

    def __init__(
        self,
        objects: FakeObjects,
        *,
        network: str = "127.77",
        start: float = 0.0,
        run: Callable[[Doc], Awaitable[None]] = _nothing,
        ended: Callable[[Doc], None] = lambda _: None,
    ) -> None:
        self._objects = objects
        self._network = network
        self._start = start
        self._run = run
        self._ended = ended
        self._numbers = count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        for plural, follow in (("pods", self._pod), ("persistentvolumeclaims", self._claim)):
            objects.collections["v1", plural].listeners.append(follow)
        objects.collections["apps/v1", "deployments"].listeners.append(self._deployment)

    async def close(self) -> None:
        """Stops whatever it has begun."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def next_address(self) -> str:
        """An address that no pod has had."""
        number = next(self._numbers)
        return f"{self._network}.{number // 250}.{number % 250 + 1}"

    def _pod(self, entry: HistoryEntry) -> None:
        doc = entry.new.doc
        if entry.type == "ADDED":
            self._soon(self._began(doc))
        elif entry.type == "DELETED":
            self._ended(doc)
        elif "deletionTimestamp" in doc["metadata"]:
            self._soon(self._removed(doc))

    async def _began(self, pod: Doc) -> None:
        address = self.next_address()
        try:
            self._objects.patch(_where("v1", "pods", pod), {"spec": {"nodeName": NODE}}, "", "kube-scheduler")
        except Refused:  # it has been deleted meanwhile
            return
        await asyncio.sleep(self._start)
        placed = {**pod, "status": {"podIP": address}}
        await self._run(placed)
        self._write_status("v1", "pods", pod, _running(pod, address))

    async def _removed(self, pod: Doc) -> None:
        self._objects.removed_by_node(pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _claim(self, entry: HistoryEntry) -> None:
        if entry.type == "ADDED":
            self._soon(self._settled("v1", "persistentvolumeclaims", entry.new.doc, {"phase": "Bound"}))

    def _deployment(self, entry: HistoryEntry) -> None:
        doc = entry.new.doc
        generation = doc["metadata"]["generation"]
        if entry.type != "DELETED" and doc.get("status", {}).get("observedGeneration") != generation:
            wanted = doc.get("spec", {}).get("replicas", 1)
            status = {"observedGeneration": generation, "replicas": wanted, "availableReplicas": wanted}
            status["conditions"] = [{"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"}]
            self._soon(self._settled("apps/v1", "deployments", doc, status))

    async def _settled(self, api_version: str, plural: str, doc: Doc, status: Doc) -> None:
        self._write_status(api_version, plural, doc, status)

    def _write_status(self, api_version: str, plural: str, doc: Doc, status: Doc) -> None:
        where = _where(api_version, plural, doc, "status")
        try:
            self._objects.replace(where, {"metadata": {"uid": doc["metadata"]["uid"]}, "status": status}, "kubelet")
        except Refused:  # it has been deleted meanwhile
            return

    def _soon(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _where(api_version: str, plural: str, doc: Doc, sub: str = "") -> Where:
    return Where(api_version, plural, doc["metadata"]["namespace"], doc["metadata"]["name"], sub)


def _running(pod: Doc, address: str) -> Doc:
    """The status of a pod whose only container runs."""
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    kinds = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
    container = pod["spec"]["containers"][0] if pod["spec"].get("containers") else {}
    image = container.get("image", "")
    return {
        "phase": "Running",
        "hostIP": "127.0.0.1",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "startTime": at,
        "qosClass": "BestEffort",
        "conditions": [
            {"type": kind, "status": "True", "lastProbeTime": None, "lastTransitionTime": at} for kind in kinds
        ],
        "containerStatuses": [
            {
                "name": container.get("name", ""),
                "image": image,
                "imageID": f"{image}@sha256:{'0' * 64}",
                "containerID": f"containerd://{'0' * 64}",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": at}},
                "lastState": {},
            }
        ],
    }
