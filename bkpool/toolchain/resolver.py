"""The order in which a tool is looked for and got, and how it comes into the cache: whole, or not at all.

Two processes never get the same release at once, and what an interrupted one left is swept by the next. Finding never
uses the network and never builds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from packaging.version import Version

from bkpool.core.errors import HostFault
from bkpool.toolchain import download, gobuild
from bkpool.toolchain.table import Release, Tool, release_of
from bkpool.toolchain.versions import Candidate, candidates, default_search_path, version_of


class ReportProgress(Protocol):
    """What a long get calls, so that somebody can show it; it may be called from any thread that calls ensure."""

    def __call__(self, tool: Tool, text: str, fraction: float | None) -> None:
        """Tells what is being done for a tool, and how much of it is done (0 to 1; None: nobody knows)."""


@dataclass(frozen=True, slots=True)
class Found:
    """A tool that is there."""

    path: Path
    version: Version
    origin: Literal["PATH", "cache"]


def default_cache() -> Path:
    """$BKPOOL_CACHE, else bkpool/ in the XDG cache directory.

    Raises:
        HostFault: There is neither, nor a home directory.
    """
    if own := os.environ.get("BKPOOL_CACHE"):
        return Path(own).absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG base directory specification: a relative path is to be ignored
        return xdg / "bkpool"
    try:
        return Path.home() / ".cache" / "bkpool"
    except RuntimeError:  # neither HOME nor an entry in the user database
        raise HostFault("there is no home directory for a cache", hint="Set BKPOOL_CACHE or HOME.") from None


class Toolchain:
    """The tools of one machine.

    Args:
        cache: bkpool's cache directory; binaries go to `tools/bin/<tool>-<version>` in it.
        search_path: Directories to look in first, as in PATH; by default PATH and docker's plug-in directories.
        mirror: What stands in for https://github.com in the addresses of releases; by default $BKPOOL_MIRROR.
        progress: Told what is going on while something is got.
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
        self._located: dict[Tool, Found] = {}
        self._unreachable: HostFault | None = None

    def locate(self, tool: Tool) -> Found | None:
        """The tool on PATH, where new enough, else in the cache; None if it would have to be got."""
        found = self._located.get(tool)
        if found is None or not found.path.exists():
            found = self._on_path(tool) or self._in_cache(tool)
            if found is not None:
                self._located[tool] = found
        return found

    def find(self, tool: Tool) -> Path | None:
        """Where the tool is; None if it would have to be got. Fast: no network, no building."""
        found = self.locate(tool)
        return found.path if found else None

    def rejected(self, tool: Tool) -> list[Candidate]:
        """The programs on PATH that have the tool's name and are not used, each with the reason."""
        return [candidate for candidate in candidates(tool, self._search_path) if candidate.fault]

    def ensure(self, tool: Tool) -> Path:
        """Where the tool is, after getting it if need be. Blocks: for minutes, where it is built.

        Raises:
            HostFault: ToolMissing (neither a download nor a build worked; the message has both reasons), DiskFull or
                Permission (the cache cannot be written).
            InvalidInput: BKPOOL_MIRROR is not an address that may be used.
        """
        return self.ensure_all([tool])[tool]

    def ensure_all(self, tools: Iterable[Tool]) -> dict[Tool, Path]:
        """As ensure, for several tools; those of one release are got together.

        Raises:
            HostFault: As ensure.
            InvalidInput: As ensure.
        """
        return {tool: self.find(tool) or self._get(tool) for tool in dict.fromkeys(tools)}

    def _on_path(self, tool: Tool) -> Found | None:
        for candidate in candidates(tool, self._search_path):
            if candidate.version is not None and not candidate.fault:
                return Found(candidate.path, candidate.version, "PATH")
        return None

    def _in_cache(self, tool: Tool) -> Found | None:
        path = self._target(tool)
        # Its name says its version: only a binary that said so itself was given that name.
        return Found(path, Version(release_of(tool).version), "cache") if os.access(path, os.X_OK) else None

    def _target(self, tool: Tool) -> Path:
        return self._bin / f"{tool}-{release_of(tool).version}"

    def _get(self, tool: Tool) -> Path:
        release = release_of(tool)
        try:
            self._bin.mkdir(parents=True, exist_ok=True)
            with self._alone(release, tool):
                if self._in_cache(tool) is None:  # else whoever had the lock before us got it
                    self._sweep(release)
                    self._make(release, tool)
        except OSError as error:
            raise _cache_fault(error, self.cache) from error
        return self._target(tool)

    @contextmanager
    def _alone(self, release: Release, tool: Tool) -> Iterator[None]:
        """Holds the lock of a release; the kernel lets go of it however the process ends."""
        with (self._bin.parent / f"{release.name}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._progress(tool, "waiting for another bkpool that is getting it", None)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self, release: Release) -> None:
        for left in self._bin.glob(f".{release.name}-*"):
            shutil.rmtree(left)

    def _make(self, release: Release, tool: Tool) -> None:
        faults = [self._unreachable] if self._unreachable else []
        for way in (self._build,) if faults else (self._download, self._build):
            place = tempfile.TemporaryDirectory(prefix=f".{release.name}-", dir=self._bin, ignore_cleanup_errors=True)
            with place as work:
                try:
                    binaries = way(release, tool, Path(work))
                    for binary in binaries.values():
                        _check(binary, release)
                except HostFault as fault:
                    self._progress(tool, fault.message, None)
                    faults.append(fault)
                    continue
                self._install(binaries)
            return
        raise HostFault(
            f"{tool} {release.version} is not here and could not be got: " + "; ".join(f.message for f in faults),
            hint=" Or: ".join(fault.hint for fault in reversed(faults) if fault.hint),
            code="ToolMissing",
        )

    def _download(self, release: Release, tool: Tool, work: Path) -> Mapping[Tool, Path]:
        try:
            return download.fetch(release, self._mirror, work, self._reporter(tool))
        except HostFault as fault:
            if fault.code == download.UNREACHABLE:
                self._unreachable = fault  # nor for the next release
            raise

    def _build(self, release: Release, tool: Tool, work: Path) -> Mapping[Tool, Path]:
        return gobuild.build(release, work, self._reporter(tool))

    def _reporter(self, tool: Tool) -> Callable[[str, float | None], None]:
        return lambda text, fraction: self._progress(tool, text, fraction)

    def _install(self, binaries: Mapping[Tool, Path]) -> None:
        for tool, binary in binaries.items():
            _sync(binary)
            binary.replace(self._target(tool))
            self._progress(tool, "installed", 1.0)
        _sync(self._bin)


def _check(binary: Path, release: Release) -> None:
    """Raises HostFault unless this runs here and says that it is what it should be."""
    binary.chmod(0o755)
    try:
        version = version_of(binary, release)
    except OSError as error:
        raise HostFault(
            f"{binary.name} from the {release.name} release cannot be run here ({error.strerror})",
            hint="Set BKPOOL_CACHE to a directory from which programs may be run (not mounted noexec).",
        ) from error
    if version != Version(release.version):
        raise HostFault(f"what came as {binary.name} {release.version} says that it is {version or 'something else'}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cache_fault(error: OSError, cache: Path) -> HostFault:
    told = f"the cache {cache} cannot be written: {error.strerror or error}"
    elsewhere = "or set BKPOOL_CACHE to another directory."
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return HostFault(told, hint=f"Free 1 GB of disk there, {elsewhere}", code="DiskFull")
    return HostFault(told, hint=f"Make it writable, {elsewhere}", code="Permission")
