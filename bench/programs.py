"""Finds the programs of the comparison: those of Debian on PATH, and those in Go, built once into bkpool's cache.

It installs nothing. `scripts/test bench` does that if it is allowed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from bench.process import FaultError
from bkpool.toolchain import default_cache

HERE = Path(__file__).parent
GHOSTUNNEL = "github.com/ghostunnel/ghostunnel"
GHOSTUNNEL_VERSION = "v1.8.4"  # as in ghostunnel/go.mod


def found(name: str) -> Path:
    """Returns a program of PATH or of the system's directories, which are not on every user's PATH.

    Raises:
        FaultError: It is not installed.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise FaultError(f"not installed (Debian: apt-get install {name})")
    return Path(path)


def load() -> Path:
    """Builds the load client from its sources, and returns its path."""
    sources = sorted((HERE / "load").iterdir())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return _built(HERE / "load", ".", f"load-{digest}", cgo=False)


def ghostunnel() -> Path:
    """Builds ghostunnel. This version does not compile without cgo (its PKCS #11 stub lacks a parameter)."""
    return _built(HERE / "ghostunnel", GHOSTUNNEL, f"ghostunnel-{GHOSTUNNEL_VERSION}", cgo=True)


def _built(module: Path, package: str, name: str, *, cgo: bool) -> Path:
    target = default_cache() / "bench" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            draft = target.with_name(f"{name}.new")
            environment = {**os.environ, "CGO_ENABLED": "1" if cgo else "0"}
            command: list[str | Path] = [found("go"), "build", "-trimpath", "-o", draft, package]
            done = subprocess.run(command, cwd=module, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise FaultError(f"Go cannot build it: {done.stderr.strip().splitlines()[-1]}")
            draft.rename(target)
    return target


def version(*command: str | Path) -> str:
    """Returns the first line that a program prints about its version."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[0]
