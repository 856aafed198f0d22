"""The life cycle of the kind cluster of one home: made once, adopted afterwards, deleted only by whoever made it.

The `kind` tool does the work; this knows what was interrupted and what belongs to whom. Other clusters, the user's
own kubeconfig and its current context are never touched: kind is always given a file of ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import ssl
import subprocess
import tarfile
import time
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import yaml

from bkpool.core.errors import HostFault, InvalidInput, Unavailable
from bkpool.home.files import as_host_fault, private_directory, unreadable, write_private
from bkpool.kind.engine import Engine, Node, PortMappings

Tell = Callable[[dict[str, Any]], None]

CONFIG = Path(__file__).with_name("kind-config.yaml")
"""The configuration that clusters are made with: the one at the top of the checkout."""
WORKER_PORTS = range(12400, 12800)
"""Where host ports of workers lie; kind-config.yaml takes the first 32, a second cluster takes others."""

_NAME = re.compile(
    r"[a-z0-9][a-z0-9.-]{0,49}"
)  # as kind has it; 50: the container's name is a host name of at most 63
_STAGE = re.compile(r" • (?P<stage>.*?)\s+\.\.\.\s*")  # pkg/internal/cli/status.go of kind, where it has no terminal
_TAKEN = re.compile(r"(\d+\.\d+\.\d+\.\d+:\d+).*(?:already allocated|address already in use)")
_LAST_WORDS = 4  # lines of kind's own output in an error
_WIDTH = 300  # characters of each of them: kubeadm's are endless
_NODE_READY = "120s"  # of `kind create --wait`: images are there by then, it takes 0 to 20 s
_API_SECONDS = 90.0  # a node that was started again has an API server within about 15 s on two cores
_LOOK_AGAIN = 0.2


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that can be used."""

    name: str
    kubeconfig: Path
    node: str
    """The node that has the mapped ports: its container and its Kubernetes name."""
    worker_ports: tuple[int, ...]
    """Ports of that node which are mapped to the same port of this machine, ascending."""
    made: bool
    """This home made it, so `delete` removes it; an adopted one stays."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What a home remembers of its cluster, in `kind.json`."""

    name: str
    state: Literal["creating", "ready"]
    made: bool

    @staticmethod
    def read(home: Path) -> Marker | None:
        """The marker of a home; None if it never had a cluster.

        Raises:
            HostFault: `Unreadable`: it is damaged.
        """
        path = home / "kind.json"
        try:
            return Marker(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise unreadable(
                path, "is damaged", hint="Remove it: a cluster of that name is then adopted, not deleted."
            ) from None

    def write(self, home: Path) -> None:
        """Remembers this, durably.

        Raises:
            HostFault: `DiskFull`, `Permission`, or what the system says.
        """
        write_private(home / "kind.json", json.dumps(asdict(self)).encode())


def kubeconfig_of(home: Path) -> Path:
    """Where a home keeps the kubeconfig of its cluster."""
    return home / "kubeconfig"


def worker_ports(mappings: PortMappings) -> tuple[int, ...]:
    """The ports of a node that workers can have: in our range, and the same on both sides."""
    return tuple(sorted(port for port, (_, host) in mappings.items() if port == host and port in WORKER_PORTS))


def stage(line: str, name: str) -> str | None:
    """What a line of `kind create cluster` says is being done, in words; None if it is no such line."""
    match = _STAGE.fullmatch(line.rstrip("\n"))
    if match is None:
        return None
    words = re.sub(r"[^\x20-\x7e≤]", "", match["stage"]).strip()  # kind puts a picture behind each
    return f"cluster {name}: {words[:1].lower()}{words[1:]}"


def archive_images(file: Path) -> dict[str, str]:
    """The images in an archive of `docker save`: name to id (sha256:…). Empty where it has no such list (plain OCI).

    Raises:
        InvalidInput: There is no such file, or it is no image archive.
    """
    try:
        with tarfile.open(file) as archive:
            try:
                listed = archive.extractfile("manifest.json")
            except KeyError:
                return {}
            entries = json.load(listed) if listed else []
        return {
            name: "sha256:" + Path(entry["Config"]).name.removesuffix(".json")
            for entry in entries
            for name in entry.get("RepoTags") or ()
        }
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no image archive"
        raise InvalidInput(
            f"--image-archive: {file}: {why}",
            hint="`docker save -o FILE IMAGE` writes one.",
            field="--image-archive",
        ) from None


class Kind:
    """The cluster of one home. Blocks, for minutes while a cluster is made: not for the event loop.

    Args:
        program: The `kind` tool.
        engine: The container engine that it works with.
        home: BKPOOL_HOME: `kind.json` and `kubeconfig` are kept there.
        tell: Told {"progress": text} while something takes its time.
    """

    def __init__(self, program: Path, engine: Engine, home: Path, tell: Tell) -> None:
        self._program = program
        self._engine = engine
        self._home = home
        self._tell = tell

    def ensure(self, name: str, *, config: Path = CONFIG, node_image: str | None = None) -> Cluster:
        """Adopts the cluster of that name, starting it again where it was stopped, or makes one.

        Args:
            name: Its name, as `kind get clusters` shows it.
            config: What to make it with.
            node_image: An image for its node instead of the one that goes with kind.

        Returns:
            The cluster; its API server answers, and its kubeconfig is written.

        Raises:
            HostFault: `OtherCluster` (this home has another one), `NoWorkerPorts` (it lacks the mapped ports),
                `PortTaken`, `DiskFull`, or what kind or the engine says.
            InvalidInput: The name is none.
            Unavailable: Its API server doesn't answer.
        """
        if _NAME.fullmatch(name) is None:
            raise InvalidInput(
                f"--cluster: {name[:80]!r} is no name for a cluster",
                hint="Use up to 50 of a-z, 0-9, '-' and '.', beginning with a letter or digit.",
                field="--cluster",
            )
        private_directory(self._home)
        with self._alone():
            marker = self._settled()
            if marker and marker.name != name:
                raise HostFault(
                    f"--cluster: {self._home} has the cluster {marker.name!r}, not {name!r}",
                    hint=f"Use --cluster {marker.name}, another BKPOOL_HOME, or `bkpool down --purge` to begin anew.",
                    code="OtherCluster",
                )
            nodes = self._engine.nodes(name)
            made = marker.made if marker and nodes else not nodes
            if not nodes:
                self._create(name, config, node_image)
                nodes = self._engine.nodes(name)
            node = _entrance(name, nodes)
            self._start(nodes)
            self._write_kubeconfig(name)
            _await_api(name, kubeconfig_of(self._home))
            Marker(name, "ready", made).write(self._home)
        return Cluster(name, kubeconfig_of(self._home), node.name, worker_ports(node.ports), made)

    def load_archive(self, cluster: Cluster, file: Path) -> bool:
        """Puts the images of an archive into the cluster, unless its node has just these.

        Returns:
            Whether anything had to be loaded.

        Raises:
            InvalidInput: The file is no image archive.
            HostFault: kind failed.
        """
        images = archive_images(file)
        if images and all(self._id_in(cluster, image) == wanted for image, wanted in images.items()):
            return False
        self._tell({"progress": f"cluster {cluster.name}: loading {file.name}"})
        self._kind("load", "image-archive", str(file), "--name", cluster.name)
        return True

    def load_image(self, cluster: Cluster, reference: str) -> bool:
        """Puts an image that the engine has into the cluster (kind skips what is there already).

        Returns:
            False where the engine doesn't have it: the node then pulls it by itself.

        Raises:
            HostFault: kind failed.
        """
        if not self._engine.has_image(reference):
            return False
        self._tell({"progress": f"cluster {cluster.name}: loading {reference}"})
        self._kind("load", "docker-image", reference, "--name", cluster.name)
        return True

    def delete(self) -> str | None:
        """Deletes the cluster that this home made, half-made or not, and forgets about it; an adopted one stays.

        Returns:
            The name of the cluster that was deleted; None if there was none to delete.

        Raises:
            HostFault: kind failed.
        """
        if not self._home.is_dir():
            return None
        with self._alone():
            marker = Marker.read(self._home)
            deleted = marker.name if marker and marker.made else None
            if deleted is not None:
                self._remove(deleted)
            kubeconfig_of(self._home).unlink(missing_ok=True)
            (self._home / "kind.json").unlink(missing_ok=True)
        (self._home / "kind.lock").unlink(missing_ok=True)
        return deleted

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits for a kind that a killed appliance left behind: it inherited the lock, and holds it to its end."""
        with as_host_fault(self._home), (self._home / "kind.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._tell({"progress": "waiting for the kind of an earlier start to end"})
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.set_inheritable(lock.fileno(), True)
            self._lock = lock.fileno()
            yield

    def _settled(self) -> Marker | None:
        """The marker, after what was left half-made is removed."""
        marker = Marker.read(self._home)
        if marker is None or marker.state == "ready":
            return marker
        self._tell({"progress": f"cluster {marker.name}: removing what an interrupted start left"})
        self._remove(marker.name)
        (self._home / "kind.json").unlink()
        return None

    def _create(self, name: str, config: Path, node_image: str | None) -> None:
        Marker(name, "creating", made=True).write(self._home)
        kubeconfig = kubeconfig_of(self._home)
        kubeconfig.unlink(missing_ok=True)
        command = ["create", "cluster", "--name", name, "--config", str(config), "--kubeconfig", str(kubeconfig)]
        self._tell({"progress": f"cluster {name}: creating it"})
        try:
            self._kind(*command, "--wait", _NODE_READY, *(["--image", node_image] if node_image else []), shown=name)
        except HostFault:
            # kind has removed its nodes by itself, or it found another's: either way nothing here is ours to remove.
            (self._home / "kind.json").unlink()
            raise

    def _remove(self, name: str) -> None:
        self._kind("delete", "cluster", "--name", name, "--kubeconfig", str(kubeconfig_of(self._home)))

    def _start(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.running:
                self._tell({"progress": f"starting the stopped node {node.name}"})
                self._engine.start(node.name)

    def _write_kubeconfig(self, name: str) -> None:
        text = "".join(self._kind("get", "kubeconfig", "--name", name))
        write_private(kubeconfig_of(self._home), text.encode())

    def _id_in(self, cluster: Cluster, image: str) -> str | None:
        told = self._engine.run(cluster.node, ["crictl", "inspecti", image])
        try:
            return str(json.loads(told)["status"]["id"]) if told else None
        except (ValueError, KeyError, TypeError):
            return None

    def _kind(self, *arguments: str, shown: str = "") -> Sequence[str]:
        """Runs kind and gives what it wrote to stdout, or raises a HostFault with its last words.

        Its stages go to `tell` where `shown` names the cluster. It inherits the lock, so that whoever comes after a
        killed appliance waits for its end. KUBECONFIG is kept from it: it would be the user's.
        """
        environment = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
        words: deque[str] = deque(maxlen=200)
        with subprocess.Popen(
            [self._program, *arguments],
            env=environment,
            pass_fds=(self._lock,) if shown else (),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if shown else subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            if shown:
                for line in process.stdout or ():
                    words.append(line)
                    if doing := stage(line, shown):
                        self._tell({"progress": doing})
            else:
                out, told = process.communicate()
                words.extend(told.splitlines())
        if process.returncode != 0:
            _failed(" ".join(arguments[:2]), words)
        return [] if shown else out.splitlines(keepends=True)


def _entrance(name: str, nodes: Sequence[Node]) -> Node:
    """The node that workers are reached through.

    Raises:
        HostFault: `NoWorkerPorts`: the cluster was not made with our configuration.
    """
    for node in nodes:
        if worker_ports(node.ports):
            return node
    raise HostFault(
        f"the kind cluster {name!r} has no host ports for workers: it was not made from kind-config.yaml",
        hint=f"Use --cluster with another name; or, if nothing in it is needed, `kind delete cluster --name {name}`, "
        "and bkpool makes it anew.",
        code="NoWorkerPorts",
    )


def _failed(action: str, words: Iterable[str]) -> NoReturn:
    """Raises what kind's own words mean."""
    lines = [line.strip() for line in words if line.strip()]
    for line in lines:
        if "no space left on device" in line:
            raise HostFault(f"kind {action}: no space left on device", hint="Free some disk space.", code="DiskFull")
        if taken := _TAKEN.search(line):
            raise HostFault(
                f"kind {action}: {taken[1]} is in use",
                hint="Stop what listens there (another kind cluster?), or change the ports in kind-config.yaml.",
                code="PortTaken",
            )
    errors = [line for line in lines if line.startswith("ERROR")][:1]
    last = errors + [line for line in lines[-_LAST_WORDS:] if line not in errors]
    pulling = any("failed to pull image" in line for line in errors)
    raise HostFault(
        f"kind {action} failed: {' | '.join(line[:_WIDTH] for line in last) or 'it said nothing'}",
        hint="--node-image names an image that the engine has already." if pulling else "",
    )


def _await_api(name: str, kubeconfig: Path) -> None:
    """Waits until the API server says that it is ready.

    Raises:
        Unavailable: It does not, in time.
    """
    cluster = yaml.safe_load(kubeconfig.read_bytes())["clusters"][0]["cluster"]
    trust = ssl.create_default_context(cadata=b64decode(cluster["certificate-authority-data"]).decode())
    deadline = time.monotonic() + _API_SECONDS
    while fault := _api_fault(urlsplit(cluster["server"]).netloc, trust):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"the API server of the kind cluster {name!r} does not answer at {cluster['server']}: {fault}",
                hint=f"`docker logs {name}-control-plane` shows its node; `bkpool down --purge` removes the cluster.",
            )
        time.sleep(_LOOK_AGAIN)


def _api_fault(address: str, trust: ssl.SSLContext) -> str | None:
    """What is wrong with an API server; None if it is ready. It is asked directly, whatever proxy is configured."""
    connection = HTTPSConnection(address, context=trust, timeout=5)
    try:
        connection.request("GET", "/readyz")  # anybody may ask this: the cluster role system:public-info-viewer
        answer = connection.getresponse()
        return None if answer.status == HTTPStatus.OK else f"{answer.status} {answer.reason}"
    except (OSError, HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
