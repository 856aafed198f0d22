"""The mounts of a worker of root, in its own mount namespace. They end with it, and no one else sees them."""

from __future__ import annotations

from pathlib import Path

from . import MountSettings
from .kernel import MS_BIND, checked, libc

_MNT_DETACH = 2  # sys/mount.h
_RUNC, _CGROUPS = "/run/runc", "/sys/fs/cgroup"


def mount_all(settings: MountSettings) -> None:
    """Makes the mounts.

    runc as root keeps its state in /run/runc. Here that is a tmpfs, so it ends with the daemon. ssh, which git starts
    for a private repository, takes root's home from /etc/passwd and not from HOME. Here both are the same, so it
    finds no key of the host. The cgroups are mounted again, so that every path in there begins at the worker's own.
    """
    _mount("tmpfs", _RUNC, "mode=700")
    passwd = Path(_RUNC, "passwd")
    passwd.write_text(f"root:x:0:0:root:{settings['home']}:/bin/sh\n")
    checked(libc.mount(bytes(passwd), b"/etc/passwd", None, MS_BIND, None), "/etc/passwd")
    if settings["cgroups"]:
        checked(libc.umount2(_CGROUPS.encode(), _MNT_DETACH), "a mount namespace without the host's cgroups")
        _mount("tmpfs", _CGROUPS, "mode=755")
        for one in settings["cgroups"]:
            _mount(one["kind"], one["target"], one["options"])


def _mount(kind: str, target: str, options: str) -> None:
    Path(target).mkdir(parents=True, exist_ok=True)
    checked(libc.mount(b"bkpool", target.encode(), kind.encode(), 0, options.encode()), target)
