"""The container engine of this machine: whether it answers, and the node containers that kind keeps in it.

The only importer of the docker SDK. It finds the engine as the docker CLI does, since kind calls that: DOCKER_HOST,
else the CLI's current context, else the default socket. It starts a stopped node and runs small questions inside one;
it never creates or removes anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import docker
from docker.errors import DockerException, ImageNotFound

from bkpool.core.errors import HostFault

_PROBE_SECONDS = 2.0  # a local engine answers in milliseconds; one that hangs must not hold up `bkpool up`
_LIMIT_SECONDS = 60.0  # the SDK's own default; stopping and starting a node takes a few seconds
_CLUSTER = (
    "io.x-k8s.kind.cluster"  # kind's labels on its containers (pkg/cluster/internal/providers/docker/constants.go)
)
_ROLE = "io.x-k8s.kind.role"

PortMappings = dict[int, tuple[str, int]]
"""TCP port of a container to where the host has it: address and port."""


@dataclass(frozen=True, slots=True)
class Node:
    """A container that is a node of a kind cluster."""

    name: str
    role: str
    running: bool
    ports: PortMappings


def engine_fault() -> str | None:
    """Why no container engine can be used, as the end of a sentence; None if one can. Takes about 2 s at most."""
    try:
        with Engine.connect():
            return None
    except HostFault as fault:
        return fault.message


def port_mappings(inspected: dict[str, Any]) -> PortMappings:
    """The TCP ports that a container publishes, from what inspecting it says, running or not."""
    bindings = inspected["HostConfig"].get("PortBindings") or {}
    return {
        int(port.removesuffix("/tcp")): (places[0].get("HostIp", ""), int(places[0]["HostPort"]))
        for port, places in bindings.items()
        if port.endswith("/tcp") and places and places[0].get("HostPort")
    }


class Engine:
    """A connection to the container engine; a context manager closes it. Blocks: not for the event loop."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client

    @classmethod
    def connect(cls) -> Self:
        """Asks the engine for its version, within about two seconds.

        Raises:
            HostFault: `NoEngine` (nothing answers), `Permission` (its socket is not for this user), `ToolMissing`
                (the CLI, which kind calls, is not on PATH).
        """
        program = os.environ.get("KIND_EXPERIMENTAL_PROVIDER") or "docker"
        try:
            client = docker.from_env(version="auto", timeout=_PROBE_SECONDS)
        except Exception as error:  # noqa: BLE001 - the SDK raises a bare Exception for a damaged context
            raise _no_engine(error) from None
        if shutil.which(program) is None:
            client.close()
            raise HostFault(
                f"the program {program}, through which kind reaches the container engine, is not on PATH",
                hint=f"Install the {program} command line, or use --backend process.",
                code="ToolMissing",
            )
        client.api.timeout = _LIMIT_SECONDS
        return cls(client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def nodes(self, cluster: str) -> list[Node]:
        """The nodes of a kind cluster, stopped ones too, by name; empty if there is no such cluster.

        Raises:
            HostFault: The engine refuses, or no longer answers.
        """
        with _told():
            wanted = {"label": f"{_CLUSTER}={cluster}"}
            found = self._client.containers.list(all=True, filters=wanted, ignore_removed=True)
            return sorted(
                (
                    Node(each.name, each.labels.get(_ROLE, ""), each.status == "running", port_mappings(each.attrs))
                    for each in found
                ),
                key=lambda node: node.name,
            )

    def start(self, node: str) -> None:
        """Starts a stopped node.

        Raises:
            HostFault: The engine refuses: a port of the node is taken, for one.
        """
        with _told():
            self._client.containers.get(node).start()

    def run(self, node: str, command: Sequence[str]) -> str | None:
        """Runs a program in a node and gives its standard output; None if it failed.

        Raises:
            HostFault: The engine refuses.
        """
        with _told():
            code, (out, _) = self._client.containers.get(node).exec_run(list(command), demux=True)
        return (out or b"").decode("utf-8", "replace") if code == 0 else None

    def has_image(self, reference: str) -> bool:
        """Whether the engine itself has an image, so that it can be loaded into a cluster without a registry.

        Raises:
            HostFault: The engine refuses.
        """
        with _told():
            try:
                self._client.images.get(reference)
            except ImageNotFound:
                return False
            return True


def _no_engine(error: BaseException) -> HostFault:
    cause = _system_error(error)
    if isinstance(cause, PermissionError):
        return HostFault(
            "the container engine's socket is not for this user (permission denied)",
            hint="Join its group and log in again (sudo usermod -aG docker $USER), or use --backend process.",
            code="Permission",
        )
    what = (cause.strerror if cause else None) or str(error)
    return HostFault(
        f"no container engine answers ({what})",
        hint="Start one (docker info shows whether it runs), or use --backend process.",
        code="NoEngine",
    )


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said, deep inside: requests' own errors are OSErrors too, but without a number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _told() -> Iterator[None]:
    """Turns what the SDK raises (requests' errors are OSErrors) into a fault of this host."""
    try:
        yield
    except (DockerException, OSError) as error:
        said = getattr(error, "explanation", None) or str(error)
        raise HostFault(f"the container engine: {said}", hint="Look at its own log, or restart it.") from None
