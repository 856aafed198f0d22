"""The checks of `bkpool doctor`: one finding for each check, and a fix for each failure.

It changes nothing, uses no network and prints nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

from bkpool.core.descriptors import ConnectionShares, share_descriptors, workers_within
from bkpool.core.errors import BkpoolError, HostFault
from bkpool.home import runtime_directory
from bkpool.toolchain import descriptor_limit, gobuild, kernel
from bkpool.toolchain.host import Check, HostFacts
from bkpool.toolchain.network_programs import NetworkPrograms
from bkpool.toolchain.resolver import Toolchain
from bkpool.toolchain.table import Tool, release_of

__all__ = ["Check", "DescriptorLoad", "HostFacts", "checks"]

_PYTHON = (3, 11)
_GB = 10**9
_DOCKER_TIMEOUT = 10  # seconds
_NAME_SERVERS = "name servers"
_NEEDED_BY_EVERY_WORKER = {"privileges", "user namespaces", "id mapping", "subuid", "subgid", _NAME_SERVERS}
_MIN_DISK = 2 * _GB  # the tools and the layers of one ordinary build
_ENOUGH_DISK = 10 * _GB  # buildkitd keeps this much for its cache by default (its DiskSpaceReserveBytes)


@dataclass(frozen=True, slots=True)
class DescriptorLoad:
    """What shares the open files of an appliance."""

    wanted: ConnectionShares = field(default_factory=ConnectionShares)
    """How many connections the settings allow."""
    workers: int = 0
    """How many worker processes the pools may have; 0 if that is not known."""
    limit: int = 0
    """The limit of the appliance that runs; 0 if none does, so that it is that of the machine."""


def checks(
    home: Path,
    toolchain: Toolchain,
    ports: Mapping[str, int],
    *,
    own_ports: AbstractSet[int] = frozenset(),
    host_network: bool = False,
    load: DescriptorLoad | None = None,
    host: HostFacts | None = None,
) -> Iterator[Check]:
    """All findings about this machine, one after the other.

    Args:
        home: BKPOOL_HOME; it need not exist.
        toolchain: The tools and their cache.
        ports: The ports that the appliance needs, by their purpose ("API": 8082).
        own_ports: The ports that the appliance of this home uses already.
        host_network: Whether worker processes shall use the network of the machine.
        load: What shall share the open files of the appliance; by default nothing is known of it.
        host: The machine and user; by default this one.
    """
    host = host or HostFacts()
    yield _python(host)
    for tool in (Tool.BUILDKITD, Tool.BUILDX, Tool.RUNC, *([Tool.ROOTLESSKIT] if host.uid else [])):
        yield _tool(toolchain, tool)
    yield from kernel.checks(host, home)
    yield _network(host, host_network=host_network)
    if not host_network:
        yield _name_servers(host)
    yield _git(host)
    yield _docker_buildx(host)
    for purpose, port in ports.items():
        yield _port(purpose, port, own_ports)
    yield _descriptors(host)
    yield _descriptor_budget(host, load or DescriptorLoad())
    yield _disk(home)
    yield _home(home, host)
    yield _sockets(home)
    yield _cache(toolchain.cache)


def _python(host: HostFacts) -> Check:
    version = ".".join(map(str, host.python))
    if host.python >= _PYTHON:
        return Check("python", True, version)
    return Check("python", False, f"{version} is too old", "Run bkpool with Python 3.11 or newer.")


def _tool(toolchain: Toolchain, tool: Tool) -> Check:
    if found := toolchain.locate(tool):
        return Check(tool, True, f"{found.version} ({found.origin}: {found.path})")
    release = release_of(tool)
    rejected = "".join(f"; {candidate.problem}" for candidate in toolchain.rejected(tool))
    problem = gobuild.missing_for(release)
    if problem is None:
        detail = (
            f"not installed: `bkpool up` downloads {release.version}, or builds it with go ({release.build_time})"
        )
        return Check(tool, True, detail + rejected)
    detail = f"not installed: `bkpool up` downloads {release.version}; if that fails, {problem.message}"
    return Check(tool, None, detail + rejected, problem.hint)


def _network(host: HostFacts, *, host_network: bool) -> Check:
    if host_network:
        fix = "To give each worker process its own: bkpool down, then bkpool up -d --no-host-network."
        return Check("network", None, "builds reach this machine and each other (--host-network)", fix)
    try:
        found = NetworkPrograms.find(host.search_path, host.root / "dev/net/tun")
    except HostFault as fault:
        detail = f"{fault.message}: only the admin can use the backend `process`"
        return Check("network", None, detail, fault.hint)
    return Check("network", True, f"each worker process has its own ({found.pasta}, {found.nft})")


def _name_servers(host: HostFacts) -> Check:
    if host.read("etc/resolv.conf") is not None:
        return Check(_NAME_SERVERS, True, "/etc/resolv.conf names them")
    fix = "Make it; without a name server it may be empty. Or share the network of this machine: --host-network."
    return Check(_NAME_SERVERS, False, "there is no /etc/resolv.conf, so no worker starts", fix)


def _git(host: HostFacts) -> Check:
    """Buildkitd runs git for contexts and sources from git; it finds it in the PATH of the appliance."""
    if found := shutil.which("git", path=host.search_path):
        return Check("git", True, found)
    detail = "not installed: builds from git (git:// contexts, ADD of a repository) fail"
    return Check("git", None, detail, "Install git, for example with `apt-get install git` as root.")


def _docker_buildx(host: HostFacts) -> Check:
    name = "docker buildx"
    docker = shutil.which("docker", path=host.search_path)
    if docker is None:
        return Check(name, True, "there is no docker; `bkpool build` needs none")
    try:
        command = [docker, "buildx", "version"]
        done = subprocess.run(command, capture_output=True, timeout=_DOCKER_TIMEOUT, check=False)
        version = done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        version = ""
    if version:
        return Check(name, True, version)
    fix = 'Use `bkpool build`, or write "$(bkpool toolchain buildx)" in place of `docker buildx`.'
    return Check(name, None, f"{docker} has no buildx: `docker buildx` of the guides does not work", fix)


def worker_faults(home: Path, *, host_network: bool = False, host: HostFacts | None = None) -> list[Check]:
    """The findings that would make every worker process fail; `bkpool up` asks for them before it starts.

    Args:
        home: BKPOOL_HOME.
        host_network: Whether worker processes shall use the network of the machine.
        host: The machine and user; by default this one.
    """
    host = host or HostFacts()
    found = list(kernel.checks(host, home))
    if _network(host, host_network=host_network).ok:  # else workers use the network of the machine
        found.append(_name_servers(host))
    return [check for check in found if check.ok is False and check.name in _NEEDED_BY_EVERY_WORKER]


def _port(purpose: str, port: int, own_ports: AbstractSet[int]) -> Check:
    name = f"port {port}"
    if port in own_ports:
        return Check(name, True, f"{purpose}: used by this bkpool")
    with socket.socket() as probe:
        # Like the servers of asyncio: a connection in TIME_WAIT does not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EACCES:
                return Check(name, False, f"{purpose}: only root may listen on this port", "Use a port above 1023.")
            fix = f"Stop that program (ss -ltnp 'sport = :{port}' names it), or use another port."
            return Check(name, False, f"{purpose}: used by another program", fix)
    return Check(name, True, f"{purpose}: free")


def _descriptors(host: HostFacts) -> Check:
    soft, hard = host.descriptors
    number = descriptor_limit.highest(hard)
    detail = f"{number} open files, to which `bkpool up` raises the soft limit of {soft}"
    if number >= descriptor_limit.FEW:
        return Check("open files", True, detail)
    fix = "Raise the hard limit: LimitNOFILE= of the systemd unit, or /etc/security/limits.conf."
    return Check("open files", None, f"{detail}: the API and the gateway have room for few connections", fix)


def _descriptor_budget(host: HostFacts, load: DescriptorLoad) -> Check:
    """For how many connections and workers the open files suffice."""
    limit = load.limit or descriptor_limit.highest(host.descriptors[1])
    shares, workers = share_descriptors(limit, load.wanted), workers_within(limit)
    room = (
        f"{shares.gateway} connections of builds, {shares.gateway_pending} that have no lease yet, "
        f"{shares.api} of the API and, beside all these, about {workers} worker processes"
    )
    detail = f"{limit} open files suffice for {room}"
    lacks = [
        *(["worker processes"] if load.workers > workers else []),
        *(["connections of builds"] if load.workers > shares.gateway else []),
    ]
    if not lacks:
        return Check("budget of files", True, detail)
    short = f"{detail}; the pools may have {load.workers} workers, so there are too few {' and '.join(lacks)}"
    fix = (
        "Raise the hard limit (LimitNOFILE= of the systemd unit, or /etc/security/limits.conf) and start bkpool again"
    )
    return Check("budget of files", None, short, f"{fix}, or lower scaling.max of pools.")


def _disk(home: Path) -> Check:
    place = _nearest(home)
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check("disk", False, f"{place}: {error.strerror}", "Set BKPOOL_HOME to a directory that you can read.")
    text = f"{free / _GB:.1f} GB free at {place}"
    if free < _MIN_DISK:
        return Check(
            "disk", False, f"{text}; a build needs 2 GB", "Free some space, or set BKPOOL_HOME to another disk."
        )
    if free < _ENOUGH_DISK:
        return Check(
            "disk", None, f"{text}: caches stay small", "Free some space, or set BKPOOL_HOME to another disk."
        )
    return Check("disk", True, text)


def _home(home: Path, host: HostFacts) -> Check:
    if not _exists(home):
        return _to_create("home", home, "BKPOOL_HOME")
    found = home.stat()
    if found.st_uid != host.uid:
        fix = f"Run as root: chown -R {host.user} {home}; or set BKPOOL_HOME to one of your directories."
        return Check("home", False, f"{home} belongs to user id {found.st_uid}, not to {host.user}", fix)
    if found.st_mode & 0o077:
        return Check("home", False, f"other users can read {home}, and it has keys", f"Run: chmod 700 {home}")
    return _writable("home", home, "BKPOOL_HOME")


def _sockets(home: Path) -> Check:
    """Whether the directory of the sockets is there for us. In /tmp, another user may have made it first."""
    try:
        directory = runtime_directory.default_directory(home, os.environ)
        runtime_directory.check(directory)
    except BkpoolError as error:
        return Check("sockets", False, error.message, error.hint)
    return Check("sockets", True, str(directory))


def _cache(cache: Path) -> Check:
    if not _exists(cache):
        return _to_create("cache", cache, "BKPOOL_CACHE")
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        fix = "Set BKPOOL_CACHE to a directory from which programs can run."
        return Check("cache", False, f"{cache} is on a filesystem mounted noexec", fix)
    return _writable("cache", cache, "BKPOOL_CACHE")


def _to_create(name: str, path: Path, variable: str) -> Check:
    finding = _writable(name, _nearest(path), variable)
    return Check(
        name, finding.ok, f"{path} will be created" if finding.ok else f"{path}: {finding.detail}", finding.fix
    )


def _writable(name: str, path: Path, variable: str) -> Check:
    if os.access(path, os.W_OK | os.X_OK):
        return Check(name, True, str(path))
    return Check(name, False, f"{path} cannot be written", f"Set {variable} to a directory that you may write to.")


def _nearest(path: Path) -> Path:
    """The path, or the closest directory above it that exists."""
    return next(one for one in (path, *path.absolute().parents) if _exists(one))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a parent directory cannot be read
        return False
