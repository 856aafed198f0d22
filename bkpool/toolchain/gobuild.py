"""Builds tools with the machine's own Go, from the go.mod and go.sum that the package carries.

go.sum pins every source file, so what is built does not depend on the host the sources come from. Nothing is
installed or changed outside the given directory and Go's own caches.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bkpool.core.errors import HostFault
from bkpool.toolchain import packages
from bkpool.toolchain.table import Release, Tool

Report = Callable[[str, float | None], None]

_MODULE = files("bkpool.toolchain") / "gotools"
_LIMIT = 3600.0  # seconds: fifteen times what everything takes on two cores
_SWITCHES = Version("1.21")  # https://go.dev/doc/toolchain: the first Go that fetches the version a go.mod asks for
_PATIENCE = 60.0  # seconds for `go env` and pkg-config, which take milliseconds
_LAST_WORDS = 8  # lines of Go's own output in an error


def required_go() -> Version:
    """The Go version that the module of the tools asks for."""
    match = re.search(r"^go (\S+)$", (_MODULE / "go.mod").read_text(), re.MULTILINE)
    if match is None:  # pragma: no cover - the packaged file is ours
        raise AssertionError("gotools/go.mod has no go line")
    return Version(match[1])


def fault(release: Release) -> HostFault | None:
    """What this machine lacks for building a release; None if nothing is known to be lacking."""
    needed = required_go()
    get_go = f"Install Go {needed} or newer (https://go.dev/dl)."
    if shutil.which("go") is None:
        return HostFault("there is no go on PATH to build it with", hint=get_go)
    have, policy = _go_env("GOVERSION", "GOTOOLCHAIN")
    try:
        version = Version(have.split()[0].removeprefix("go"))
    except (InvalidVersion, IndexError):
        version = None  # a development Go: let it try
    if version is not None and version < needed and (version < _SWITCHES or policy in {"local", "path"}):
        return HostFault(f"go is {version}, building needs {needed}", hint=get_go)
    return _library_fault(release)


def build(release: Release, work: Path, report: Report) -> dict[Tool, Path]:
    """Builds all tools of a release in one run of go.

    Args:
        release: Which.
        work: A directory of our own, on a disk with a gigabyte to spare.
        report: Told what is going on.

    Returns:
        The binaries.

    Raises:
        HostFault: Something is missing, or the build failed; the message has Go's last words.
    """
    if lacking := fault(release):
        raise lacking
    for name in ("go.mod", "go.sum"):
        (work / name).write_bytes((_MODULE / name).read_bytes())
    out = work / "bin"
    out.mkdir()
    stamp = f"-X {release.stamp}=v{release.version}" if release.stamp else ""
    command = ["go", "build", "-v", "-trimpath", "-ldflags", f"-s -w {stamp}", "-tags", release.tags, "-o", f"{out}/"]
    command += [source.package for source in release.tools.values()]
    names = " and ".join(release.tools)
    report(f"building {names} {release.version} with go ({release.effort}, once)", None)
    code, words = _run(command, work, _environment(release, work), report)
    if code != 0:
        raise HostFault(
            f"go could not build {names}: {' | '.join(words) or f'exit code {code}'}",
            hint="Go needs its module proxy or the sources' hosts: see `go env GOPROXY`.",
        )
    return {tool: out / source.package.rpartition("/")[2] for tool, source in release.tools.items()}


def _run(command: list[str], work: Path, environment: dict[str, str], report: Report) -> tuple[int, list[str]]:
    """Runs go; returns its exit code and last lines. With -v it names each package it compiles: a sign of life."""
    words: deque[str] = deque(maxlen=_LAST_WORDS)
    with subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        timer = threading.Timer(_LIMIT, process.kill)
        timer.start()
        try:
            for number, line in enumerate(process.stderr or (), 1):
                words.append(line.strip())
                report(f"building with go, step {number}: {words[-1][:80]}", None)
            process.wait()
        finally:
            timer.cancel()
            timer.join()
            process.kill()  # after its end this does nothing; after an exception it is what ends it
    return process.returncode, list(words)


def _environment(release: Release, work: Path) -> dict[str, str]:
    """The user's own, without what would build for another machine or from another module."""
    kept = {name: value for name, value in os.environ.items() if name not in {"GOOS", "GOARCH"}}
    return kept | {
        "CGO_ENABLED": "1" if release.cgo_library else "0",
        "GOFLAGS": "-mod=readonly",
        "GOWORK": "off",
        "GOTMPDIR": str(work),
    }


def _go_env(*names: str) -> list[str]:
    """What go says of itself, outside any module; empty strings if it cannot."""
    command = ["go", "env", *names]
    try:
        done = subprocess.run(
            command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return [""] * len(names)
    return done.stdout.splitlines()


def _library_fault(release: Release) -> HostFault | None:
    if not release.cgo_library:
        return None
    compiler, finder = _go_env("CC", "PKG_CONFIG")
    programs = (compiler.split() or ["gcc"])[0], finder or "pkg-config"
    lacking = [program for program in programs if shutil.which(program) is None]
    if not lacking:
        query = [programs[1], "--exists", release.cgo_library]
        if subprocess.run(query, check=False, timeout=_PATIENCE).returncode == 0:
            return None
        lacking = [f"the headers of {release.cgo_library}"]
    return HostFault(
        f"building {release.name} needs {' and '.join(lacking)}",
        hint=packages.install("gcc", "pkg-config", release.cgo_library),
    )
