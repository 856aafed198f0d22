"""An earlier version of bkpool as a program: its files from the history, in an environment made from its own lock.

It is made once and kept in bkpool's cache, under a digest of its files. Nothing of today's code is in it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from bkpool.toolchain import default_cache

COMMIT = "2e1c714"
"""The version that homes and custom resources are upgraded from: nothing was released before it. Later: a release."""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class EarlierVersion:
    """Where it is."""

    source: Path
    python: Path

    @property
    def program(self) -> list[str]:
        """Its command line."""
        return [str(self.python), "-m", "bkpool"]

    @property
    def env(self) -> dict[str, str]:
        """What its environment needs."""
        return {"PYTHONPATH": str(self.source), "PYTHONSAFEPATH": "1"}  # nothing from the current directory

    @property
    def definitions(self) -> Path:
        """The directory of its custom resource definitions."""
        return next(self.source.glob("bkpool/**/buildkitpools.yaml")).parent


def earlier_version() -> EarlierVersion:
    """The program of that commit. It is made if it is not in the cache: that takes half a minute."""
    digest = _git("rev-parse", "--verify", "--quiet", f"{COMMIT}^{{tree}}").decode().strip()
    if not digest:
        why = f"the history of this checkout does not have {COMMIT}: git fetch --unshallow"
        (pytest.fail if os.environ.get("BKPOOL_CI") else pytest.skip)(why)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    place = default_cache() / "e2e" / f"bkpool-{COMMIT}-{digest[:12]}-python{version}"
    made = EarlierVersion(place / "source", place / "venv" / "bin" / "python")
    place.mkdir(parents=True, exist_ok=True)
    stamp = place / "made"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            with tarfile.open(fileobj=BytesIO(_git("archive", COMMIT))) as archive:
                archive.extractall(made.source, filter="data")
            base = Path(sys.base_prefix) / "bin" / f"python{version}"
            subprocess.run([base, "-m", "venv", "--clear", place / "venv"], check=True)
            pip = [made.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, "--require-hashes", "-r", made.source / "requirements.lock"], check=True)
            stamp.touch()
    return made


def _git(*command: str) -> bytes:
    return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, check=False).stdout
