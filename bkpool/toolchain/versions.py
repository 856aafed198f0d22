"""Programs on PATH that could be a tool, and the version that each reports.

A program is used only if it names the project and a version that `packaging` can compare. Nothing here knows the
cache, writes a file or uses the network.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bkpool.toolchain.table import Release, Tool, release_of

# docker/cli, cli-plugins/manager: the directories of plug-ins of docker on Linux.
_PLUGIN_DIRS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)
_FILE_NAMES = {Tool.BUILDX: ("buildx", "docker-buildx")}
_VERSION_TIMEOUT = 10.0  # seconds: enough to start a 70 MB binary from a slow disk


@dataclass(frozen=True, slots=True)
class Candidate:
    """A program on the search path with the name of a tool."""

    path: Path
    version: Version | None
    problem: str
    """Why it is not used; empty if it is used."""


def default_search_path() -> str:
    """PATH, then the directories of the CLI plug-ins of docker, where buildx usually is."""
    config = os.environ.get("DOCKER_CONFIG") or f"{os.environ.get('HOME', '')}/.docker"
    return os.pathsep.join((os.environ.get("PATH", os.defpath), f"{config}/cli-plugins", *_PLUGIN_DIRS))


def candidates(tool: Tool, search_path: str) -> Iterator[Candidate]:
    """Every program with the name of this tool on the search path, with its version, in order."""
    for directory in dict.fromkeys(search_path.split(os.pathsep)):
        for name in _FILE_NAMES.get(tool, (tool.value,)):
            path = Path(directory, name)
            # With a relative entry the program would depend on the current directory of the user.
            if path.is_absolute() and os.access(path, os.X_OK) and path.is_file():
                yield _examine(path, release_of(tool))


def version_of(path: Path, release: Release) -> Version | None:
    """The version that a program reports; None for another program, a development build, or a missing feature.

    Raises:
        OSError: It cannot be run.
    """
    try:
        done = subprocess.run(
            [path, *release.version_args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_VERSION_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    output = done.stdout.decode(errors="replace")
    match = re.search(rf"{re.escape(release.banner)}\s+v?(\S+)", output)
    if done.returncode != 0 or match is None or release.feature not in output:
        return None
    try:
        version = Version(match[1])
    except InvalidVersion:
        return None
    return None if version.is_devrelease else version


def _examine(path: Path, release: Release) -> Candidate:
    try:
        version = version_of(path, release)
    except OSError as error:
        return Candidate(path, None, f"{path} cannot be run ({error.strerror})")
    if version is None:
        wanted = f" with {release.feature.rstrip(':')}" if release.feature else ""
        return Candidate(path, None, f"{path} does not report a released version of {release.name}{wanted}")
    if version < Version(release.min_version):
        return Candidate(path, version, f"{path} is {version}: {release.min_version_reason}")
    return Candidate(path, version, "")
