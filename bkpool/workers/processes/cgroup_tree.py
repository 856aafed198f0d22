"""Where this process is in the machine's cgroups, version 1, version 2, or both side by side.

It parses two files of proc(5), and makes no cgroup. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted tree of cgroups."""

    kind: str
    """`cgroup` (version 1) or `cgroup2`: the type of its filesystem."""
    names: tuple[str, ...]
    """Version 1: its controllers, or `name=…` if it has none. Version 2: empty."""
    mount: Path
    own: Path
    """The directory of this process's cgroup."""

    @property
    def unified(self) -> bool:
        """Whether this is version 2."""
        return self.kind == "cgroup2"

    @property
    def mount_options(self) -> str:
        """What `mount -o` needs to mount the same hierarchy again."""
        if self.unified:
            return "rw"
        return ",".join(("none", *self.names) if self.names[0].startswith("name=") else self.names)


def hierarchies(membership: str, mounts: str) -> tuple[Hierarchy, ...]:
    """The hierarchies that are mounted and in which this process has a place that can be seen.

    Args:
        membership: The content of /proc/self/cgroup.
        mounts: The content of /proc/self/mountinfo.
    """
    own = dict(_membership(membership))
    found: dict[tuple[str, ...], Hierarchy] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        root, point = (_decode(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        names: tuple[str, ...] = ()
        if kind == "cgroup":
            names = next((known for known in own if known and set(known) <= set(options.split(","))), ())
        if kind not in {"cgroup", "cgroup2"} or (kind == "cgroup") != bool(names) or names not in own:
            continue
        path = PurePosixPath(own[names])
        if path.is_relative_to(root):  # else the mount shows another part of the tree
            inside = Path(point) / path.relative_to(root)
            found.setdefault(names, Hierarchy(kind, names, Path(point), inside))
    return tuple(found.values())


def _membership(text: str) -> list[tuple[tuple[str, ...], str]]:
    """Each hierarchy's names, sorted as the kernel has them, with the path of this process in it (cgroups(7))."""
    rows = (line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2)  # noqa: PLR2004 - three fields
    return [(tuple(name for name in names.split(",") if name), path) for _, names, path in rows]


def _decode(field: str) -> str:
    """Blanks in paths of mountinfo are octal (proc(5))."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), field)
