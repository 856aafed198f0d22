"""A finding about this machine, and the facts from which findings are made.

All facts are arguments, so that a test can describe any machine. Nothing here decides whether a fact is good.
"""

from __future__ import annotations

import os
import pwd
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `bkpool doctor`."""

    name: str
    ok: bool | None
    """False: bkpool does not work. None: bkpool works with a restriction, which the detail describes."""
    detail: str
    fix: str = ""
    """What to do; empty if nothing has to be done."""


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container may have any user id
        return str(os.geteuid())


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine and the user to check; by default this machine and user."""

    root: Path = Path("/")
    """The directory with /proc, /sys and /etc."""
    uid: int = field(default_factory=os.geteuid)
    user: str = field(default_factory=_own_name)
    machine: str = field(default_factory=lambda: os.uname().machine)
    search_path: str = field(default_factory=lambda: os.environ.get("PATH", os.defpath))
    python: tuple[int, int] = sys.version_info[:2]
    descriptors: tuple[int, int] = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE))
    """The soft and the hard limit of open file descriptors; -1 stands for none."""

    def read(self, path: str) -> str | None:
        """The text of a file, named without the leading slash; None if it does not exist or cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The number in a file of the kernel; None if it cannot be read or is not a number."""
        try:
            return int(self.read(path) or "")
        except ValueError:
            return None
