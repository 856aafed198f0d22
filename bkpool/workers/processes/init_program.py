"""Prepares the first process of a worker: the program `worker_init`, and for each worker the file of its settings.

It starts nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path

import structlog

from bkpool.core.pool import PoolSpec
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.workers.processes import network
from bkpool.workers.processes.slot_files import as_host_fault
from bkpool.workers.processes.worker_init import MountSettings, NetworkSettings, WorkerSettings

log = structlog.get_logger(__name__)

_NAME, _READY = "worker_init", "ready"
_SOURCES = {
    entry.name: entry.read_bytes()
    for entry in resources.files(f"bkpool.workers.processes.{_NAME}").iterdir()
    if entry.name.endswith(".py")
}
_MAIN = f"from {_NAME}.program import run\nrun()\n"
_DIGEST = hashlib.sha256(repr(sorted(_SOURCES.items())).encode()).hexdigest()[:12]


class InitProgram:
    """Makes the beginning of a worker's command line.

    Args:
        programs: What makes the network of a worker; None: workers use the host's network.
        environ: The appliance's own; a proxy in it is for workers too.
        own_ports: Returns the ports that this appliance listens on.
    """

    def __init__(
        self,
        programs: NetworkPrograms | None,
        environ: Mapping[str, str],
        own_ports: Callable[[], Collection[int]],
    ) -> None:
        self._programs = programs
        self._environ = environ
        self._own_ports = own_ports

    @property
    def makes_network(self) -> bool:
        """Whether each worker has a network of its own."""
        return self._programs is not None

    def command(self, directory: Path, spec: PoolSpec, mounts: MountSettings | None = None) -> list[str]:
        """The command line of `worker_init`, which ends where that of the worker begins.

        Args:
            directory: A private directory that does not exist yet, for what this worker needs. It is in one of the
                worker, in the runtime directory: there the program is put, once for all workers.
            spec: The pool's.
            mounts: What a worker of root sees differently from the host.

        Raises:
            WorkerFailed: `spec.networking.hostPorts` has a port of bkpool itself.
            HostFault: A file cannot be written.
        """
        settings, program = directory / "settings.json", directory.parent.parent / f".init-{_DIGEST}"
        with as_host_fault(directory):
            _install(program)
            directory.mkdir(mode=0o700)
            wanted: WorkerSettings = {"mounts": mounts, "network": self._network(directory, spec)}
            settings.write_text(json.dumps(wanted))
        # Isolated and without site-packages: no variable and no package of the user changes what runs.
        return [sys.executable, "-I", "-S", str(program), str(settings)]

    def settings_of(self, spec: PoolSpec) -> tuple[str, list[int]] | None:
        """The packet filter and the ports of the host for a pool; None: workers use the host's network.

        Raises:
            WorkerFailed: `spec.networking.hostPorts` has a port of bkpool itself.
        """
        if self._programs is None:
            return None
        return network.rules(spec), network.host_ports(spec, self._own_ports())

    def ready_file(self, directory: Path) -> Path | None:
        """The file that tells that the network of a worker is complete; None: it needs none.

        Args:
            directory: What `command` was given.
        """
        return directory / _READY if self.makes_network else None

    def _network(self, directory: Path, spec: PoolSpec) -> NetworkSettings | None:
        if self._programs is None:
            return None
        if ports := network.unreachable_proxies(spec, _proxies(self._environ)):
            log.warning(
                "worker.proxy_unreachable", ports=ports, hint=f"Add them to {network.HOST_PORTS} of the pool."
            )
        return {
            "pasta": str(self._programs.pasta),
            "nft": str(self._programs.nft),
            "netns_directory": str(_netns_directory(directory)),
            "resolv_conf": str(directory / "resolv.conf"),
            "ready": str(directory / _READY),
            "rules": network.rules(spec),
            "host_ports": network.host_ports(spec, self._own_ports()),
        }


def _install(program: Path) -> None:
    """Puts the program into its directory, all at once, also where somebody has removed a part of it."""
    if _is_complete(program):
        return
    with tempfile.TemporaryDirectory(prefix=".init-", dir=program.parent) as draft:
        package = Path(draft, "program", _NAME)
        package.mkdir(parents=True)
        for name, source in _SOURCES.items():
            (package / name).write_bytes(source)
        (package.parent / "__main__.py").write_text(_MAIN)
        with suppress(OSError):  # there is nothing, or another start was faster
            program.rename(Path(draft, "incomplete"))
        with suppress(OSError):  # another start was faster
            package.parent.rename(program)


def _is_complete(program: Path) -> bool:
    return all(path.exists() for path in (program / "__main__.py", *(program / _NAME / name for name in _SOURCES)))


def remove(runtime_dir: Path) -> None:
    """Removes the program, also of other versions. Workers that run do not need it any more."""
    for found in runtime_dir.glob(".init-*"):
        shutil.rmtree(found, ignore_errors=True)


def listening_ports(ports: Iterable[int]) -> frozenset[int]:
    """The TCP ports that this process listens on, and these."""
    own = set()
    with suppress(OSError):
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):
                own.add(str(Path(entry.path).readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set(ports)
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()  # proc(5): local address, state (0A: listening) and inode
                if fields[3] == "0A" and fields[9] in own:
                    found.add(int(fields[1].rpartition(":")[2], 16))
    return frozenset(found)


def _netns_directory(directory: Path) -> Path:
    """Where the namespace is mounted. The AppArmor profile of pasta allows this directory of a user's session."""
    session = Path(f"/run/user/{os.geteuid()}")
    made = session / "netns" if os.access(session, os.W_OK | os.X_OK) else directory / "netns"
    with as_host_fault(made):
        made.mkdir(mode=0o700, exist_ok=True)
    return made


def _proxies(environ: Mapping[str, str]) -> list[str]:
    return [value for name, value in environ.items() if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}]
