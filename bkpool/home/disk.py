"""Whether a file system has room, and the error that says where it has none.

A full disk is no defect, and it passes: whoever gets this error goes on, and tries again later.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from bkpool.core.errors import DiskFull

RESERVE = 1024 * 1024
"""Bytes. With less, nothing new is begun, so that the rest is there for what has begun: to end a lease is a write."""


def is_full(error: OSError) -> bool:
    """Whether a write failed because there is no room for it."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


def disk_full(path: Path, *, quota: bool = False) -> DiskFull:
    """The error for something that could not be written.

    Args:
        path: What, or the directory that it is in.
        quota: Whether the user's quota is used up, and not the file system.
    """
    place = _mount_point(path)
    what = f"your quota on the file system {place} is used up" if quota else f"the file system {place} is full"
    if not quota and _has_no_inodes(place):
        what = f"the file system {place} has no inodes left (df -i)"
    return DiskFull(
        f"{path} cannot be written: {what}",
        hint=f"Free some space there; `du -xhd3 {place} | sort -h` shows what takes it. Nothing that is stored is "
        "lost, and an appliance that runs goes on by itself.",
    )


def fault_if_full(path: Path, reserve: int = RESERVE) -> DiskFull | None:
    """The error if the file system of a path has less room than this, else None."""
    try:
        room = _room(path)
    except OSError:  # whoever uses the path gets the error
        return None
    # Some file systems do not count inodes, and report none at all.
    full = room.f_bavail * room.f_frsize < reserve or (room.f_files and not room.f_favail)
    return disk_full(path) if full else None


def _room(path: Path) -> os.statvfs_result:
    try:
        return os.statvfs(path)  # one call: every lease asks
    except FileNotFoundError:
        return os.statvfs(_existing(path))


def _mount_point(path: Path) -> Path:
    place = _existing(path)
    while not place.is_mount() and place != place.parent:
        place = place.parent
    return place


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()


def _has_no_inodes(place: Path) -> bool:
    try:
        room = os.statvfs(place)
    except OSError:
        return False
    return bool(room.f_files) and not room.f_favail
