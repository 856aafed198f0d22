"""What a missing thing is called by this machine's package manager, so that a hint can be pasted."""

from __future__ import annotations

import shutil

_NAMES = {
    "apt-get": {
        "gcc": "gcc libc6-dev",
        "pkg-config": "pkg-config",
        "libseccomp": "libseccomp-dev",
        "newuidmap": "uidmap",
        "qemu": "qemu-user-static",
    },
    "dnf": {
        "gcc": "gcc",
        "pkg-config": "pkgconf-pkg-config",
        "libseccomp": "libseccomp-devel",
        "newuidmap": "shadow-utils",
        "qemu": "qemu-user-static",
    },
    "apk": {
        "gcc": "build-base",
        "pkg-config": "pkgconf",
        "libseccomp": "libseccomp-dev",
        "newuidmap": "shadow-uidmap",
        "qemu": "qemu-openrc",
    },
}
_COMMANDS = {"apt-get": "apt-get install", "dnf": "dnf install", "apk": "apk add"}


def install(*wanted: str) -> str:
    """A command that installs these (names as in the table) here; Debian's where the package manager is unknown."""
    manager = next((name for name in _COMMANDS if shutil.which(name)), "apt-get")
    return f"Run as root: {_COMMANDS[manager]} {' '.join(_NAMES[manager][one] for one in wanted)}"
