"""A finding about this machine, and what the findings are made from.

Everything that is read of the machine is an argument here, so that a test can show any machine. Nothing here judges.
"""

from __future__ import annotations

import os
import pwd
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `bkpool doctor`."""

    name: str
    ok: bool | None
    """False: bkpool does not work so; None: it does, with what the detail says against it."""
    detail: str
    fix: str = ""
    """What to do about it; empty where nothing has to be done."""


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's arbitrary user id
        return str(os.geteuid())


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine and the user that are looked at; by default this one."""

    root: Path = Path("/")
    """Where /proc, /sys and /etc are looked for."""
    uid: int = field(default_factory=os.geteuid)
    user: str = field(default_factory=_own_name)
    machine: str = field(default_factory=lambda: os.uname().machine)
    search_path: str = field(default_factory=lambda: os.environ.get("PATH", os.defpath))
    python: tuple[int, int] = sys.version_info[:2]

    def read(self, path: str) -> str | None:
        """The text of a file, given without the leading slash; None where there is none or it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The number that a file of the kernel holds; None as for read, or where it holds something else."""
        try:
            return int(self.read(path) or "")
        except ValueError:
            return None
