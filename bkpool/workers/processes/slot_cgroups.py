"""The cgroups of slots: makes them below the appliance's own cgroup, limits them and removes them.

So what limits the appliance, such as MemoryMax of a systemd unit, limits its workers too. A machine that allows less
than this is no error: one line of the log says which limits do not hold. Nothing here starts or ends a process.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import structlog

from bkpool.workers.processes.cgroup_limits import Limits, files, together
from bkpool.workers.processes.cgroup_tree import Hierarchy, hierarchies

log = structlog.get_logger(__name__)

LEAF = "daemon"
"""The part of a slot's cgroup with buildkitd itself. In version 2 only a cgroup without processes can have parts that
are limited, and build steps get such parts."""

_LIMITING = ("cpu", "memory", "pids")
_FEW, _ALL = 50, 0.1  # attempts to remove a cgroup whose last process just ended, and seconds for all of them
_DELEGATE = "Run bkpool in a systemd unit of its own with Delegate=yes."


@dataclass(frozen=True, slots=True)
class _Place:
    """A hierarchy, and the cgroup in it that gets the slots."""

    hierarchy: Hierarchy
    parent: Path


class SlotCgroups:
    """The cgroups of one home.

    Args:
        digest: A name for the home.
        root: The directory with /proc and /sys; tests have their own.
    """

    def __init__(self, digest: str, root: Path = Path("/")) -> None:
        self._name = f"bkpool-{digest}"
        self._root = root
        self._told: set[str] = set()
        self._made: dict[Path, list[Path]] = {}
        """By record: what it says, because somebody may remove the slot with the record."""

    @cached_property
    def hierarchies(self) -> tuple[Hierarchy, ...]:
        """The hierarchies that are mounted in /sys/fs/cgroup."""
        process = self._root / "proc/self"
        found = hierarchies((process / "cgroup").read_text(), (process / "mountinfo").read_text())
        top = self._root / "sys/fs/cgroup"
        return tuple(hierarchy for hierarchy in found if hierarchy.mount.is_relative_to(top))

    @property
    def oom_score_adj(self) -> int:
        """That of a worker: if the machine has no memory left, the kernel ends a build before the appliance."""
        own = int((self._root / "proc/self/oom_score_adj").read_text())
        return min(own + 500, 1000)

    def make(self, record: Path, slot: str, limits: Limits) -> list[Path]:
        """Makes the cgroups of a slot.

        Args:
            record: A file that then has the cgroups' names, for `remove`. It is written first.
            slot: The last part of their names.
            limits: The limits of this slot.

        Returns:
            The directories of the cgroups, one in each hierarchy. A process that enters one goes on into its LEAF.
        """
        places = self._places
        wanted = [place.parent / self._name / slot for place in places]
        record.write_text(json.dumps([str(path) for path in wanted]))
        self._made[record] = wanted
        made = []
        for place, path in zip(places, wanted, strict=True):
            unified = place.hierarchy.unified
            try:
                for directory in (path.parent, path, path / LEAF):
                    directory.mkdir(exist_ok=True)
                    _inherit_cpuset(directory)
                if unified:
                    _enable(path.parent)
            except OSError as error:
                self._tell(f"{path} cannot be made: {error.strerror}", "Run bkpool doctor.")
                continue
            self._limit(place, path.parent, self._together)
            self._limit(place, path, limits)
            made.append(path)
        return made

    def remove(self, record: Path) -> None:
        """Removes the cgroups that the record names, and what is empty then above them. It waits 0.1 s at most."""
        try:
            slots = [Path(path) for path in json.loads(record.read_bytes())]
        except (OSError, ValueError):
            slots = self._made.get(record, [])
        for slot in slots:
            _remove_tree(slot)
        self._remove_empty({slot.parent for slot in slots})
        if not any(slot.exists() for slot in slots):
            self._made.pop(record, None)
            with suppress(NotADirectoryError):
                record.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the cgroup of all slots if there is none any more, and takes the appliance back to where it was."""
        if "_places" in vars(self):
            self._remove_empty({place.parent / self._name for place in self._places})
            del self._places

    @cached_property
    def _places(self) -> list[_Place]:
        found = []
        for hierarchy in self.hierarchies:
            parent = hierarchy.own
            if hierarchy.unified and _available(parent):
                parent = self._with_controllers(hierarchy) or parent
            if os.access(parent, os.W_OK):
                found.append(_Place(hierarchy, parent))
        names = {name for place in found for name in (*place.hierarchy.names, *_available(place.parent))}
        if missing := [name for name in _LIMITING if name not in names]:
            self._tell(f"the appliance has no cgroup of its own for {', '.join(missing)}", _DELEGATE)
        return found

    def _with_controllers(self, hierarchy: Hierarchy) -> Path | None:
        """Version 2: the cgroup in which the limits of slots can be set.

        The appliance moves itself into a leaf for that. If other programs are in its cgroup, a cgroup above is taken,
        as long as that escapes no limit.
        """
        own = hierarchy.own
        leaf = own / f"{self._name}-appliance"
        with suppress(OSError):
            if (own / "cgroup.type").exists():  # not the machine's root, which may have processes and parts
                leaf.mkdir(exist_ok=True)
                (leaf / "cgroup.procs").write_text("0")
            _enable(own)
            return own
        with suppress(OSError):
            (own / "cgroup.procs").write_text("0")
            leaf.rmdir()
        for below, above in zip((own, *own.parents), own.parents, strict=False):
            if not above.is_relative_to(hierarchy.mount) or _is_limited(below):
                break
            if set(_LIMITING) <= set(_words(above / "cgroup.subtree_control")) and os.access(above, os.W_OK):
                return above
        self._tell(f"other programs run in the appliance's cgroup {own}", _DELEGATE)
        return None

    @cached_property
    def _together(self) -> Limits:
        memory = (self._root / "proc/meminfo").read_text().partition("MemTotal:")[2].split()[0]
        own = [limit for hierarchy in self.hierarchies for limit in _memory_limits(hierarchy)]
        return together(int(memory) * 1024, min(own, default=None))

    def _limit(self, place: _Place, directory: Path, limits: Limits) -> None:
        available = place.hierarchy.names or _available(directory)
        for controller, file, content in files(limits, unified=place.hierarchy.unified):
            if controller in available:
                try:
                    (directory / file).write_text(content)
                except FileNotFoundError:  # a kernel without limits of swap, or without quotas
                    continue
                except OSError as error:
                    self._tell(f"{directory / file} cannot be set to {content}: {error.strerror}", _DELEGATE)

    def _remove_empty(self, parents: Iterable[Path]) -> None:
        for parent in parents:
            with suppress(OSError):  # it has other slots, or is gone already
                parent.rmdir()
            leaf = parent.with_name(f"{self._name}-appliance")
            if not parent.exists() and leaf.exists():
                with suppress(OSError):
                    _enable(parent.parent, "-")
                    (parent.parent / "cgroup.procs").write_text("0")
                    leaf.rmdir()

    def _tell(self, reason: str, hint: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            log.warning("workers.limits_incomplete", reason=reason, hint=hint)


def _available(cgroup: Path) -> list[str]:
    """Version 2: the controllers of a cgroup that have limits for us; in version 1 none."""
    return [name for name in _words(cgroup / "cgroup.controllers") if name in _LIMITING]


def _enable(cgroup: Path, sign: str = "+") -> None:
    """Version 2: lets the parts of a cgroup be limited, as far as it is limited itself."""
    if names := _available(cgroup):
        (cgroup / "cgroup.subtree_control").write_text(" ".join(f"{sign}{name}" for name in names))


def _inherit_cpuset(cgroup: Path) -> None:
    """Version 1: a new cpuset has no CPU and no memory, and so cannot have a process."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        with suppress(FileNotFoundError):
            if not (cgroup / file).read_text().strip():
                (cgroup / file).write_text((cgroup.parent / file).read_text().strip())


def _is_limited(cgroup: Path) -> bool:
    return any((_words(cgroup / file) or ["max"])[0] != "max" for file in ("memory.max", "pids.max", "cpu.max"))


def _memory_limits(hierarchy: Hierarchy) -> Iterator[int]:
    """The limits of the appliance's own cgroup and of those above it, as far as they can be seen."""
    file = "memory.max" if hierarchy.unified else "memory.limit_in_bytes"
    for cgroup in (hierarchy.own, *hierarchy.own.parents):
        if not cgroup.is_relative_to(hierarchy.mount):
            break
        if (words := _words(cgroup / file)) and words[0].isdigit():
            yield int(words[0])


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _remove_tree(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        for _ in range(_FEW):
            try:
                Path(folder).rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:  # gone already, or this is no cgroup
                    break
                time.sleep(_ALL / _FEW)  # the kernel has not yet let go of a process that has just ended
            else:
                break
