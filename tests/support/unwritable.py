"""A directory that nobody can write, not even root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """Makes a directory and everything in it unwritable. Skips the test where root cannot do that."""
    paths = [directory, *directory.rglob("*")]
    if os.geteuid() != 0:
        modes = [path.stat().st_mode for path in paths]
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for path, mode in zip(paths, modes, strict=True):
                path.chmod(mode)
        return
    try:
        done = subprocess.run(["chattr", "-R", "+i", str(directory)], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no chattr")
    try:
        if done.returncode != 0:
            pytest.skip("this file system has no immutable files")
        yield
    finally:
        subprocess.run(["chattr", "-R", "-i", str(directory)], capture_output=True, check=False)
