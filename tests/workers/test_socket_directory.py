from __future__ import annotations

import os
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.core.names import Slot
from bkpool.workers.processes.socket_directory import claim, default_directory, slot_directory


def test_it_is_made_private_and_claimed_again(tmp_path):
    claim(tmp_path / "sockets")
    claim(tmp_path / "sockets")
    assert (tmp_path / "sockets").stat().st_mode & 0o777 == 0o700


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "sockets").symlink_to(tmp_path / "real")
    with pytest.raises(HostFault, match="not a directory of this user"):
        claim(tmp_path / "sockets")


def test_one_that_others_may_enter_is_refused(tmp_path):
    (tmp_path / "sockets").mkdir()
    (tmp_path / "sockets").chmod(0o750)
    with pytest.raises(HostFault, match="mode 0700"):
        claim(tmp_path / "sockets")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_one_of_another_user_is_refused(tmp_path):
    (tmp_path / "sockets").mkdir(mode=0o700)
    os.chown(tmp_path / "sockets", 65534, 65534)
    with pytest.raises(HostFault, match="not a directory of this user"):
        claim(tmp_path / "sockets")


def test_a_file_in_its_place_is_an_error(tmp_path):
    (tmp_path / "sockets").write_text("")
    with pytest.raises(HostFault, match="File exists"):
        claim(tmp_path / "sockets")


def test_the_sessions_directory_is_used_where_there_is_one(tmp_path):
    home = tmp_path / "home"
    assert default_directory(home, {"XDG_RUNTIME_DIR": str(tmp_path)}).parent == tmp_path
    for environ in ({}, {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}):
        assert default_directory(home, environ).parent == Path("/tmp")
    assert default_directory(home, {}) != default_directory(tmp_path / "other", {})


def test_slots_with_alike_names_have_different_places():
    slots = [Slot("a", "p" * 30, 1), Slot("a", "p" * 31, 1), Slot("b", "p" * 30, 1), Slot("a", "p" * 30, 2)]
    assert len({slot_directory(Path("/run/x"), slot) for slot in slots}) == len(slots)
