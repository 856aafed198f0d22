"""The kind cluster of one home: created once, adopted later, deleted only by the home that created it.

The `kind` tool does the work; this module knows which cluster belongs to the home and what an interrupted start left.
Other clusters, the user's own kubeconfig and its current context are never touched: kind always gets a file of the
home.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO

from bkpool.core import durations
from bkpool.core.errors import HostFault, InvalidInput
from bkpool.home.files import as_host_fault, private_directory, write_private
from bkpool.kind.api_server import await_api_server
from bkpool.kind.command import USUAL_LIMITS, KindHangs, KindLimits, ReportText, run_kind, run_kind_in_stages
from bkpool.kind.engine import Engine, Node
from bkpool.kind.image_archive import archive_images
from bkpool.kind.marker import Marker, kubeconfig_of
from bkpool.kind.ports import entry_node, worker_ports

CONFIG = Path(__file__).with_name("kind-config.yaml")
"""The configuration that clusters are created with; the same as the file at the top of the checkout."""

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,49}")
"""kind's own rule for names. 50 characters: the container's name is a host name, which has at most 63."""
_LOCK_PAUSE = 0.1  # seconds between two questions for the lock
READY_TIMEOUT = timedelta(minutes=2)
"""For the node of a cluster. In `kind create --wait` the images are loaded by then, and it takes 0 to 20 s."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that can be used."""

    name: str
    kubeconfig: Path
    node: str
    """The node with the mapped ports: the name of its container and its name in Kubernetes."""
    worker_ports: tuple[int, ...]
    """Ports of that node which are mapped to the same port of this machine, ascending."""
    made: bool
    """Whether this home created it. `delete` removes it then; an adopted one stays."""


class HomeCluster:
    """The cluster of one home. It blocks, for minutes while a cluster is created: do not call it in an event loop.

    Args:
        program: The `kind` tool.
        engine: The container engine that it works with.
        home: BKPOOL_HOME: contains `kind.json` and `kubeconfig`.
        report: Receives what is being done while something takes long.
        ready_timeout: How long the cluster's node may take to become ready.
        limits: How long kind may take for each of its tasks, beside that.
    """

    def __init__(
        self,
        program: Path,
        engine: Engine,
        home: Path,
        report: ReportText,
        ready_timeout: timedelta = READY_TIMEOUT,
        *,
        limits: KindLimits = USUAL_LIMITS,
    ) -> None:
        self._program = program
        self._engine = engine
        self._home = home
        self._report = report
        self._ready_timeout = ready_timeout
        self._limits = replace(limits, create=limits.create + ready_timeout.total_seconds())

    def ensure(
        self, name: str, *, config: Path = CONFIG, node_image: str | None = None, where: str = "--cluster"
    ) -> Cluster:
        """Adopts the cluster of that name, and starts it again if it was stopped; or creates it.

        Args:
            name: Its name, as `kind get clusters` shows it.
            config: The configuration to create it with.
            node_image: An image for its node instead of the default one of this kind.
            where: What gave the name, for error messages.

        Returns:
            The cluster; its API server answers, and its kubeconfig is written.

        Raises:
            HostFault: `OtherCluster` (this home has another one), `NoWorkerPorts` (it lacks the mapped ports),
                `PortTaken`, `DiskFull`, or an error of kind or the engine.
            InvalidInput: The name is not valid.
            Unavailable: Its API server does not answer.
        """
        if _NAME.fullmatch(name) is None:
            raise InvalidInput(
                f"{where}: {name[:80]!r} is not a valid name for a kind cluster",
                hint="Use up to 50 of a-z, 0-9, '-' and '.', beginning with a letter or digit.",
                field=where,
            )
        private_directory(self._home)
        with self._locked() as lock:
            marker = self._remove_interrupted()
            if marker and marker.name != name:
                raise HostFault(
                    f"{where}: {self._home} has the cluster {marker.name!r}, not {name!r}",
                    hint=f"Use --cluster {marker.name} or another BKPOOL_HOME, or start again after "
                    "`bkpool down --purge`.",
                    code="OtherCluster",
                )
            nodes = self._engine.nodes(name)
            made = marker.made if marker and nodes else not nodes
            if not nodes:
                self._create(name, config, node_image, lock)
                nodes = self._engine.nodes(name)
            node = entry_node(name, nodes, where)
            self._start(nodes)
            self._write_kubeconfig(name)
            await_api_server(name, kubeconfig_of(self._home), self._ready_timeout)
            Marker(name, "ready", made).write(self._home)
        return Cluster(name, kubeconfig_of(self._home), node.name, worker_ports(node.ports), made)

    def load_archive(self, cluster: Cluster, file: Path, *, where: str = "--image-archive") -> bool:
        """Loads the images of an archive into the cluster, unless its node has exactly these.

        Args:
            cluster: The cluster.
            file: The archive.
            where: What gave the file, for error messages.

        Returns:
            Whether anything was loaded.

        Raises:
            InvalidInput: The file is not an image archive.
            HostFault: kind failed.
        """
        images = archive_images(file, where)
        if images and all(self._image_id(cluster, image) == wanted for image, wanted in images.items()):
            return False
        self._report(f"cluster {cluster.name}: loading {file.name}")
        self._kind("load", "image-archive", str(file), "--name", cluster.name)
        return True

    def load_image(self, cluster: Cluster, reference: str) -> bool:
        """Loads an image that the engine has into the cluster. kind skips it if the node has it already.

        Returns:
            False if the engine does not have it. The node then pulls it when it needs it.

        Raises:
            HostFault: kind failed.
        """
        if not self._engine.has_image(reference):
            return False
        self._report(f"cluster {cluster.name}: loading {reference}")
        self._kind("load", "docker-image", reference, "--name", cluster.name)
        return True

    def delete(self) -> str | None:
        """Deletes the cluster that this home created, even if it is incomplete. An adopted cluster stays.

        Returns:
            The name of the cluster that was deleted; None if there was none to delete.

        Raises:
            HostFault: kind failed.
        """
        if not self._home.is_dir():
            return None
        with self._locked():
            marker = Marker.read(self._home)
            deleted = marker.name if marker and marker.made else None
            if deleted is not None:
                self._delete(deleted)
            kubeconfig_of(self._home).unlink(missing_ok=True)
            Marker.remove(self._home)
        (self._home / "kind.lock").unlink(missing_ok=True)
        return deleted

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Holds the lock of this home's cluster, and yields its file descriptor.

        A `kind` that a killed appliance started has inherited that lock and holds it until it ends; this waits for
        it.
        """
        with as_host_fault(self._home), (self._home / "kind.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._report("waiting for the kind of an earlier start to end")
                self._wait_for_lock(lock)
            os.set_inheritable(lock.fileno(), True)
            yield lock.fileno()

    def _wait_for_lock(self, lock: IO[bytes]) -> None:
        seconds = self._limits.create
        deadline = time.monotonic() + seconds
        while True:
            with suppress(BlockingIOError):
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.monotonic() > deadline:
                waited = durations.render(timedelta(seconds=seconds))
                raise HostFault(
                    f"the kind of an earlier start has not ended after {waited}: it holds {lock.name}",
                    hint=f"`fuser -v {lock.name}` shows its processes. End them, and repeat.",
                )
            time.sleep(_LOCK_PAUSE)

    def _remove_interrupted(self) -> Marker | None:
        """Removes the cluster of an interrupted start. Returns the marker of a complete cluster."""
        marker = Marker.read(self._home)
        if marker is None or marker.state == "ready":
            return marker
        self._report(f"cluster {marker.name}: removing what an interrupted start left")
        self._delete(marker.name)
        Marker.remove(self._home)
        return None

    def _create(self, name: str, config: Path, node_image: str | None, lock: int) -> None:
        Marker(name, "creating", made=True).write(self._home)
        kubeconfig = kubeconfig_of(self._home)
        kubeconfig.unlink(missing_ok=True)
        arguments = ["create", "cluster", "--name", name, "--config", str(config), "--kubeconfig", str(kubeconfig)]
        arguments += ["--wait", durations.render(self._ready_timeout)]
        arguments += ["--image", node_image] if node_image else []
        self._report(f"cluster {name}: creating it")
        try:
            run_kind_in_stages(self._program, arguments, self._limits, cluster=name, lock=lock, report=self._report)
        except KindHangs:
            raise  # it was killed: the next start, or `down --purge`, removes its nodes
        except HostFault:
            # Either kind has removed its nodes again, or it found nodes of another cluster. Nothing is left to
            # remove.
            Marker.remove(self._home)
            raise

    def _delete(self, name: str) -> None:
        self._kind("delete", "cluster", "--name", name, "--kubeconfig", str(kubeconfig_of(self._home)))

    def _start(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.running:
                self._report(f"starting the stopped node {node.name}")
                self._engine.start(node.name)

    def _write_kubeconfig(self, name: str) -> None:
        text = "".join(self._kind("get", "kubeconfig", "--name", name))
        write_private(kubeconfig_of(self._home), text.encode())

    def _image_id(self, cluster: Cluster, image: str) -> str | None:
        """The ID of an image on the cluster's node; None if the node does not have it."""
        answer = self._engine.run(cluster.node, ["crictl", "inspecti", image])
        try:
            return str(json.loads(answer)["status"]["id"]) if answer else None
        except (ValueError, KeyError, TypeError):
            return None

    def _kind(self, *arguments: str) -> list[str]:
        return run_kind(self._program, arguments, self._limits)
