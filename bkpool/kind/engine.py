"""The container engine of this machine: whether it answers, and the node containers that kind keeps in it.

This is the only module that imports the docker SDK. It finds the engine as the docker CLI does, because
kind calls that: DOCKER_HOST, else the CLI's current context, else the default socket. It starts a stopped node and
runs short commands inside one; it never creates or removes anything.
"""

from __future__ import annotations

import os
import shlex
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import docker
from docker.errors import DockerException, ImageNotFound

from bkpool.core.errors import HostFault

_PROBE_SECONDS = 2.0  # a local engine answers in milliseconds; one that hangs must not delay `bkpool up`
_TIMEOUT = 60.0  # the SDK's own default; stopping and starting a node takes a few seconds
# The labels that kind puts on its containers (pkg/cluster/internal/providers/docker/constants.go).
_CLUSTER_LABEL = "io.x-k8s.kind.cluster"
_ROLE_LABEL = "io.x-k8s.kind.role"

PortMappings = dict[int, tuple[str, int]]
"""Maps a TCP port of a container to the address and port on the host."""


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
    """The TCP ports that a container publishes, read from its inspection; it need not run."""
    bindings = inspected["HostConfig"].get("PortBindings") or {}
    return {
        int(port.removesuffix("/tcp")): (places[0].get("HostIp", ""), int(places[0]["HostPort"]))
        for port, places in bindings.items()
        if port.endswith("/tcp") and places and places[0].get("HostPort")
    }


class Engine:
    """A connection to the container engine; as a context manager it closes itself.

    Every method blocks: do not call one in an event loop.
    """

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client

    @classmethod
    def connect(cls) -> Self:
        """Connects and asks the engine for its version, within about two seconds.

        Raises:
            HostFault: `NoEngine` (nothing answers), `Permission` (this user may not use its socket), `ToolMissing`
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
                f"the program {program} is not on PATH, and kind needs it to reach the container engine",
                hint=f"Install the {program} command line program, or use --backend process.",
                code="ToolMissing",
            )
        client.api.timeout = _TIMEOUT
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
        with _as_host_fault():
            wanted = {"label": f"{_CLUSTER_LABEL}={cluster}"}
            found = self._client.containers.list(all=True, filters=wanted, ignore_removed=True)
            return sorted((_node(container) for container in found), key=lambda node: node.name)

    def start(self, node: str) -> None:
        """Starts a stopped node.

        Raises:
            HostFault: The engine refuses, for example because a port of the node is in use.
        """
        with _as_host_fault():
            self._client.containers.get(node).start()

    def run(self, node: str, command: Sequence[str]) -> str | None:
        """Runs a program in a node and returns its standard output; None if it failed.

        Raises:
            HostFault: The engine refuses, or the program does not end in time.
        """
        answer: Future[tuple[int, tuple[bytes | None, bytes | None]]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._client.containers.get(node).exec_run(list(command), demux=True))
            except Exception as error:  # noqa: BLE001 - raised below
                answer.set_exception(error)

        # The SDK waits without a limit for the output of a program. So a thread asks, which may be left behind.
        threading.Thread(target=ask, name="exec in a node", daemon=True).start()
        if not wait([answer], _TIMEOUT).done:
            raise HostFault(
                f"`{shlex.join(command)}` in the node {node} has not ended after {_TIMEOUT:.0f} s",
                hint="Look whether the container engine answers (docker ps), and restart it if it does not.",
            )
        with _as_host_fault():
            code, (out, _) = answer.result()
        return (out or b"").decode("utf-8", "replace") if code == 0 else None

    def has_image(self, reference: str) -> bool:
        """Whether the engine has an image, so that it can be loaded into a cluster without a registry.

        Raises:
            HostFault: The engine refuses.
        """
        with _as_host_fault():
            try:
                self._client.images.get(reference)
            except ImageNotFound:
                return False
            return True


def _node(container: Any) -> Node:
    running = container.status == "running"
    return Node(container.name, container.labels.get(_ROLE_LABEL, ""), running, port_mappings(container.attrs))


def _no_engine(error: BaseException) -> HostFault:
    cause = _system_error(error)
    if isinstance(cause, PermissionError):
        return HostFault(
            "this user may not use the container engine's socket (permission denied)",
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
    """The system error that caused this one. Errors of `requests` are OSErrors too, but without a number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _as_host_fault() -> Iterator[None]:
    """Turns errors of the SDK into a HostFault. Errors of `requests` are OSErrors."""
    try:
        yield
    except (DockerException, OSError) as error:
        reason = getattr(error, "explanation", None) or str(error)
        raise HostFault(f"the container engine: {reason}", hint="Look at its log, or restart it.") from None
