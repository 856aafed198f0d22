"""A real file system that is easily full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_FILL = "fill"


@contextmanager
def small_disk(place: Path, size: str, *options: str) -> Iterator[Path]:
    """Mounts a tmpfs at a new directory. Skips the test where this user can mount nothing, not even with sudo.

    Args:
        place: The directory.
        size: Its size, such as 4m.
        options: Of tmpfs(5).
    """
    place.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    wanted = ",".join([f"size={size},mode=0700,uid={os.geteuid()},gid={os.getegid()}", *options])
    try:
        subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", wanted, "none", str(place)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user can mount no file system")
    try:
        yield place
    finally:
        # Lazily: a killed process may hold a file for another moment.
        subprocess.run([*sudo, "umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    """Writes until there is no room."""
    with (disk / _FILL).open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def make_room(disk: Path) -> None:
    """Removes what `fill` has written."""
    (disk / _FILL).unlink()
