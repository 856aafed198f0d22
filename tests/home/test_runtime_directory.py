"""The private directory of sockets: where it is, and that nobody else can prepare it for us."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from bkpool.core.errors import HostFault
from bkpool.home import runtime_directory
from bkpool.home.runtime_directory import (
    check_length,
    claim,
    default_directory,
    first_usable,
    former_directories,
    hold,
    home_digest,
)

ROOT = os.geteuid() == 0


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
    (tmp_path / "sockets").chmod(0o705)
    with pytest.raises(HostFault, match="mode 0700"):
        claim(tmp_path / "sockets")


def test_one_that_the_group_could_enter_is_closed_and_emptied(tmp_path):
    """buildkitd makes it with mode 0770 if it was removed while buildkitd was starting."""
    (tmp_path / "sockets" / "default-0").mkdir(parents=True)
    (tmp_path / "sockets" / "default-0" / "buildkitd.sock").write_text("")
    (tmp_path / "sockets" / "link").symlink_to(tmp_path)
    (tmp_path / "sockets").chmod(0o770)
    claim(tmp_path / "sockets")
    assert (tmp_path / "sockets").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "sockets").iterdir()) == []


def test_the_common_parent_is_closed_and_not_emptied(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_directory, "_OF_ROOT", tmp_path / "bkpool")
    claim(tmp_path / "bkpool" / "one")
    (tmp_path / "bkpool").chmod(0o770)
    claim(tmp_path / "bkpool" / "two")
    assert (tmp_path / "bkpool").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "bkpool" / "one").is_dir()


@pytest.mark.skipif(not ROOT, reason="only root can give a directory away")
def test_one_of_another_user_is_refused(tmp_path):
    (tmp_path / "sockets").mkdir(mode=0o700)
    os.chown(tmp_path / "sockets", 65534, 65534)
    with pytest.raises(HostFault, match="not a directory of this user"):
        claim(tmp_path / "sockets")


def test_a_file_in_its_place_is_an_error(tmp_path):
    (tmp_path / "sockets").write_text("")
    with pytest.raises(HostFault, match="File exists"):
        claim(tmp_path / "sockets")


@pytest.mark.skipif(not ROOT, reason="only root may write to /run")
def test_root_uses_run_whatever_its_session_says(tmp_path):
    home = tmp_path / "home"
    for environ in ({}, {"XDG_RUNTIME_DIR": str(tmp_path)}):
        assert default_directory(home, environ) == Path("/run/bkpool", home_digest(home))
    assert default_directory(home, {}) != default_directory(tmp_path / "other", {})


@pytest.fixture
def without_run(tmp_path, monkeypatch):
    """As for an ordinary user, who may not write to /run."""
    monkeypatch.setattr(runtime_directory, "_OF_ROOT", tmp_path / "gone" / "bkpool")


@pytest.mark.usefixtures("without_run")
def test_others_use_the_directory_of_their_session(tmp_path):
    assert default_directory(tmp_path / "home", {"XDG_RUNTIME_DIR": str(tmp_path)}).parent == tmp_path


@pytest.mark.usefixtures("without_run")
@pytest.mark.parametrize("session", ["gone", "relative", "open", "of another"])
def test_a_session_directory_that_is_not_theirs_is_not_used(tmp_path, monkeypatch, session):
    path = tmp_path / session
    if session != "gone":
        path.mkdir(mode=0o700)
    if session == "open":
        path.chmod(0o777)
    if session == "of another":
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)
    given = session if session == "relative" else str(path)
    monkeypatch.chdir(tmp_path)
    found = default_directory(tmp_path / "home", {"XDG_RUNTIME_DIR": given})
    assert found == Path("/tmp", f"bkpool-{os.geteuid()}-{home_digest(tmp_path / 'home')}")


@pytest.mark.skipif(not ROOT, reason="another user's directory cannot be made")
def test_the_common_parent_is_checked_too(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime_directory, "_OF_ROOT", tmp_path / "bkpool")
    claim(tmp_path / "bkpool" / "one")
    os.chown(tmp_path / "bkpool", 65534, 65534)
    with pytest.raises(HostFault, match="bkpool is not a directory of this user"):
        claim(tmp_path / "bkpool" / "two")


def test_the_places_of_earlier_versions_are_known(tmp_path):
    home, environ = tmp_path / "home", {"XDG_RUNTIME_DIR": str(tmp_path)}
    known = {default_directory(home, environ), *former_directories(home, environ)}
    digest, uid = home_digest(home), os.geteuid()
    assert {
        tmp_path / f"bkpool-{digest}",
        Path(f"/run/user/{uid}/bkpool-{digest}"),
        Path(f"/tmp/bkpool-{uid}-{digest}"),
    } <= known
    assert default_directory(home, environ) not in former_directories(home, environ)


def test_a_path_that_is_too_long_for_a_socket_says_what_to_do(tmp_path):
    with pytest.raises(HostFault, match="too deep for sockets") as fault:
        check_length(tmp_path / ("x" * 100), tmp_path)
    assert "XDG_RUNTIME_DIR" in fault.value.hint


def test_the_first_one_that_can_be_made_is_used(tmp_path):
    (tmp_path / "file").write_text("")
    assert first_usable([tmp_path / "file" / "below", tmp_path / "two", tmp_path / "three"]) == tmp_path / "two"
    assert not (tmp_path / "three").exists()
    with pytest.raises(HostFault, match="below"):
        first_usable([tmp_path / "file" / "below", tmp_path / "file"])


@pytest.mark.parametrize("theirs", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["shared", "exclusive"])
def test_programs_that_tidy_up_find_it_locked(tmp_path, theirs):
    """systemd-tmpfiles asks for a shared lock of each directory, earlier versions for an exclusive one."""
    held = hold(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, theirs | fcntl.LOCK_NB)
    os.close(held)
    fcntl.flock(descriptor, theirs | fcntl.LOCK_NB)
    hold_again = hold(tmp_path)  # somebody else has it: that is no error
    os.close(hold_again)
    os.close(descriptor)


def test_one_that_is_gone_cannot_be_locked(tmp_path):
    with pytest.raises(HostFault, match="cannot be opened"):
        hold(tmp_path / "gone")
