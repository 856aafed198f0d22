"""Builds that try to leave their slot's cgroup or to take more than it gives, on the cgroups of this machine."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bkpool.core.names import Slot
from bkpool.home.runtime_directory import home_digest
from bkpool.workers.processes.runtime import Binaries, ProcessLimits, ProcessRuntime
from bkpool.workers.processes.slot_files import SlotFiles
from support.objects import pool as a_pool
from support.processes import LONG_STEPS, steps_that_sleep, until_step_sleeps

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no cgroup here"), pytest.mark.slow]
SLOT = Slot("default", "default", 0)
TOP = Path("/sys/fs/cgroup")
ATTACK = f"attack-{os.getpid()}"
"""A cgroup that no other run of these tests makes at the same time."""


async def no_report(message: str) -> None:
    raise AssertionError(message)


def cgroups(pid: int | str) -> set[str]:
    """The paths of a process in all hierarchies."""
    return {line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}


def found(pattern: str) -> list[Path]:
    """The cgroups with this name. Other tests may remove theirs meanwhile, which Path.glob does not endure."""
    return [Path(top, name) for top, names, _ in os.walk(TOP) for name in fnmatch.filter(names, pattern)]


def left(home: Path) -> list[Path]:
    return found(f"bkpool-{home_digest(home)}*")


def limit(home: Path, *files: str) -> str:
    """The content of the first of these files that the slot's cgroup has."""
    slots = [top / "default.default.0" for top in left(home)]
    return next((slot / name).read_text().strip() for name in files for slot in slots if (slot / name).exists())


def score(pid: int | str) -> int:
    """How readily the kernel ends a process if there is no memory left."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def mounts(pid: int) -> list[str]:
    """Where the cgroup mounts of a process begin, seen from outside."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split()[3] for line in lines if " - cgroup" in line]


def memory_limits(home: Path) -> tuple[int, int]:
    """The machine's memory, and the limit of all slots together."""
    machine = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    files = [top / name for top in left(home) for name in ("memory.limit_in_bytes", "memory.max")]
    return machine, int(next(file for file in files if file.exists()).read_text())


@pytest.fixture
async def hasty(binaries: Binaries, tmp_path: Path) -> AsyncIterator[ProcessRuntime]:
    """A runtime that stops a worker at once, also in the middle of a build."""
    runtime = ProcessRuntime(tmp_path / "home", binaries, limits=ProcessLimits(stop_timeout=0.1))
    yield runtime
    await runtime.purge()
    await runtime.close(stop_workers=True)


async def output(build) -> str:
    return (await (await build).communicate())[0].decode()


@pytest.mark.parametrize(
    "named",
    [f"/{ATTACK}", f"../../../{ATTACK}", f"../../{ATTACK}.slice:"],
    ids=["absolute", "upwards", "as systemd names it"],
)
async def test_a_build_cannot_name_a_cgroup_outside_of_its_slot(hasty, build, tmp_path, named):
    endpoint = await hasty.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    building = await build(endpoint, LONG_STEPS[0], options=[f"--opt=cgroup-parent={named}"])
    await until_step_sleeps(LONG_STEPS[0])
    ours = f"/bkpool-{home_digest(tmp_path / 'home')}/default.default.0/"
    assert all(ours in path for step in steps_that_sleep(LONG_STEPS[0]) for path in cgroups(step))
    assert all(ours in str(made) for made in found(f"{ATTACK}*"))
    await hasty.daemons.stop(SLOT)
    await building.communicate()
    assert found(f"{ATTACK}*") == []
    assert left(tmp_path / "home") == []


async def test_a_worker_is_below_the_appliances_own_cgroup(runtime, tmp_path):
    await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    pid = SlotFiles(tmp_path / "home", SLOT).read_daemon().pid
    below = f"/bkpool-{home_digest(tmp_path / 'home')}/default.default.0/daemon"
    assert cgroups(pid) == {path.rstrip("/") + below for path in cgroups("self")}
    assert all(root.endswith(below.removesuffix("/daemon")) for root in mounts(pid))
    assert score(pid) > score("self")


async def test_a_slot_has_8192_processes_and_the_limits_of_its_pool(runtime, tmp_path):
    home = tmp_path / "home"
    await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    assert limit(home, "pids.max") == "8192"
    machine, together = memory_limits(home)
    assert machine // 2 <= together <= machine - (1 << 30)

    await runtime.daemons.stop(SLOT)
    resources = {"limits": {"memory": "512Mi", "cpu": "1500m"}, "requests": {"cpu": 2}}
    await runtime.daemons.start(SLOT, "uid-2", "anna", a_pool(resources={"buildkit": resources}), no_report)
    assert limit(home, "memory.limit_in_bytes", "memory.max") == str(512 << 20)
    assert limit(home, "cpu.cfs_quota_us", "cpu.max").split()[0] == "150000"
    assert limit(home, "cpu.shares", "cpu.weight") in {"2048", "79"}


async def test_a_build_gets_no_more_processes_and_no_more_memory_than_its_slot(runtime, build):
    limits = {"pids": 150, "memory": "128Mi"}
    pool = a_pool(resources={"buildkit": {"limits": limits}})
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", pool, no_report)
    text = await output(build(endpoint, "forks"))
    assert " forks" in text
    assert "300 forks" not in text
    text = await output(build(endpoint, "memory"))
    assert "took the memory" not in text
    assert "exit code: 137" in text


async def test_a_crash_leaves_cgroups_only_until_the_next_start(runtime, build, binaries, tmp_path):
    home = tmp_path / "home"
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", a_pool(), no_report)
    await output(build(endpoint, options=["--opt=cgroup-parent=/deep/er"]))
    pid = SlotFiles(home, SLOT).read_daemon().pid
    await runtime.close(stop_workers=False)
    adopting = ProcessRuntime(home, binaries)
    await adopting.adopt()
    assert f"/bkpool-{home_digest(home)}/" in "".join(cgroups(pid))  # those of a daemon that runs stay

    changed = asyncio.Event()
    adopting.daemons.on_change(lambda _slot: changed.set())
    os.kill(pid, signal.SIGKILL)
    await asyncio.wait_for(changed.wait(), 60)
    await adopting.close(stop_workers=False)
    assert left(home) != []
    after = ProcessRuntime(home, binaries)
    await after.adopt()
    assert left(home) == []
    await after.purge()
    await after.close(stop_workers=True)
