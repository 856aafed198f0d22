"""The cgroups of slots on version 2, and on machines that allow less, in a tree of ordinary files.

These tests show what is written where. They do not show what a kernel with version 2 makes of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bkpool.workers.processes.cgroup_entry import cgroup_mounts, entering
from bkpool.workers.processes.cgroup_limits import Limits
from bkpool.workers.processes.cgroup_tree import Hierarchy, hierarchies
from bkpool.workers.processes.slot_cgroups import SlotCgroups
from support.captured_logs import capture_logs

GIB = 1 << 30
CONTROLLERS = "cpuset cpu io memory pids\n"


class Version2:
    """A machine with cgroup version 2, whose appliance is in a systemd unit."""

    def __init__(self, root: Path, unit: str) -> None:
        self.root = root
        self.top = root / "sys/fs/cgroup"
        self.unit = self.top / unit
        process = root / "proc/self"
        process.mkdir(parents=True)
        (process / "cgroup").write_text(f"0::/{unit}\n")
        (process / "mountinfo").write_text(f"30 25 0:26 / {self.top} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n")
        (process / "oom_score_adj").write_text("-900\n")
        (root / "proc/meminfo").write_text(f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB\n")
        for directory in (self.unit, *self.unit.parents):
            if directory.is_relative_to(self.top):
                self.cgroup(directory)
        (self.top / "cgroup.type").unlink()

    def cgroup(self, directory: Path, subtree_control: str = "") -> Path:
        """Makes a cgroup with the files that the kernel makes."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.controllers").write_text(CONTROLLERS)
        (directory / "cgroup.subtree_control").write_text(subtree_control)
        for name in ("cgroup.type", "memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs"):
            (directory / name).write_text("max\n")
        return directory

    def occupied(self, directory: Path) -> None:
        """Lets the kernel refuse to limit the parts of a cgroup, because other processes are in it."""
        (directory / "cgroup.subtree_control").unlink()
        (directory / "cgroup.subtree_control").mkdir()


@pytest.fixture
def machine(tmp_path: Path) -> Version2:
    return Version2(tmp_path / "machine", "system.slice/bkpool.service")


def make(machine: Version2, tmp_path: Path, parent: Path, limits: Limits = Limits()) -> tuple[list[Path], list[str]]:  # noqa: B008 - immutable
    """The cgroups of a slot, and the reasons in the log."""
    machine.cgroup(parent / "bkpool-home")
    machine.cgroup(parent / "bkpool-home/default.p.0")
    with capture_logs() as lines:
        made = SlotCgroups("home", machine.root).make(tmp_path / "record", "default.p.0", limits)
    return made, [line["reason"] for line in lines if line["event"] == "workers.limits_incomplete"]


def test_the_appliance_moves_into_a_leaf_and_its_slots_are_beside_it(machine, tmp_path):
    (machine.unit / "memory.max").write_text(str(8 * GIB))
    slots, told = make(machine, tmp_path, machine.unit, Limits(memory=GIB))
    assert told == []
    assert (machine.unit / "bkpool-home-appliance/cgroup.procs").read_text() == "0"
    assert (machine.unit / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    together = machine.unit / "bkpool-home"
    assert (together / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    assert (together / "memory.max").read_text() == str(7 * GIB)
    assert (together / "pids.max").read_text() == "max\n"
    assert slots == [together / "default.p.0"]
    assert (slots[0] / "daemon").is_dir()
    assert [(slots[0] / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")] == [
        str(GIB),
        "0",
        "8192",
    ]


def test_where_other_programs_are_in_its_cgroup_one_above_is_taken(tmp_path):
    machine = Version2(tmp_path / "machine", "user.slice/user-0.slice/session-1.scope")
    machine.occupied(machine.unit)
    machine.cgroup(machine.unit.parent, "cpu memory pids\n")
    slots, told = make(machine, tmp_path, machine.unit.parent)
    assert (slots, told) == ([machine.unit.parent / "bkpool-home/default.p.0"], [])
    assert not (machine.unit / "bkpool-home").exists()


def test_no_limit_is_escaped_by_that(tmp_path):
    machine = Version2(tmp_path / "machine", "user.slice/user-0.slice/session-1.scope")
    machine.occupied(machine.unit)
    (machine.unit / "memory.max").write_text(str(GIB))
    machine.cgroup(machine.unit.parent, "cpu memory pids\n")
    slots, told = make(machine, tmp_path, machine.unit)
    assert slots == [machine.unit / "bkpool-home/default.p.0"]
    assert told == [f"other programs run in the appliance's cgroup {machine.unit}"]


def test_a_user_without_a_cgroup_of_their_own_is_told_once_that_limits_do_not_hold(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    cgroups = SlotCgroups("home", machine.root)
    with capture_logs() as lines:
        assert cgroups.make(tmp_path / "record", "default.p.0", Limits()) == []
        assert cgroups.make(tmp_path / "record", "default.p.1", Limits()) == []
    assert [line["reason"] for line in lines] == ["the appliance has no cgroup of its own for cpu, memory, pids"]
    assert "Delegate=yes" in lines[0]["hint"]


def test_a_limit_that_the_kernel_refuses_is_told_and_the_others_are_set(machine, tmp_path):
    refused = machine.cgroup(machine.unit / "bkpool-home/default.p.0") / "memory.max"
    refused.unlink()
    refused.mkdir()
    with capture_logs() as lines:
        cgroups = SlotCgroups("home", machine.root)
        machine.cgroup(machine.unit / "bkpool-home")
        cgroups.make(tmp_path / "record", "default.p.0", Limits(memory=GIB))
    assert [line["reason"] for line in lines] == [f"{refused} cannot be set to {GIB}: Is a directory"]
    assert (refused.parent / "pids.max").read_text() == "8192"


def test_a_record_is_enough_to_remove_cgroups_and_one_that_stays_keeps_it(machine, tmp_path):
    empty = SlotCgroups("home", machine.root).make(tmp_path / "record", "default.p.0", Limits(pids=None))
    (empty[0] / "buildkit/step").mkdir(parents=True)
    for file in (empty[0].parent).glob("*.*"):
        if file.is_file():
            file.unlink()
    other = SlotCgroups("home", machine.root)
    (empty[0] / "busy").write_text("")
    other.remove(tmp_path / "record")
    assert (tmp_path / "record").exists()
    (empty[0] / "busy").unlink()
    other.remove(tmp_path / "record")
    assert not (tmp_path / "record").exists()
    assert not empty[0].parent.exists()
    other.remove(tmp_path / "record")


def test_cgroups_are_removed_though_somebody_has_removed_their_record(machine, tmp_path):
    cgroups = SlotCgroups("home", machine.root)
    slot = tmp_path / "slot"
    slot.mkdir()
    (made,) = cgroups.make(slot / "record", "default.p.0", Limits(pids=None))
    for file in made.parent.glob("*.*"):
        if file.is_file():
            file.unlink()
    (slot / "record").unlink()
    slot.rmdir()
    cgroups.remove(slot / "record")
    assert not made.parent.exists()
    cgroups.remove(slot / "record")


def test_the_score_of_a_worker_is_higher_than_the_appliances(machine):
    cgroups = SlotCgroups("home", machine.root)
    assert cgroups.oom_score_adj == -400
    (machine.root / "proc/self/oom_score_adj").write_text("800")
    assert cgroups.oom_score_adj == 1000


MEMBERSHIP = "4:memory:/docker/abc/unit\n3:cpu,cpuacct:/docker/abc\n2:freezer:/elsewhere\n1:name=systemd:/\n0::/\n"
MOUNTS = """\
25 1 0:20 / /sys/fs/cgroup ro - tmpfs tmpfs ro
26 25 0:21 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
27 25 0:22 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct
28 25 0:23 /docker/abc /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
29 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,release_agent=/x,name=systemd
30 25 0:25 / /sys/fs/cgroup/uni\\040fied rw - cgroup2 cgroup2 rw
31 25 0:21 / /other/memory rw - cgroup cgroup rw,memory
"""
CGROUP = Path("/sys/fs/cgroup")


def test_a_container_finds_its_place_in_each_hierarchy_that_shows_it():
    found = hierarchies(MEMBERSHIP, MOUNTS)
    assert found == (
        Hierarchy("cgroup", ("memory",), CGROUP / "memory", CGROUP / "memory/unit"),
        Hierarchy("cgroup", ("cpu", "cpuacct"), CGROUP / "cpu,cpuacct", CGROUP / "cpu,cpuacct"),
        Hierarchy("cgroup", ("name=systemd",), CGROUP / "systemd", CGROUP / "systemd"),
        Hierarchy("cgroup2", (), CGROUP / "uni fied", CGROUP / "uni fied"),
    )


def test_a_worker_mounts_what_the_machine_has():
    known = [
        Hierarchy("cgroup", ("cpu", "cpuacct"), CGROUP / "cpu,cpuacct", CGROUP / "cpu,cpuacct"),
        Hierarchy("cgroup", ("name=systemd",), CGROUP / "systemd", CGROUP / "systemd"),
        Hierarchy("cgroup2", (), CGROUP / "unified", CGROUP / "unified"),
    ]
    assert [tuple(one.values()) for one in cgroup_mounts(known)] == [
        ("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "cpu,cpuacct"),
        ("/sys/fs/cgroup/systemd", "cgroup", "none,name=systemd"),
        ("/sys/fs/cgroup/unified", "cgroup2", "rw"),
    ]


def test_a_command_runs_also_where_there_is_no_cgroup_for_it():
    assert entering(["true", "--"], [], 500, separate=False)[-4:] == ["500", "--", "true", "--"]
