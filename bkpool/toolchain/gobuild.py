"""Builds tools with the Go of this machine, from the go.mod and go.sum in the package.

go.sum pins every source file, so the result does not depend on the host of the sources. Nothing is changed outside
the given directory and the caches of Go.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from collections import deque
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bkpool.core.errors import HostFault
from bkpool.toolchain import packages
from bkpool.toolchain.progress import ReportStep
from bkpool.toolchain.table import Release, Tool

_MODULE = files("bkpool.toolchain") / "gotools"
_BUILD_TIMEOUT = 3600.0  # seconds: fifteen times the build of all tools on two cores
_FETCHING_GO = Version(
    "1.21"
)  # https://go.dev/doc/toolchain: the first Go that fetches the version a go.mod asks for
_QUERY_TIMEOUT = 60.0  # seconds for `go env` and pkg-config, which take milliseconds
_ERROR_LINES = 8  # of the output of Go in an error


def required_go() -> Version:
    """The Go version that the go.mod of the tools requires."""
    match = re.search(r"^go (\S+)$", (_MODULE / "go.mod").read_text(), re.MULTILINE)
    if match is None:  # pragma: no cover - the file is part of the package
        raise AssertionError("gotools/go.mod has no go line")
    return Version(match[1])


def missing_for(release: Release) -> HostFault | None:
    """What this machine lacks to build a release; None if nothing is known to be missing."""
    needed = required_go()
    get_go = f"Install Go {needed} or newer (https://go.dev/dl)."
    if shutil.which("go") is None:
        return HostFault("go is not on PATH, so bkpool cannot build it", hint=get_go)
    installed, policy = _go_env("GOVERSION", "GOTOOLCHAIN")
    try:
        version = Version(installed.split()[0].removeprefix("go"))
    except (InvalidVersion, IndexError):
        version = None  # a development version of Go: it may work
    if version is not None and version < needed and (version < _FETCHING_GO or policy in {"local", "path"}):
        return HostFault(f"go has the version {version}, but the build needs {needed}", hint=get_go)
    return _missing_library(release)


def build(release: Release, work: Path, caches: Path, report: ReportStep) -> dict[Tool, Path]:
    """Builds all tools of a release in one run of go.

    Args:
        release: The release.
        work: A private directory on a disk with 1 GB of free space.
        caches: The directory for what Go downloads and compiles. It stays, and may be removed at any time.
        report: Called with each step.

    Returns:
        The binaries.

    Raises:
        HostFault: Something is missing, or the build failed; the message has the last lines of Go's output.
    """
    if missing := missing_for(release):
        raise missing
    for name in ("go.mod", "go.sum"):
        (work / name).write_bytes((_MODULE / name).read_bytes())
    out = work / "bin"
    out.mkdir()
    stamp = f"-X {release.version_variable}=v{release.version}" if release.version_variable else ""
    command = ["go", "build", "-v", "-trimpath", "-ldflags", f"-s -w {stamp}", "-tags", release.tags, "-o", f"{out}/"]
    command += [source.package for source in release.tools.values()]
    names = " and ".join(release.tools)
    report(f"building {names} {release.version} with go ({release.build_time}, once)", None)
    code, lines = _run(command, work, _environment(release, work, caches), report)
    if code != 0:
        raise HostFault(
            f"go could not build {names}: {' | '.join(lines) or f'exit code {code}'}",
            hint="Go must reach its module proxy or the hosts of the sources: see `go env GOPROXY`.",
        )
    return {tool: out / source.package.rpartition("/")[2] for tool, source in release.tools.items()}


def _run(command: list[str], work: Path, environment: dict[str, str], report: ReportStep) -> tuple[int, list[str]]:
    """Runs go and returns its exit code and last lines. With -v it prints each package, which shows progress."""
    lines: deque[str] = deque(maxlen=_ERROR_LINES)
    with subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        timer = threading.Timer(_BUILD_TIMEOUT, _end, [process])
        timer.start()
        try:
            for number, line in enumerate(process.stderr or (), 1):
                lines.append(line.strip())
                report(f"building with go, step {number}: {lines[-1][:80]}", None)
            process.wait()
        finally:
            timer.cancel()
            timer.join()
            _end(process)  # does nothing after its end; after an exception it ends go
    return process.returncode, list(lines)


def _end(process: subprocess.Popen[str]) -> None:
    """Kills go with the compilers that it has started: they hold the other end of its output."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _environment(release: Release, work: Path, caches: Path) -> dict[str, str]:
    """The environment of the user, without variables that choose another machine or another module.

    What Go keeps is ours, so that it can be removed: nothing goes to ~/go, unless a variable says where. Modules that
    the user has already are read from there.
    """
    kept = {name: value for name, value in os.environ.items() if name not in {"GOOS", "GOARCH"}}
    modules, proxy = _go_env("GOMODCACHE", "GOPROXY")
    downloaded = Path(modules or "/nonexistent", "cache", "download")
    sources = [f"file://{downloaded}"] if downloaded.is_dir() else []
    own = {"GOMODCACHE": str(caches / "modules"), "GOCACHE": str(caches / "build")}
    return {**own, **kept} | {
        "GOPATH": str(caches),
        "GOPROXY": ",".join([*sources, proxy]) if proxy else kept.get("GOPROXY", ""),
        "CGO_ENABLED": "1" if release.cgo_library else "0",
        "GOFLAGS": "-mod=readonly -modcacherw",
        "GOWORK": "off",
        "GOTMPDIR": str(work),
    }


def _go_env(*names: str) -> list[str]:
    """Values of `go env` outside any module; empty strings if go fails."""
    command = ["go", "env", *names]
    try:
        done = subprocess.run(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [""] * len(names)
    return done.stdout.splitlines()


def _missing_library(release: Release) -> HostFault | None:
    if not release.cgo_library:
        return None
    compiler, finder = _go_env("CC", "PKG_CONFIG")
    programs = (compiler.split() or ["gcc"])[0], finder or "pkg-config"
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        query = [programs[1], "--exists", release.cgo_library]
        if subprocess.run(query, check=False, timeout=_QUERY_TIMEOUT).returncode == 0:
            return None
        missing = [f"the headers of {release.cgo_library}"]
    return HostFault(
        f"building {release.name} needs {' and '.join(missing)}",
        hint=packages.install("gcc", "pkg-config", release.cgo_library),
    )
