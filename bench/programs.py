"""Where the programs of the comparison come from: Debian's on PATH, the Go ones built once into bkpool's cache.

Nothing is installed here; `scripts/test bench` does that where it may.
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
    """A program of PATH or of the system's directories, which are not on every user's PATH.

    Raises:
        FaultError: There is none.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise FaultError(f"not installed (Debian: apt-get install {name})")
    return Path(path)


def load() -> Path:
    """The load client, built from its sources here."""
    sources = sorted((HERE / "load").iterdir())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return _built(HERE / "load", ".", f"load-{digest}", cgo=False)


def ghostunnel() -> Path:
    """Ghostunnel, which at this version does not compile without cgo (its PKCS #11 stub lacks a parameter)."""
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
    """The first line of what a program says of itself."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip().splitlines()[0]
