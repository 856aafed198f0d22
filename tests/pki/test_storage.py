from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import EXIT, HostFault
from bkpool.pki.authority import Authority, renew_at
from bkpool.pki.names import gateway_names
from bkpool.pki.storage import load_or_create, rotate, server_certificate

NOW = datetime.now(UTC)
NAMES = gateway_names("h", [])


@pytest.fixture
def pki(tmp_path):
    """A directory that contains a CA."""
    load_or_create(tmp_path / "pki", NOW)
    return tmp_path / "pki"


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_the_files_are_created_once_and_are_private(tmp_path):
    before = os.umask(0)
    try:
        made = load_or_create(tmp_path / "pki", NOW)
    finally:
        os.umask(before)

    assert sorted(contents(tmp_path / "pki")) == ["ca.crt", "ca.key", "token.key"]
    assert stat.S_IMODE((tmp_path / "pki").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "pki").iterdir()} == {0o600}
    assert [p.name for p in tmp_path.iterdir()] == ["pki"]
    again = load_or_create(tmp_path / "pki", NOW + timedelta(days=1))
    assert (again.token_key, again.authority.cert_pem) == (made.token_key, made.authority.cert_pem)
    assert len(made.token_key) == 32


def test_repr_shows_no_secret(pki):
    kept = load_or_create(pki, NOW)
    assert repr(kept.token_key) not in repr(kept)
    assert "PRIVATE" not in repr(kept)


CRASH = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from bkpool.home import files
from bkpool.pki import storage

left = 0
def fail_point(function):
    def counted(*args, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return counted

for name in ("open", "fsync", "rename", "replace", "mkdir"):
    setattr(os, name, fail_point(getattr(os, name)))
for directory in sys.argv[2:]:
    left = int(Path(directory).parent.name)
    if (child := os.fork()) == 0:
        os.dup2(2, 1)  # for the log
        getattr(storage, sys.argv[1])(Path(directory), datetime.now(UTC))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(code, flush=True)
    if code == 0:
        break
"""


def crashed(directory, action, step):
    """Directories in each of which another process was killed at another point of this, until one came to its end.

    Each begins as a copy of the directory `before`, if there is one. The processes are forks of one, because its
    imports take longer than all that they do.
    """
    places = [directory / str(number) / "pki" for number in range(1, 200, step)]
    for place in places if (directory / "before").exists() else ():
        shutil.copytree(directory / "before", place)
    command = [sys.executable, "-c", CRASH, action, *map(str, places)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    codes = [int(line) for line in done.stdout.splitlines()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], done.stderr
    assert len(codes) > 5
    return places[: len(codes) - 1]


@pytest.mark.slow
def test_a_crash_at_any_point_leaves_all_or_nothing_and_existing_files_stay(tmp_path):
    for directory in crashed(tmp_path, "load_or_create", 3):
        before = contents(directory) if directory.exists() else None

        load_or_create(directory, NOW)

        if before is not None:
            assert contents(directory) == before
        assert [p.name for p in directory.parent.iterdir()] == ["pki"]


def test_a_rotation_keeps_the_ca_of_before_and_the_key_of_tokens(pki):
    before = load_or_create(pki, NOW)
    made = rotate(pki, NOW)
    assert made.authority.cert_pem != before.authority.cert_pem
    assert made.token_key == before.token_key
    assert made.former.authority.key_pem == before.authority.key_pem
    assert made.former.rotated_at == NOW
    assert repr(made.former.authority.key_pem) not in repr(made)
    assert [p.name for p in pki.parent.iterdir()] == ["pki"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in pki.iterdir()} == {0o600}
    again = rotate(pki, NOW + timedelta(days=1))
    assert again.former.authority.cert_pem == made.authority.cert_pem


@pytest.mark.parametrize("name", ["former-ca.crt", "former-ca.key", "rotated-at"])
def test_a_damaged_or_missing_ca_of_before_is_an_error_and_is_not_replaced(pki, name):
    rotate(pki, NOW)
    for content in (b"nonsense", None):
        (pki / name).write_bytes(content) if content else (pki / name).unlink()
        for read in (load_or_create, rotate):
            with pytest.raises(HostFault) as caught:
                read(pki, NOW)
            assert caught.value.exit_code == EXIT["Unreadable"]


def test_a_kill_at_any_point_of_a_rotation_leaves_the_old_ca_or_the_new_one(tmp_path):
    outcomes = set()
    before = load_or_create(tmp_path / "before", NOW)
    for directory in crashed(tmp_path, "rotate", 4):
        found = load_or_create(directory, NOW)
        rotated = found.former is not None
        outcomes.add(rotated)
        old = found.former.authority if rotated else found.authority
        assert (old.cert_pem, old.key_pem) == (before.authority.cert_pem, before.authority.key_pem)
        assert found.token_key == before.token_key
    assert outcomes == {False, True}


def another_authoritys(pki) -> None:
    leaf = Authority.create(NOW).issue_server(NAMES.dns, NAMES.ips, NOW, NOW + timedelta(days=365))
    (pki / "gateway.crt").write_bytes(leaf.cert_pem)
    (pki / "gateway.key").write_bytes(leaf.key_pem)


def spoilt_key(path) -> None:
    path.write_bytes(Authority.create(NOW).key_pem)


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "token.key"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "{path}: No such file"),
        (lambda path: path.write_bytes(b""), "{name}"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "{name}"),
        (lambda path: path.write_bytes(b"\0" * 500), "{name}"),
        (lambda path: path.chmod(0o644), r"{path} is open to other users \(mode 0644\)"),
        (lambda path: path.chmod(0o620), r"{path} is open to other users \(mode 0620\)"),
        (lambda path: (path.unlink(), path.mkdir()), "{path}: Is a directory"),
    ],
)
def test_an_unusable_file_is_an_error_that_names_it_and_nothing_is_replaced(pki, name, spoil, says):
    spoil(pki / name)
    before = contents(pki)

    with pytest.raises(HostFault, match=says.format(path=pki / name, name=name)) as refused:
        load_or_create(pki, NOW)

    assert (refused.value.code, refused.value.exit_code) == ("Unreadable", EXIT["Unreadable"])
    assert refused.value.hint
    assert contents(pki) == before


def test_a_key_of_another_ca_is_an_error(pki):
    spoilt_key(pki / "ca.key")
    with pytest.raises(HostFault, match="the key does not belong to the certificate") as refused:
        load_or_create(pki, NOW)
    assert refused.value.code == "Unreadable"


def test_an_empty_directory_is_not_filled(tmp_path):
    (tmp_path / "pki").mkdir(mode=0o700)
    with pytest.raises(HostFault, match="No such file") as refused:
        load_or_create(tmp_path / "pki", NOW)
    assert "bkpool down" in refused.value.hint
    assert contents(tmp_path / "pki") == {}


def test_a_directory_that_is_open_to_others_is_refused_with_a_hint(pki):
    pki.chmod(0o750)
    with pytest.raises(HostFault, match="open to other users") as refused:
        load_or_create(pki, NOW)
    assert refused.value.hint == f"chmod 700 {pki}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(pki):
    os.chown(pki / "ca.key", 12345, -1)
    with pytest.raises(HostFault, match=r"ca\.key belongs to user 12345"):
        load_or_create(pki, NOW)


# --- the gateway's certificate --------------------------------------------------------------------------------------


def test_the_gateways_certificate_is_used_until_it_is_due(pki):
    ca = load_or_create(pki, NOW).authority
    kept = server_certificate(pki, ca, NAMES, NOW)
    first = contents(pki)

    assert kept.renew_at == renew_at(first["gateway.crt"])
    assert {stat.S_IMODE(p.stat().st_mode) for p in (kept.cert_file, kept.key_file)} == {0o600}
    assert server_certificate(pki, ca, NAMES, kept.renew_at - timedelta(seconds=1)) == kept
    assert contents(pki) == first
    renewed = server_certificate(pki, ca, NAMES, kept.renew_at)
    assert renewed.renew_at > kept.renew_at
    assert contents(pki)["gateway.key"] != first["gateway.key"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pki: (pki / "gateway.key").write_bytes(b"x"),
        lambda pki: (pki / "gateway.crt").write_bytes(b"x"),
        lambda pki: (pki / "gateway.key").unlink(),
        lambda pki: (pki / "gateway.key").chmod(0o644),
        lambda pki: spoilt_key(pki / "gateway.key"),
        another_authoritys,
    ],
)
def test_an_unusable_certificate_of_the_gateway_is_issued_again(pki, spoil):
    ca = load_or_create(pki, NOW).authority
    first = server_certificate(pki, ca, NAMES, NOW)
    before = contents(pki)
    spoil(pki)

    server_certificate(pki, ca, NAMES, NOW)

    after = contents(pki)
    assert ca.issued(after["gateway.crt"])
    assert after["gateway.key"] != before["gateway.key"]
    assert stat.S_IMODE(first.key_file.stat().st_mode) == 0o600


def test_other_names_need_another_certificate(pki):
    ca = load_or_create(pki, NOW).authority
    server_certificate(pki, ca, NAMES, NOW)
    before = contents(pki)
    server_certificate(pki, ca, gateway_names("h", [], ["gw.example"]), NOW)
    assert contents(pki)["gateway.crt"] != before["gateway.crt"]


def test_near_the_expiry_of_the_ca_it_is_renewed_daily_and_then_an_error(pki):
    ca = load_or_create(pki, NOW).authority
    late = ca.not_after - timedelta(days=1)

    assert server_certificate(pki, ca, NAMES, late).renew_at == late + timedelta(days=1)
    with pytest.raises(HostFault, match="certificate authority expired") as refused:
        server_certificate(pki, ca, NAMES, ca.not_after + timedelta(days=1))
    assert refused.value.code == "AuthorityExpired"
