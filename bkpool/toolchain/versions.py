"""What is on PATH already: candidates for a tool, and what each says about its own version.

A program is believed only if it names the project and a version that packaging can compare. Nothing here knows the
cache, writes or uses the network.
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

# docker/cli, cli-plugins/manager: where the docker command looks for its plug-ins on Linux.
_PLUGIN_DIRS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)
_FILE_NAMES = {Tool.BUILDX: ("buildx", "docker-buildx")}
_PATIENCE = 10.0  # seconds for a program to say its version: a cold 70 MB binary on a slow disk, not a hung one


@dataclass(frozen=True, slots=True)
class Candidate:
    """A program on the search path that has a tool's name."""

    path: Path
    version: Version | None
    fault: str
    """Why it is not used; empty if it is."""


def default_search_path() -> str:
    """PATH, and then the directories of docker's CLI plug-ins, where buildx mostly is."""
    config = os.environ.get("DOCKER_CONFIG") or f"{os.environ.get('HOME', '')}/.docker"
    return os.pathsep.join((os.environ.get("PATH", os.defpath), f"{config}/cli-plugins", *_PLUGIN_DIRS))


def candidates(tool: Tool, search_path: str) -> Iterator[Candidate]:
    """Every program with this tool's name on the search path, asked for its version, in order."""
    for directory in dict.fromkeys(search_path.split(os.pathsep)):
        for name in _FILE_NAMES.get(tool, (tool.value,)):
            path = Path(directory, name)
            # A relative entry would make what runs depend on the directory the user stands in.
            if path.is_absolute() and os.access(path, os.X_OK) and path.is_file():
                yield _judge(path, release_of(tool))


def version_of(path: Path, release: Release) -> Version | None:
    """The version a program says it is; None if it is another program, a development build, or lacks the feature.

    Raises:
        OSError: It cannot be run.
    """
    try:
        done = subprocess.run(
            [path, *release.version_args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    said = done.stdout.decode(errors="replace")
    match = re.search(rf"{re.escape(release.banner)}\s+v?(\S+)", said)
    if done.returncode != 0 or match is None or release.feature not in said:
        return None
    try:
        version = Version(match[1])
    except InvalidVersion:
        return None
    return None if version.is_devrelease else version


def _judge(path: Path, release: Release) -> Candidate:
    try:
        version = version_of(path, release)
    except OSError as error:
        return Candidate(path, None, f"{path} cannot be run ({error.strerror})")
    if version is None:
        wanted = f" with {release.feature.rstrip(':')}" if release.feature else ""
        return Candidate(path, None, f"{path} does not say that it is a released {release.name}{wanted}")
    if version < Version(release.oldest):
        return Candidate(path, version, f"{path} is {version}: {release.because}")
    return Candidate(path, version, "")
