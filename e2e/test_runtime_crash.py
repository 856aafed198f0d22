"""A program that runs workers is killed with kill -9 at every critical step. The next one must recover."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.toolchain import Toolchain, default_cache
from bkpool.workers import DaemonState
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime
from harness import only_on

pytestmark = only_on("process", "it tests the runtime of processes")
SLOT = Slot("default", "default", 0)
POOL = Pool(metadata=Metadata(name="default"))

# Arguments: the home, a function (module:qualified.name), "before" or "after", and the number of the call.
# The program kills itself before or after that call.
VICTIM = """
import asyncio, functools, importlib, os, pathlib, signal, sys
from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.toolchain import Toolchain, default_cache
from bkpool.workers.processes.runtime import Binaries, ProcessRuntime

home, where, when, call = sys.argv[1:]
binaries = Binaries.found(Toolchain(default_cache()).find)  # asks what is on PATH for its version, with Popen
module, _, path = where.partition(":")
holder = importlib.import_module(module)
*parents, name = path.split(".")
holder = functools.reduce(getattr, parents, holder)
real, calls = getattr(holder, name), 0

def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(call) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if calls == int(call) and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(holder, name, deadly)

async def no_report(message):
    raise AssertionError(message)

async def main():
    pool = Pool(metadata=Metadata(name="default"))
    runtime = ProcessRuntime(pathlib.Path(home), binaries)
    await runtime.daemons.start(Slot("default", "default", 0), "uid-1", "anna", pool, no_report)
    await runtime.caches.wipe(Slot("default", "default", 0))

asyncio.run(main())
"""


async def no_report(message: str) -> None:
    raise AssertionError(message)


@pytest.fixture(scope="module")
def binaries() -> Binaries:
    return Binaries.found(Toolchain(default_cache()).find)


def daemons(home: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if command[0].rpartition("/")[2].startswith("buildkitd") and str(home) in " ".join(command):
                found.append(entry.name)
    return found


def die(home: Path, where: str, when: str, call: int = 1) -> None:
    arguments = [sys.executable, "-c", VICTIM, str(home), where, when, str(call)]
    assert subprocess.run(arguments, check=False, timeout=180).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "when", "call", "survives"),
    [
        ("bkpool.workers.processes.slot_files:SlotFiles.write_cache", "after", 1, False),
        ("bkpool.workers.processes.slot_files:SlotFiles.write_daemon", "after", 1, False),
        ("bkpool.workers.processes.child:subprocess.Popen", "before", 1, False),
        ("bkpool.workers.processes.child:subprocess.Popen", "after", 1, False),
        ("bkpool.workers.processes.daemon:_checked", "before", 1, False),
        ("bkpool.workers.processes.slot_files:SlotFiles.write_daemon", "before", 2, False),
        ("bkpool.workers.processes.slot_files:SlotFiles.write_daemon", "after", 2, True),
    ],
)
async def test_a_crash_in_a_start_leaves_one_known_daemon_or_none(tmp_path, binaries, where, when, call, survives):
    home = tmp_path / "home"
    die(home, where, when, call)

    runtime = ProcessRuntime(home, binaries)
    await runtime.adopt()
    assert [seen.state for seen in runtime.daemons.observe().values()] == [DaemonState.READY] * survives
    assert len(daemons(home)) == survives
    assert runtime.caches.owners() == {SLOT: "anna"}

    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert len(daemons(home)) == 1
    await runtime.purge()
    assert daemons(home) == []
    await runtime.close(stop_workers=True)


@pytest.mark.parametrize(
    ("where", "when", "call"),
    [
        ("bkpool.workers.processes.daemon:Daemon.stop", "before", 1),
        ("bkpool.workers.processes.slot_files:SlotFiles.write_cache", "after", 2),
        ("bkpool.workers.processes.slot_files:SlotFiles.set_root_aside", "after", 1),
        ("bkpool.workers.processes.child:subprocess.Popen", "after", 2),
        ("bkpool.workers.processes.slot_files:SlotFiles.remove", "before", 1),
        ("bkpool.workers.processes.slot_files:SlotFiles.remove", "after", 1),
    ],
)
async def test_a_crash_in_a_wipe_never_gives_a_cache_to_another(tmp_path, binaries, where, when, call):
    home = tmp_path / "home"
    die(home, where, when, call)

    runtime = ProcessRuntime(home, binaries)
    await runtime.adopt()
    wiped = where != "bkpool.workers.processes.daemon:Daemon.stop"
    assert runtime.caches.owners() == ({} if wiped else {SLOT: "anna"})
    assert bool(list(home.rglob("root"))) is not wiped
    assert len(daemons(home)) == (0 if wiped else 1)

    await runtime.daemons.start(SLOT, "uid-2", "bert", POOL, no_report)
    assert runtime.caches.owners() == {SLOT: "bert"}
    assert not list((home / "slots").rglob("wiped-*"))
    await runtime.purge()
    assert daemons(home) == []
    await runtime.close(stop_workers=True)
