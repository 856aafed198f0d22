from __future__ import annotations

import os
import stat

import pytest

from bkpool.core.errors import EXIT, HostFault, Unauthenticated
from bkpool.identity.admin_token import AdminTokenAuthenticator, find, load_or_create


def test_the_token_is_created_once_in_a_private_file(tmp_path):
    before = os.umask(0)
    try:
        token = load_or_create(tmp_path)
    finally:
        os.umask(before)

    assert len(token) == 43
    assert stat.S_IMODE((tmp_path / "admin.token").stat().st_mode) == 0o600
    assert load_or_create(tmp_path) == token == find(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["admin.token"]


def test_two_homes_have_two_tokens(tmp_path):
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    assert load_or_create(homes[0]) != load_or_create(homes[1])


def test_the_error_without_an_appliance_says_how_to_start_one(tmp_path):
    with pytest.raises(Unauthenticated, match="no admin token") as refused:
        find(tmp_path)
    assert "bkpool up" in refused.value.hint


@pytest.mark.parametrize("read", [load_or_create, find])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.chmod(0o640), r"open to other users \(mode 0640\)"),
        (lambda path: path.write_text(""), "43 characters"),
        (lambda path: path.write_text("short\n"), "43 characters"),
        (lambda path: path.write_bytes(b"\xff" * 500), "43 characters"),
        (lambda path: (path.unlink(), path.mkdir()), "directory"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "No such file"),
    ],
)
def test_an_unsafe_or_damaged_token_file_is_an_error_and_is_never_replaced(tmp_path, read, spoil, says):
    path = tmp_path / "admin.token"
    token = load_or_create(tmp_path)
    spoil(path)
    before = os.lstat(path)

    with pytest.raises(HostFault, match=says) as refused:
        read(tmp_path)

    assert (refused.value.code, refused.value.exit_code) == ("Unreadable", EXIT["Unreadable"])
    assert str(path) in refused.value.message
    assert refused.value.hint
    assert token not in refused.value.message
    assert os.lstat(path).st_ino == before.st_ino


async def test_the_authenticator_does_not_keep_the_token_in_plain_text(tmp_path):
    token = load_or_create(tmp_path)
    assert token not in repr(vars(AdminTokenAuthenticator(token)))


@pytest.mark.parametrize("bearer", ["", "k" * 42, "k" * 44, "K" * 43, "k" * 42 + "\udce9"])
async def test_only_the_complete_token_is_accepted(bearer):
    assert await AdminTokenAuthenticator("k" * 43).authenticate(bearer) == ()
    (verdict,) = await AdminTokenAuthenticator("k" * 43).authenticate("k" * 43)
    assert (verdict.identity.name, verdict.identity.admin) == ("admin", True)
