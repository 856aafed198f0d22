from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.workers.processes import environment, process_table
from bkpool.workers.processes.environment import NO_METADATA_SERVICE, PATH, worker_environment
from bkpool.workers.processes.process_table import Process
from bkpool.workers.processes.sandbox import Binaries, Sandbox


def sleeper(**environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([shutil.which("sleep"), "1000"], env=environment)


async def test_an_end_is_noticed_and_a_later_signal_hits_no_other_process():
    child = sleeper()
    process = Process(child.pid)
    assert not process.exited.is_set()
    process.signal(signal.SIGTERM)
    await asyncio.wait_for(process.exited.wait(), 60)
    assert child.wait() == -signal.SIGTERM
    process.signal(signal.SIGKILL)
    process.close()
    with pytest.raises(ProcessLookupError):
        Process(child.pid)


async def test_after_close_its_descriptor_belongs_to_somebody_else():
    child, other = sleeper(), sleeper()
    try:
        process = Process(child.pid)
        process.close()
        number = os.pidfd_open(other.pid)  # the lowest that is free, so the one that was closed
        process.signal(signal.SIGKILL)
        process.close()
        signal.pidfd_send_signal(number, 0)
        assert other.poll() is None
        os.close(number)
    finally:
        for one in (child, other):
            one.kill()
            one.wait()


def test_only_what_is_marked_and_chosen_is_killed():
    one, two = (f"{os.getpid()}/{number}" for number in (1, 2))  # other runs of this test may have theirs
    marked, spared, plain = sleeper(BKPOOL_TEST=one), sleeper(BKPOOL_TEST=two), sleeper(OTHER=one)
    assert process_table.kill_marked("BKPOOL_TEST", one.__eq__) == 1
    assert marked.wait(60) == -signal.SIGKILL
    for child in (spared, plain):
        assert child.poll() is None
        child.kill()
        child.wait()


@pytest.mark.parametrize("seen", [{"environ": 1, "cmdline": 1}, {"environ": 1}], ids=["in exec", "at its end"])
def test_one_that_begins_a_program_is_not_overlooked(monkeypatch, seen):
    """For a moment the kernel shows no environment of it. Only this moment is made up."""
    mark, real, left = f"{os.getpid()}/exec", process_table._read, dict(seen)
    marked = sleeper(BKPOOL_TEST=mark)
    while not real(marked.pid, "environ"):
        os.sched_yield()

    def at_first_empty(pid, file):
        if pid == marked.pid and left.get(file, 0) > 0:
            left[file] -= 1
            return b""
        return real(pid, file)

    monkeypatch.setattr(process_table, "_read", at_first_empty)
    assert process_table.kill_marked("BKPOOL_TEST", mark.__eq__) == 1
    assert marked.wait(60) == -signal.SIGKILL


def test_one_that_was_given_no_environment_is_not_waited_for():
    child = sleeper()
    try:
        while not Path(f"/proc/{child.pid}/cmdline").read_bytes():
            os.sched_yield()
        assert not process_table._is_in_exec(child.pid)
    finally:
        child.kill()
        child.wait()


def test_a_name_with_blanks_and_brackets_does_not_confuse_what_is_read(tmp_path):
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to(shutil.which("sleep"))
    child = subprocess.Popen([odd, "1000"])
    try:
        assert process_table.parent(child.pid) == os.getpid()
        assert process_table.start_time(child.pid) >= process_table.start_time(os.getpid())
    finally:
        child.kill()
        child.wait()
    with pytest.raises(ProcessLookupError):
        process_table.start_time(child.pid)


def test_the_boot_has_a_name():
    assert process_table.boot_id() == process_table.boot_id() != ""


def test_a_worker_gets_no_more_of_the_environment_than_it_needs():
    kept = {"https_proxy": "http://proxy", "SSL_CERT_FILE": "/ca", "BUILDKIT_STEP_LOG_MAX_SIZE": "-1"}
    dropped = {"PATH": "/mine", "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "x", "BKCTL_TOKEN": "y"}
    given = worker_environment({**kept, **dropped}, Path("/empty"), MORE="1")
    assert given == {"PATH": PATH, "HOME": "/empty", **NO_METADATA_SERVICE, **kept, "MORE": "1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user does not need unshare")
def test_a_missing_unshare_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(environment, "PATH", "/nowhere")
    python = Path(sys.executable)
    with pytest.raises(HostFault, match="unshare is not on the PATH") as fault:
        Sandbox(Binaries(python, python), {}).check()
    assert "util-linux" in fault.value.hint
