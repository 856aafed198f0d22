"""`bkpool doctor`: one finding a check, each failure with its fix.

It changes nothing and uses no network; how a finding looks is the CLI's affair.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from bkpool.toolchain import gobuild, kernel
from bkpool.toolchain.host import Check, HostFacts
from bkpool.toolchain.resolver import Toolchain
from bkpool.toolchain.table import Tool, release_of

__all__ = ["Check", "HostFacts", "checks"]

_PYTHON = (3, 11)
_GB = 10**9
_LEAST_DISK = 2 * _GB  # the tools and the layers of one ordinary build
_GOOD_DISK = 10 * _GB  # what buildkitd keeps for its cache where nothing is configured (its DiskSpaceReserveBytes)


def checks(
    home: Path,
    toolchain: Toolchain,
    ports: Mapping[str, int],
    *,
    own_ports: AbstractSet[int] = frozenset(),
    host: HostFacts | None = None,
) -> Iterator[Check]:
    """All findings about this machine, as they are made.

    Args:
        home: BKPOOL_HOME, whether it exists or not.
        toolchain: Whose tools, and whose cache.
        ports: The ports that the appliance wants, by what they are for ("API": 8082).
        own_ports: The ports that the appliance of this home uses already.
        host: The machine and user; by default this one.
    """
    host = host or HostFacts()
    yield _python(host)
    for tool in (Tool.BUILDKITD, Tool.BUILDX, Tool.RUNC, *([Tool.ROOTLESSKIT] if host.uid else [])):
        yield _tool(toolchain, tool)
    yield from kernel.checks(host, home)
    for purpose, port in ports.items():
        yield _port(purpose, port, own_ports)
    yield _disk(home)
    yield _home(home, host)
    yield _cache(toolchain.cache)


def _python(host: HostFacts) -> Check:
    told = ".".join(map(str, host.python))
    if host.python >= _PYTHON:
        return Check("python", True, told)
    return Check("python", False, f"{told} is too old", "Run bkpool with Python 3.11 or newer.")


def _tool(toolchain: Toolchain, tool: Tool) -> Check:
    if found := toolchain.locate(tool):
        return Check(tool, True, f"{found.version} ({found.origin}: {found.path})")
    release = release_of(tool)
    passed_over = "".join(f"; {candidate.fault}" for candidate in toolchain.rejected(tool))
    lacking = gobuild.fault(release)
    if lacking is None:
        detail = f"not here yet: `bkpool up` downloads {release.version}, or builds it with go ({release.effort})"
        return Check(tool, True, detail + passed_over)
    detail = f"not here yet: `bkpool up` downloads {release.version}; where it cannot, {lacking.message}"
    return Check(tool, None, detail + passed_over, lacking.hint)


def _port(purpose: str, port: int, own_ports: AbstractSet[int]) -> Check:
    name = f"port {port}"
    if port in own_ports:
        return Check(name, True, f"{purpose}: served by this bkpool")
    with socket.socket() as probe:
        # As asyncio's servers do: what a closed connection leaves for a minute (TIME_WAIT) is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EACCES:
                return Check(name, False, f"{purpose}: only root may listen there", "Choose a port above 1023.")
            fix = f"End what has it (ss -ltnp 'sport = :{port}' names it), or choose another port."
            return Check(name, False, f"{purpose}: taken by another program", fix)
    return Check(name, True, f"{purpose}: free")


def _disk(home: Path) -> Check:
    there = _nearest(home)
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check("disk", False, f"{there}: {error.strerror}", "Set BKPOOL_HOME to a directory that can be read.")
    told = f"{free / _GB:.1f} GB free at {there}"
    if free < _LEAST_DISK:
        return Check("disk", False, f"{told}, a build needs 2 GB", "Free some, or set BKPOOL_HOME to another disk.")
    if free < _GOOD_DISK:
        return Check(
            "disk", None, f"{told}: little is kept in caches", "Free some, or set BKPOOL_HOME to another disk."
        )
    return Check("disk", True, told)


def _home(home: Path, host: HostFacts) -> Check:
    if not _exists(home):
        return _to_be_made("home", home, "BKPOOL_HOME")
    found = home.stat()
    if found.st_uid != host.uid:
        fix = f"Run as root: chown -R {host.user} {home}; or set BKPOOL_HOME to a directory of your own."
        return Check("home", False, f"{home} belongs to user id {found.st_uid}, not to {host.user}", fix)
    if found.st_mode & 0o077:
        return Check("home", False, f"{home} is open to others, and keys are kept in it", f"Run: chmod 700 {home}")
    return _writable("home", home, "BKPOOL_HOME")


def _cache(cache: Path) -> Check:
    if not _exists(cache):
        return _to_be_made("cache", cache, "BKPOOL_CACHE")
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        fix = "Set BKPOOL_CACHE to a directory from which programs may be run."
        return Check("cache", False, f"{cache} is on a filesystem mounted noexec", fix)
    return _writable("cache", cache, "BKPOOL_CACHE")


def _to_be_made(name: str, path: Path, variable: str) -> Check:
    finding = _writable(name, _nearest(path), variable)
    return Check(name, finding.ok, f"{path} will be made" if finding.ok else f"{path}: {finding.detail}", finding.fix)


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
    except OSError:  # a directory above it is closed to us
        return False
