"""The Pythons of this machine, for tests that run on several. It installs none."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

SUPPORTED = ("3.11", "3.12", "3.13")
"""The versions of Python that bkpool is tested on."""


def interpreters(versions: Iterable[str]) -> dict[str, str]:
    """The interpreters of these versions ("3.12") that run: on PATH, or installed by pyenv.

    Each is tried: a shim of pyenv is on PATH also for a version that is not active, and fails when it is called.

    Returns:
        The path of one interpreter for each version that was found.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = {}
    for version in versions:
        name = f"python{version}"
        for candidate in (shutil.which(name), *sorted(map(str, pyenv.glob(f"versions/*/bin/{name}")))):
            if candidate and _runs(candidate):
                found[version] = candidate
                break
    return found


def _runs(interpreter: str) -> bool:
    return subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode == 0
