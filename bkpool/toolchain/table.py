"""Which tools bkpool uses, in which versions, and where each can be had.

A change of version is made here and in gotools/go.mod together (a test holds them equal). Nothing here does I/O.
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
    """Where one tool is inside its release."""

    package: str
    """Go import path of its main package; the last part is the name of the binary."""
    member: str = ""
    """Its path in the release archive; empty where the asset is the binary itself."""


@dataclass(frozen=True, slots=True)
class Release:
    """One upstream release. Its tools are got together: they come in one archive, or share most of one build."""

    name: str
    repository: str
    """owner/name on GitHub; releases are tagged `v<version>`."""
    version: str
    oldest: str
    """The oldest version on PATH that is used instead of this one."""
    because: str
    """What older ones lack."""
    tools: Mapping[Tool, Source]
    asset: str
    """File name in the release; {version}, {arch} (Go's name) and {machine} (uname's name) are filled in."""
    sums: str
    """The release's own file of digests: lines as sha256sum writes them, or an in-toto statement."""
    banner: str
    """What stands before the version number in the tool's own words."""
    version_args: tuple[str, ...] = ("--version",)
    feature: str = ""
    """What the output of version_args must also contain for a binary to be of use."""
    tags: str = ""
    cgo_library: str = ""
    """pkg-config name of the C library without which the build is of no use; empty: pure Go."""
    stamp: str = ""
    """The Go variable that --version prints, where the project's own build sets it; else its source has it."""
    effort: str = "less than a minute"
    """How long the build takes, cold, on two cores (measured)."""

    def fill(self, template: str, machine: str) -> str | None:
        """A template of this table for a machine (uname's name); None if no release is made for that machine."""
        arch = ARCHITECTURES.get(machine)
        return template.format(version=self.version, arch=arch, machine=machine) if arch else None


ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""uname's machine to Go's architecture, for the machines whose release assets this table names. Others build."""

RELEASES = (
    Release(
        name="buildkit",
        repository="moby/buildkit",
        version="0.34.2",
        oldest="0.17.0",
        because="reservedSpace, maxUsedSpace and minFreeSpace of its garbage collection came with 0.17.0",
        tools={
            Tool.BUILDKITD: Source("github.com/moby/buildkit/cmd/buildkitd", "bin/buildkitd"),
            Tool.BUILDCTL: Source("github.com/moby/buildkit/cmd/buildctl", "bin/buildctl"),
        },
        asset="buildkit-v{version}.linux-{arch}.tar.gz",
        sums="buildkit-v{version}.linux-{arch}.provenance.json",
        banner="github.com/moby/buildkit",
        stamp="github.com/moby/buildkit/version.Version",
        effort="about 2 minutes",
    ),
    Release(
        name="buildx",
        repository="docker/buildx",
        version="0.38.2",
        oldest="0.13.0",
        because="before 0.13.0 its remote driver waited for a worker without end (docker/buildx#2130)",
        tools={Tool.BUILDX: Source("github.com/docker/buildx/cmd/buildx")},
        asset="buildx-v{version}.linux-{arch}",
        sums="checksums.txt",
        banner="github.com/docker/buildx",
        version_args=("version",),
        stamp="github.com/docker/buildx/version.Version",
        effort="about a minute",
    ),
    Release(
        name="runc",
        repository="opencontainers/runc",
        version="1.5.2",
        oldest="1.3.3",
        because="a build can break out of older ones (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881)",
        tools={Tool.RUNC: Source("github.com/opencontainers/runc")},
        asset="runc.{arch}",
        sums="runc.sha256sum",
        banner="runc version",
        # buildkitd hands runc a seccomp profile wherever the kernel has seccomp; a runc built without it then fails
        # every RUN with "seccomp: config provided but seccomp not supported".
        feature="libseccomp:",
        tags="seccomp",
        cgo_library="libseccomp",
    ),
    Release(
        name="rootlesskit",
        repository="rootless-containers/rootlesskit",
        version="2.3.6",
        oldest="1.1.0",
        because="subordinate ids that do not stand in /etc/subuid are found since 1.1.0",
        tools={
            Tool.ROOTLESSKIT: Source("github.com/rootless-containers/rootlesskit/v2/cmd/rootlesskit", "rootlesskit"),
        },
        asset="rootlesskit-{machine}.tar.gz",
        sums="SHA256SUMS",
        banner="rootlesskit version",
    ),
    Release(
        name="kind",
        repository="kubernetes-sigs/kind",
        version="0.33.0",
        oldest="0.33.0",
        because="a node image goes with the kind release that made it",
        tools={Tool.KIND: Source("sigs.k8s.io/kind")},
        asset="kind-linux-{arch}",
        sums="kind-linux-{arch}.sha256sum",
        banner="kind version",
    ),
)

DIGESTS: Mapping[str, str] = {}
"""SHA-256 of release assets, by `<release name>/<asset>`; what stands here is believed before the release's own file.

Empty so far: the releases could not be reached from where this table was written, and a digest that nobody checked
is worse than none. Until it is filled a download is verified against the release's own file of digests, which shows
that it is whole and as released, but trusts the host it comes from.
"""


def release_of(tool: Tool) -> Release:
    """The release that a tool comes with."""
    return next(release for release in RELEASES if tool in release.tools)
