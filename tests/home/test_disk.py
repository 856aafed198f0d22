"""The error of a full file system names it, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from bkpool.core.errors import DiskFull
from bkpool.home.disk import RESERVE, disk_full, fault_if_full
from bkpool.home.files import write_private
from bkpool.home.lock import HomeLock, holder
from support.small_disk import fill, make_room, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        yield disk


def test_a_write_without_room_says_which_file_system_is_full_and_works_again_with_room(disk):
    file = disk / "below" / "secret"
    file.parent.mkdir()
    assert fault_if_full(file) is None
    fill(disk)
    with pytest.raises(DiskFull) as caught:
        write_private(file, b"x" * 5000)
    assert (caught.value.exit_code, caught.value.status, caught.value.code) == (73, 507, "DiskFull")
    assert caught.value.message == f"{file} cannot be written: the file system {disk} is full"
    assert f"du -xhd3 {disk} " in caught.value.hint
    assert str(fault_if_full(file)) == f"{file} cannot be written: the file system {disk} is full"
    make_room(disk)
    write_private(file, b"x" * 5000)
    assert fault_if_full(file) is None


def test_what_has_begun_may_use_the_last_of_the_room_and_nothing_new_is_begun(disk):
    (disk / "most").write_bytes(b"\0" * (4 * 1024 * 1024 - RESERVE // 2))
    write_private(disk / "still", b"x")
    assert fault_if_full(disk)


def test_a_file_system_without_inodes_says_so(tmp_path):
    with small_disk(tmp_path / "disk", "4m", "nr_inodes=3") as disk:
        (disk / "one").touch()
        (disk / "two").touch()
        with pytest.raises(DiskFull, match=f"the file system {disk} has no inodes left"):
            write_private(disk / "three", b"")
        assert "no inodes left" in str(fault_if_full(disk))


def test_a_used_up_quota_is_not_called_a_full_file_system():
    assert disk_full(Path("/"), quota=True).message == (
        "/ cannot be written: your quota on the file system / is used up"
    )


def test_a_home_without_room_for_the_lock_says_so_and_is_free_afterwards(disk):
    fill(disk)
    with pytest.raises(DiskFull, match="lock cannot be written: the file system"):
        HomeLock(disk).acquire()
    assert holder(disk) is None
    make_room(disk)
    with HomeLock(disk):
        assert holder(disk)
