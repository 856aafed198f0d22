"""Our own children and what they have started are ended in bounded time, also with no file descriptor left."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault, WorkerFailed
from bkpool.workers.processes import child as child_module
from bkpool.workers.processes import process_table
from bkpool.workers.processes.child import ChildProcess
from support.descriptors import descriptors_left

SLEEP = shutil.which("sleep")


@pytest.fixture
def output(tmp_path):
    with (tmp_path / "output").open("w+b") as file:
        yield file


def running_in_group(number):
    """The processes of a group, without those that only wait to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            if state != "Z" and int(group) == number:
                found.append(stat.parent.name)
    return found


async def test_a_child_that_ends_has_its_exit_code(output):
    child = ChildProcess(["/bin/sh", "-c", "echo said; exit 3"], {}, output)
    assert await child.wait(60) == 3
    assert await child.end() == 3
    output.seek(0)
    assert output.read() == b"said\n"


async def test_a_child_that_does_not_end_is_left_alone_until_it_is_ended_with_all_of_its_group(output):
    child = ChildProcess(["/bin/sh", "-c", f"{SLEEP} 1000 & exec {SLEEP} 1000"], {}, output)
    assert await child.wait(0) is None
    assert await child.wait(0.01) is None
    assert await child.end() == -signal.SIGKILL
    async with asyncio.timeout(60):
        while running_in_group(child.pid):  # noqa: ASYNC110 - all were killed, and the kernel takes a moment
            await asyncio.sleep(0.005)


async def test_a_program_that_is_not_there_is_named(output):
    with pytest.raises(HostFault, match="/no/program cannot be run: No such file") as fault:
        ChildProcess(["/no/program"], {}, output)
    assert fault.value.code == "ToolMissing"


async def test_a_child_that_cannot_be_killed_is_waited_for_only_so_long(output, monkeypatch):
    child = ChildProcess([SLEEP, "1000"], {}, output)
    with monkeypatch.context() as hanging:
        hanging.setattr(child_module, "_END_TIMEOUT", 0.05)
        hanging.setattr(os, "killpg", lambda *_: None)  # as in the kernel: nothing else outlives SIGKILL
        with pytest.raises(WorkerFailed, match=f"process {child.pid} has not ended"):
            await child.end()
    assert await child.end() == -signal.SIGKILL


async def test_a_child_is_ended_and_reaped_with_no_descriptor_left(output):
    child = ChildProcess([SLEEP, "1000"], {}, output)
    with descriptors_left(0):
        async with asyncio.timeout(60):
            assert await child.end() == -signal.SIGKILL


async def test_a_start_with_no_descriptor_left_says_so(output):
    with descriptors_left(0), pytest.raises(HostFault, match="there are too many open files") as fault:
        ChildProcess([SLEEP, "1000"], {}, output)
    assert fault.value.code == "TooManyOpenFiles"


# --- processes that are found by their mark -------------------------------------------------------------------------


@pytest.fixture
def marked():
    """A process with the mark `BKPOOL_TEST`."""
    with subprocess.Popen([SLEEP, "1000"], env={"BKPOOL_TEST": f"{os.getpid()}"}) as process:
        yield process
        process.kill()


def kill_marked():
    return process_table.kill_marked("BKPOOL_TEST", f"{os.getpid()}".__eq__)


def test_the_processes_of_the_machine_take_no_descriptors_while_they_are_looked_at(marked):
    """Two are enough, however many processes there are."""
    with descriptors_left(2):
        assert kill_marked() == 1
    assert marked.wait(60) == -signal.SIGKILL


def test_with_no_descriptor_left_it_waits_for_one_and_does_not_say_that_all_is_done(marked):
    with descriptors_left(1):
        held = os.open("/", os.O_PATH)
        timer = threading.Timer(0.1, os.close, [held])
        timer.start()
        assert kill_marked() == 1
        timer.join()


def test_with_no_descriptor_for_long_it_is_an_error(marked, monkeypatch):
    monkeypatch.setattr(process_table, "_KILL_TIMEOUT", 0.05)
    with descriptors_left(0), pytest.raises(HostFault, match="cannot be looked at: there are too many open files"):
        kill_marked()
    assert marked.poll() is None


def test_without_a_pidfd_the_process_with_the_same_start_time_is_killed(marked, monkeypatch):
    """Only the failure of pidfd_open is made up: a real lack of descriptors would hide the process, too."""

    def none_left(_pid):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", none_left)
    assert kill_marked() == 1
    assert marked.wait(60) == -signal.SIGKILL
