"""Package names for the package manager of this machine, so that a hint can be copied into a shell."""

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
    """The command that installs these packages (keys of the table); for an unknown package manager that of Debian."""
    manager = next((name for name in _COMMANDS if shutil.which(name)), "apt-get")
    return f"Run as root: {_COMMANDS[manager]} {' '.join(_NAMES[manager][one] for one in wanted)}"
