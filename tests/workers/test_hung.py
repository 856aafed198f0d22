"""Real buildkitd processes that hang, or lose what they need on disk, while nobody touches their process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from bkpool.core.names import Slot
from bkpool.home import runtime_directory
from bkpool.workers.health import ProbeLimits
from bkpool.workers.processes.runtime import ProcessLimits, ProcessRuntime
from bkpool.workers.processes.slot_files import SlotFiles
from support.objects import pool as a_pool
from support.processes import freeze

pytestmark = pytest.mark.slow

SLOT = Slot("default", "default", 0)
POOL = a_pool()
LIMITS = ProcessLimits(probes=ProbeLimits(interval=0.2, answer=60.0, retry=0.05, fresh=0.0))
IMPATIENT = replace(LIMITS, probes=replace(LIMITS.probes, answer=1.0))
"""For one that is stopped. One that answers may be late, too, on a busy machine."""


async def no_report(_message: str) -> None:
    pass


@pytest.fixture
def limits():
    return LIMITS


@pytest.fixture
async def runtime(tmp_path, binaries, limits):
    runtime = ProcessRuntime(tmp_path / "home", binaries, limits=limits)
    watching = asyncio.create_task(runtime.daemons.watch_health())
    yield runtime
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await runtime.purge()
    await runtime.close(stop_workers=True)


@pytest.fixture
async def socket(runtime):
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    return Path(endpoint.removeprefix("unix://"))


def pid_of(home: Path) -> int:
    return json.loads((home / "slots/default/default/0/process.json").read_text())["pid"]


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def put_a_file_in_the_place_of(directory: Path) -> None:
    directory.write_text("nothing can be made in there")


async def silence(runtime, *, wanted=True):
    """Waits until the runtime reports a silence, or the end of one."""
    async with asyncio.timeout(60):
        changed = asyncio.Event()
        unsubscribe = runtime.daemons.on_change(lambda _slot: changed.set())
        while ((found := runtime.daemons.observe()[SLOT].silence) is not None) != wanted:
            await changed.wait()
            changed.clear()
        unsubscribe()
    return found


async def noticed(runtime, *, builds_fail=False) -> str:
    """Waits until its silence is noticed, and returns what is lost. A probe may have begun before the fault."""
    found = await silence(runtime)
    assert not await runtime.daemons.answers(SLOT, "uid-1")
    assert found.builds_fail is builds_fail
    return found.lost


async def until_it_answers(runtime) -> None:
    async with asyncio.timeout(60):
        while not await runtime.daemons.answers(SLOT, "uid-1"):
            pass


async def start_again(runtime) -> None:
    await runtime.daemons.stop(SLOT, at_once=True)
    await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    await until_it_answers(runtime)


@pytest.mark.parametrize("limits", [IMPATIENT], ids=["impatient"])
async def test_one_that_is_stopped_is_given_to_nobody_and_can_be_ended_and_goes_on_after_a_stall(
    runtime, socket, tmp_path
):
    pid = pid_of(tmp_path / "home")
    await until_it_answers(runtime)
    assert not await runtime.daemons.answers(SLOT, "uid-of-another-worker")
    freeze(pid)
    assert await noticed(runtime) == ""
    os.kill(pid, signal.SIGCONT)
    await silence(runtime, wanted=False)
    await until_it_answers(runtime)
    assert pid_of(tmp_path / "home") == pid, "a stall ends nothing"
    freeze(pid)
    await silence(runtime)
    await start_again(runtime)
    assert not runs(pid), "SIGKILL ends a stopped process"


async def test_one_whose_link_to_its_temporary_directory_is_removed_gets_it_again(runtime, socket, tmp_path, build):
    link, scratch = socket.parent / "tmp", SlotFiles(tmp_path / "home", SLOT).scratch
    for remove in (link.unlink, lambda: shutil.rmtree(scratch)):
        remove()
        async with asyncio.timeout(60):
            while not link.exists():  # a probe that began before may be the first one that succeeds
                assert await runtime.daemons.answers(SLOT, "uid-1")
        assert link.resolve() == scratch
        assert scratch.is_dir()
    building = await build(f"unix://{socket}")
    output = (await building.communicate())[0].decode()
    assert building.returncode == 0, output


@pytest.mark.parametrize("removed", ["sockets", "everything of the session"])
async def test_one_whose_socket_is_removed_is_replaced_and_its_directory_is_made_again(runtime, socket, removed):
    """As by the end of a session (rm -rf of what is in XDG_RUNTIME_DIR), or by who tidies up /tmp."""
    shutil.rmtree(socket.parent if removed == "sockets" else socket.parent.parent)
    assert await noticed(runtime) == f"{socket} was removed"
    await start_again(runtime)
    assert runtime.caches.owners() == {SLOT: "anna"}, "its cache was not touched"
    assert runtime_directory.is_private(socket.parent)


async def test_one_whose_cache_is_removed_is_replaced_and_the_new_one_has_an_owner(runtime, socket, tmp_path):
    home = tmp_path / "home"
    shutil.rmtree(home / "slots")
    assert await noticed(runtime, builds_fail=True) == f"{SlotFiles(home, SLOT).root} was removed"
    await start_again(runtime)
    assert SlotFiles(home, SLOT).read_cache().owner == "anna", "its record is on disk again"


async def test_a_cache_that_somebody_puts_in_the_place_of_a_removed_one_is_not_taken_for_it(
    runtime, socket, tmp_path
):
    root = SlotFiles(tmp_path / "home", SLOT).root
    root.rename(root.with_name("elsewhere"))
    root.mkdir()
    await noticed(runtime, builds_fail=True)
    root.rmdir()
    root.with_name("elsewhere").rename(root)
    await silence(runtime, wanted=False)
    assert await runtime.daemons.answers(SLOT, "uid-1")


async def test_a_session_that_is_over_does_not_keep_workers_from_starting(binaries, tmp_path, monkeypatch):
    """Its XDG_RUNTIME_DIR is gone and cannot be made again: their sockets are in /tmp then."""
    monkeypatch.setattr(runtime_directory, "_OF_ROOT", tmp_path / "gone" / "bkpool")
    session, home = Path(tempfile.mkdtemp(prefix="bkpool-")), tmp_path / "home"  # a socket's path is short
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(session)}
    runtime = ProcessRuntime(home, binaries, environ=environ, limits=LIMITS)
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert endpoint.startswith(f"unix://{session}/")
    shutil.rmtree(session)
    put_a_file_in_the_place_of(session)
    assert not await runtime.daemons.answers(SLOT, "uid-1")
    await runtime.daemons.stop(SLOT, at_once=True)
    endpoint = await runtime.daemons.start(SLOT, "uid-1", "anna", POOL, no_report)
    assert endpoint.startswith(f"unix:///tmp/bkpool-{os.geteuid()}-")
    assert await runtime.daemons.answers(SLOT, "uid-1")
    await runtime.purge()
    await runtime.close(stop_workers=True)
    os.unlink(session)  # noqa: PTH108 - os has no linter rule for coroutines
    assert not Path(endpoint.removeprefix("unix://")).parent.parent.exists()
