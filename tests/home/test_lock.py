from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from bkpool.core.errors import EXIT, HostFault
from bkpool.home.lock import HomeLock, holder
from support.unwritable import unwritable

HOLD = """
import sys
from pathlib import Path
from bkpool.home.lock import HomeLock
HomeLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the home."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "home")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_home_is_created_private_and_has_no_holder_after_release(tmp_path):
    home = tmp_path / "a" / "home"
    assert holder(home) is None
    with HomeLock(home):
        assert holder(home) == os.getpid()
    assert holder(home) is None
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with HomeLock(home):
        pass


def test_a_second_appliance_is_refused_with_the_pid_of_the_first(tmp_path, other):
    with pytest.raises(HostFault, match=f"pid {other.pid}") as refused:
        HomeLock(tmp_path / "home").acquire()
    assert (refused.value.code, refused.value.exit_code) == ("AlreadyRunning", EXIT["AlreadyRunning"])
    assert holder(tmp_path / "home") == other.pid


def test_a_query_for_the_holder_never_blocks_another_process(tmp_path):
    with HomeLock(tmp_path):
        pass
    asking = os.open(tmp_path / "lock", os.O_RDWR)
    assert holder(tmp_path) is None
    with HomeLock(tmp_path):
        assert holder(tmp_path) == os.getpid()
        os.close(asking)
        assert holder(tmp_path) == os.getpid(), "closing another descriptor of the file does not drop the lock"


def test_the_lock_ends_with_the_process_that_holds_it(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(tmp_path / "home") is None
    with HomeLock(tmp_path / "home"):
        assert holder(tmp_path / "home") == os.getpid()


def test_a_child_of_the_appliance_does_not_keep_the_lock(tmp_path):
    lock = HomeLock(tmp_path)
    lock.acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        lock.release()
        assert holder(tmp_path) is None
        child.stdin.close()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o707])
def test_a_home_that_is_open_to_others_is_refused_with_a_hint(tmp_path, mode):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(mode)
    with pytest.raises(HostFault, match="open to other users") as refused:
        HomeLock(home).acquire()
    assert (refused.value.code, refused.value.exit_code) == ("Permission", EXIT["Permission"])
    assert refused.value.hint == f"chmod 700 {home}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_home_of_another_user_is_refused(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 12345, -1)
    with pytest.raises(HostFault, match="belongs to user 12345"):
        HomeLock(home).acquire()


def test_the_error_for_a_home_that_cannot_be_created_names_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "file" / "home"):
        with pytest.raises(HostFault, match="file"):
            HomeLock(home).acquire()


def test_the_holder_of_a_home_that_cannot_be_written_is_known(tmp_path, other):
    home = tmp_path / "home"
    with unwritable(home):
        assert holder(home) == other.pid
        with pytest.raises(HostFault) as refused:
            HomeLock(home).acquire()
        assert refused.value.code == "Permission"
        other.kill()
        other.wait()
        assert holder(home) is None
