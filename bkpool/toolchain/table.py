"""The tools that bkpool uses, their versions, and where each comes from.

Change a version here and in gotools/go.mod together; a test compares them. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Tool(StrEnum):
    """A program that bkpool runs; the value is its file name."""

    BUILDKITD = "buildkitd"
    BUILDCTL = "buildctl"
    BUILDX = "buildx"
    RUNC = "runc"
    ROOTLESSKIT = "rootlesskit"
    KIND = "kind"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tool is in its release."""

    package: str
    """Go import path of the main package; the last part is the name of the binary."""
    member: str = ""
    """Its path in the release archive; empty where the asset is the binary itself."""


@dataclass(frozen=True, slots=True)
class Release:
    """One upstream release. Its tools are got together: they are in one archive, or share most of a build."""

    name: str
    repository: str
    """owner/name on GitHub; releases are tagged `v<version>`."""
    version: str
    min_version: str
    """The oldest version on PATH that is used instead of this release."""
    min_version_reason: str
    """Why older versions are not used."""
    tools: Mapping[Tool, Source]
    asset: str
    """File name in the release; {version}, {arch} (Go's name) and {machine} (uname's name) are filled in."""
    digests_file: str
    """File name of the digests in the release: lines of sha256sum, or an in-toto statement."""
    banner: str
    """The text before the version number in the output of version_args."""
    version_args: tuple[str, ...] = ("--version",)
    feature: str = ""
    """Text that the output of version_args must also contain; without it the binary cannot be used."""
    tags: str = ""
    cgo_library: str = ""
    """pkg-config name of the C library that the build needs; empty for pure Go."""
    version_variable: str = ""
    """The Go variable with the version, if the build of the project sets one; empty if the source has it."""
    build_time: str = "less than a minute"
    """Duration of a build without caches on two cores (measured)."""

    def fill(self, template: str, machine: str) -> str | None:
        """A template of this table for a machine (name from uname); None if there is no release for the machine."""
        arch = ARCHITECTURES.get(machine)
        return template.format(version=self.version, arch=arch, machine=machine) if arch else None


ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""Machine of uname to architecture of Go, for machines with release assets. On others bkpool builds."""

RELEASES = (
    Release(
        name="buildkit",
        repository="moby/buildkit",
        version="0.34.2",
        min_version="0.17.0",
        min_version_reason="reservedSpace, maxUsedSpace and minFreeSpace of its garbage collection are new in 0.17.0",
        tools={
            Tool.BUILDKITD: Source("github.com/moby/buildkit/cmd/buildkitd", "bin/buildkitd"),
            Tool.BUILDCTL: Source("github.com/moby/buildkit/cmd/buildctl", "bin/buildctl"),
        },
        asset="buildkit-v{version}.linux-{arch}.tar.gz",
        digests_file="buildkit-v{version}.linux-{arch}.provenance.json",
        banner="github.com/moby/buildkit",
        version_variable="github.com/moby/buildkit/version.Version",
        build_time="about 2 minutes",
    ),
    Release(
        name="buildx",
        repository="docker/buildx",
        version="0.38.2",
        min_version="0.13.0",
        min_version_reason="before 0.13.0 its remote driver waited for a worker for ever (docker/buildx#2130)",
        tools={Tool.BUILDX: Source("github.com/docker/buildx/cmd/buildx")},
        asset="buildx-v{version}.linux-{arch}",
        digests_file="checksums.txt",
        banner="github.com/docker/buildx",
        version_args=("version",),
        version_variable="github.com/docker/buildx/version.Version",
        build_time="about a minute",
    ),
    Release(
        name="runc",
        repository="opencontainers/runc",
        version="1.5.2",
        min_version="1.3.3",
        min_version_reason="a build can break out of older ones (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881)",
        tools={Tool.RUNC: Source("github.com/opencontainers/runc")},
        asset="runc.{arch}",
        digests_file="runc.sha256sum",
        banner="runc version",
        # If the kernel has seccomp, buildkitd gives runc a seccomp profile. With a runc that was built without
        # seccomp, every RUN fails with "seccomp: config provided but seccomp not supported".
        feature="libseccomp:",
        tags="seccomp",
        cgo_library="libseccomp",
    ),
    Release(
        name="rootlesskit",
        repository="rootless-containers/rootlesskit",
        version="2.3.6",
        min_version="1.1.0",
        min_version_reason="it finds subordinate ids that are not in /etc/subuid since 1.1.0",
        tools={
            Tool.ROOTLESSKIT: Source("github.com/rootless-containers/rootlesskit/v2/cmd/rootlesskit", "rootlesskit"),
        },
        asset="rootlesskit-{machine}.tar.gz",
        digests_file="SHA256SUMS",
        banner="rootlesskit version",
    ),
    Release(
        name="kind",
        repository="kubernetes-sigs/kind",
        version="0.33.0",
        min_version="0.33.0",
        min_version_reason="a node image works only with the kind release that made it",
        tools={Tool.KIND: Source("sigs.k8s.io/kind")},
        asset="kind-linux-{arch}",
        digests_file="kind-linux-{arch}.sha256sum",
        banner="kind version",
    ),
)

DIGESTS: Mapping[str, str] = {}
"""SHA-256 of release assets, by `<release name>/<asset>`. A digest here comes before the digests file of the release.

It is empty: the releases could not be reached when this table was written, and an unchecked digest is worse than
none. Until it is filled, a download is verified against the digests file of the release. That shows that the download
is complete and as released, but it trusts the host of the release.
"""


def release_of(tool: Tool) -> Release:
    """The release that contains a tool."""
    return next(release for release in RELEASES if tool in release.tools)
