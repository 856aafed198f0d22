"""Finds a tool or gets it, and installs it into the cache completely or not at all.

Two processes never get the same release at the same time. The next process removes what an interrupted one left.
Finding a tool never uses the network and never builds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.version import Version

from bkpool.core.errors import DiskFull, HostFault
from bkpool.toolchain import download, gobuild
from bkpool.toolchain.progress import ReportProgress, ReportStep
from bkpool.toolchain.table import Release, Tool, release_of
from bkpool.toolchain.versions import Candidate, candidates, default_search_path, version_of


@dataclass(frozen=True, slots=True)
class Found:
    """A tool that this machine has."""

    path: Path
    version: Version
    origin: Literal["PATH", "cache"]


def default_cache() -> Path:
    """$BKPOOL_CACHE, else bkpool/ in the XDG cache directory.

    Raises:
        HostFault: There is no home directory either.
    """
    if own := os.environ.get("BKPOOL_CACHE"):
        return Path(own).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG base directory specification: a relative path is ignored
        return xdg / "bkpool"
    try:
        return Path.home() / ".cache" / "bkpool"
    except RuntimeError:  # neither HOME nor an entry in the user database
        raise HostFault("there is no home directory for the cache", hint="Set BKPOOL_CACHE or HOME.") from None


class Toolchain:
    """The tools of one machine.

    Args:
        cache: bkpool's cache directory; binaries go to `tools/bin/<tool>-<version>` in it.
        search_path: Directories to search first, as in PATH; by default PATH and the plug-in directories of docker.
        mirror: Replaces https://github.com in the addresses of releases; by default $BKPOOL_MIRROR.
        progress: Called with each step while a tool is got.
    """

    def __init__(
        self,
        cache: Path,
        *,
        search_path: str | None = None,
        mirror: str | None = None,
        progress: ReportProgress | None = None,
    ) -> None:
        self.cache = cache
        self._search_path = default_search_path() if search_path is None else search_path
        self._mirror = mirror or os.environ.get("BKPOOL_MIRROR") or download.GITHUB
        self._progress: ReportProgress = progress or (lambda _tool, _text, _fraction: None)
        self._bin = cache / "tools" / "bin"
        self._go_caches = cache / "go"
        self._located: dict[Tool, Found] = {}
        self._unreachable: HostFault | None = None

    def locate(self, tool: Tool) -> Found | None:
        """The tool on PATH if it is new enough, else in the cache; None if it must be got first."""
        found = self._located.get(tool)
        if found is None or not found.path.exists():
            found = self._on_path(tool) or self._in_cache(tool)
            if found is not None:
                self._located[tool] = found
        return found

    def find(self, tool: Tool) -> Path | None:
        """The path of the tool; None if it must be got first. Fast: no network and no build."""
        found = self.locate(tool)
        return found.path if found else None

    def rejected(self, tool: Tool) -> list[Candidate]:
        """Programs on PATH that have the name of the tool and are not used, each with the reason."""
        return [candidate for candidate in candidates(tool, self._search_path) if candidate.problem]

    def ensure(self, tool: Tool) -> Path:
        """The path of the tool. Gets the tool if it is missing, which blocks; a build takes minutes.

        Raises:
            HostFault: ToolMissing (neither a download nor a build worked; the message has both reasons), DiskFull or
                Permission (the cache cannot be written).
            InvalidInput: BKPOOL_MIRROR is not an allowed address.
        """
        return self.ensure_all([tool])[tool]

    def ensure_all(self, tools: Iterable[Tool]) -> dict[Tool, Path]:
        """Like ensure, for several tools. Tools of one release are got together.

        Raises:
            HostFault: As ensure.
            InvalidInput: As ensure.
        """
        return {tool: self.find(tool) or self._acquire(tool) for tool in dict.fromkeys(tools)}

    def clean(self) -> None:
        """Removes what Go has downloaded and compiled. The tools stay.

        Raises:
            HostFault: It cannot be removed.
        """
        try:
            if self._go_caches.exists():
                shutil.rmtree(self._go_caches)
        except OSError as error:
            raise _cache_error(error, self.cache) from error

    def _on_path(self, tool: Tool) -> Found | None:
        for candidate in candidates(tool, self._search_path):
            if candidate.version is not None and not candidate.problem:
                return Found(candidate.path, candidate.version, "PATH")
        return None

    def _in_cache(self, tool: Tool) -> Found | None:
        path = self._target(tool)
        # The file name has the version: a binary gets this name only after it reported that version.
        return Found(path, Version(release_of(tool).version), "cache") if os.access(path, os.X_OK) else None

    def _target(self, tool: Tool) -> Path:
        return self._bin / f"{tool}-{release_of(tool).version}"

    def _acquire(self, tool: Tool) -> Path:
        release = release_of(tool)
        try:
            self._bin.mkdir(parents=True, exist_ok=True)
            with self._locked(release, tool):
                if self._in_cache(tool) is None:  # else the process that had the lock before got it
                    self._remove_leftovers(release)
                    self._get_release(release, tool)
        except OSError as error:
            raise _cache_error(error, self.cache) from error
        return self._target(tool)

    @contextmanager
    def _locked(self, release: Release, tool: Tool) -> Iterator[None]:
        """Holds the lock of a release. The kernel releases it when the process ends, however it ends."""
        with (self._bin.parent / f"{release.name}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._progress(tool, "waiting for another bkpool that gets it", None)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_leftovers(self, release: Release) -> None:
        for leftover in self._bin.glob(f".{release.name}-*"):
            shutil.rmtree(leftover)

    def _get_release(self, release: Release, tool: Tool) -> None:
        failures = [self._unreachable] if self._unreachable else []
        for method in (self._build,) if failures else (self._download, self._build):
            directory = tempfile.TemporaryDirectory(
                prefix=f".{release.name}-", dir=self._bin, ignore_cleanup_errors=True
            )
            with directory as work:
                try:
                    binaries = method(release, tool, Path(work))
                    for binary in binaries.values():
                        _check_version(binary, release)
                except HostFault as failure:
                    self._progress(tool, failure.message, None)
                    failures.append(failure)
                    continue
                self._install(binaries)
            return
        raise HostFault(
            f"{tool} {release.version} is not installed and could not be got: "
            + "; ".join(f.message for f in failures),
            hint=" Or: ".join(one.hint for one in reversed(failures) if one.hint),
            code="ToolMissing",
        )

    def _download(self, release: Release, tool: Tool, work: Path) -> Mapping[Tool, Path]:
        try:
            return download.fetch(release, self._mirror, work, self._reporter(tool))
        except HostFault as fault:
            if fault.code == download.UNREACHABLE:
                self._unreachable = fault  # do not try this host for the next release
            raise

    def _build(self, release: Release, tool: Tool, work: Path) -> Mapping[Tool, Path]:
        return gobuild.build(release, work, self._go_caches, self._reporter(tool))

    def _reporter(self, tool: Tool) -> ReportStep:
        return lambda text, fraction: self._progress(tool, text, fraction)

    def _install(self, binaries: Mapping[Tool, Path]) -> None:
        for tool, binary in binaries.items():
            _sync(binary)
            binary.replace(self._target(tool))
            self._progress(tool, "installed", 1.0)
        _sync(self._bin)


def _check_version(binary: Path, release: Release) -> None:
    """Raises HostFault unless the binary runs here and reports the expected version."""
    binary.chmod(0o755)
    try:
        version = version_of(binary, release)
    except OSError as error:
        raise HostFault(
            f"{binary.name} from the {release.name} release cannot be run ({error.strerror})",
            hint="Set BKPOOL_CACHE to a directory from which programs can run (not mounted noexec).",
        ) from error
    if version != Version(release.version):
        raise HostFault(
            f"the binary {binary.name} {release.version} reports the version {version or 'of another program'}"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cache_error(error: OSError, cache: Path) -> HostFault:
    message = f"the cache {cache} cannot be written: {error.strerror or error}"
    elsewhere = "or set BKPOOL_CACHE to another directory."
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskFull(message, hint=f"Free 1 GB of disk space, {elsewhere}")
    return HostFault(message, hint=f"Make it writable, {elsewhere}", code="Permission")
