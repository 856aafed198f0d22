"""config.toml and remembered.toml on disk: what is kept, what is changed, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import assume, given

from bkpool.core.errors import HostFault, InvalidInput
from bkpool.settings import files
from bkpool.settings.catalogue import all_settings
from bkpool.settings.sources import SettingValue, ValueSource, from_document, from_options
from support.setting_values import any_value
from support.unwritable import unwritable

HERE = Path("/somewhere")


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home"
    path.mkdir(mode=0o700)
    return path


def test_without_a_home_every_value_is_the_default(tmp_path):
    resolved = files.load(tmp_path / "none", {}, {}, HERE)
    assert {one.source for one in resolved.values} == {ValueSource.DEFAULT}
    assert not (tmp_path / "none").exists()


def test_options_are_remembered_and_the_later_one_wins(home):
    files.remember(home, from_options({"api.address": "[::1]:1", "gateway.hosts": ["a", "b"]}, HERE).values())
    files.remember(home, from_options({"api.address": "[::1]:2"}, HERE).values())
    kept = files.load(home, {}, {}, HERE)
    assert kept.get("api.address").text == "[::1]:2"
    assert kept.get("gateway.hosts").value == ("a", "b")
    assert {one.setting.name for one in kept.of(ValueSource.REMEMBERED)} == {"api.address", "gateway.hosts"}
    assert (home / "remembered.toml").stat().st_mode & 0o777 == 0o600


def test_what_belongs_to_one_start_is_not_remembered(home):
    given = {"kind.image_archives": ["/a.tar"], "appliance.roles": "api", "gateway.pool": "default/p"}
    files.remember(home, from_options(given, HERE).values())
    assert not (home / "remembered.toml").exists()


def test_one_value_or_all_is_forgotten(home):
    files.remember(home, from_options({"api.tls": True, "kind.cluster": "x"}, HERE).values())
    assert files.forget(home, all_settings()["api.tls"])
    assert not files.forget(home, all_settings()["api.tls"])
    assert set(files.remembered(home)) == {"kind.cluster"}
    assert files.forget(home, None)
    assert not files.forget(home, None)
    assert files.remembered(home) == {}


def test_a_remembered_value_that_this_version_does_not_know_says_how_to_forget_it(home):
    (home / "remembered.toml").write_text("[api]\ncolour = 1\n")
    with pytest.raises(InvalidInput, match=r"remembered.toml: \[api\] colour: there is no such field") as caught:
        files.load(home, {}, {}, HERE)
    assert "`bkpool config unset --all`" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[api\n", r"config.toml: .* \(at line 1, column 5\)"),
        (b"\xff", "is not text in UTF-8"),
        (b"x = " + b"[" * 3000 + b"]" * 3000, "config.toml: is nested too deeply"),
        (b"x = " + b"{x = " * 3000 + b"1" + b"}" * 3000, "config.toml: is nested too deeply"),
    ],
)
def test_a_file_that_is_not_toml_is_named(home, content, message):
    (home / "config.toml").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        files.load(home, {}, {}, HERE)


def test_a_file_that_cannot_be_read_is_a_fault_of_the_machine(home):
    (home / "config.toml").mkdir()
    with pytest.raises(HostFault, match=r"config.toml cannot be read: Is a directory"):
        files.load(home, {}, {}, HERE)


BEFORE = """# My settings

[api]  # for the office
address = "0.0.0.0:8082"  # every interface

[gateway]
hosts = ["a"]
"""


@pytest.mark.parametrize(
    ("name", "value", "after"),
    [
        ("api.address", "[::1]:1", BEFORE.replace('"0.0.0.0:8082"  # every interface', '"[::1]:1"')),
        ("api.tls", "true", BEFORE.replace("office\n", "office\ntls = true\n")),
        ("kind.cluster", "x", BEFORE + '\n[kind]\ncluster = "x"\n'),
        ("gateway.hosts", "b,c", BEFORE.replace('["a"]', '["b", "c"]')),
        ("gateway.hosts", None, BEFORE.replace('hosts = ["a"]\n', "")),
        ("kind.cluster", None, BEFORE),
    ],
)
def test_one_line_of_the_file_changes_and_the_comments_stay(home, name, value, after):
    (home / "config.toml").write_text(BEFORE)
    one = all_settings()[name]
    changed = files.change(home, one, value and one.from_text(value, where=name, directory=HERE))
    assert (home / "config.toml").read_text() == after
    assert changed == (after != BEFORE)


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_stays_and_its_target_changes(home, tmp_path, relative):
    target = tmp_path / "dotfiles" / "bkpool.toml"
    target.parent.mkdir()
    target.write_text(BEFORE)
    (home / "config.toml").symlink_to(Path("../dotfiles/bkpool.toml") if relative else target)
    assert files.change(home, all_settings()["gateway.hosts"], ("b",))
    assert (home / "config.toml").is_symlink()
    assert target.read_text() == BEFORE.replace('["a"]', '["b"]')
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "text", ['gateway.hosts = ["a"]\n', '[gateway]\nhosts = [\n"a",\n]\n', 'gateway = {hosts = ["a"]}\n']
)
def test_a_form_that_takes_more_than_one_line_is_left_to_its_author(home, text):
    (home / "config.toml").write_text(text)
    with pytest.raises(InvalidInput, match="cannot change this line") as caught:
        files.change(home, all_settings()["gateway.hosts"], ("b",))
    assert caught.value.hint == "Edit the file yourself."
    assert (home / "config.toml").read_text() == text


@pytest.mark.parametrize(
    ("text", "name", "value", "message"),
    [
        (
            "",
            *("controller.backoff", "10m"),
            "controller.backoff: controller.backoff (10m) is more than controller.backoff_max (2m)",
        ),
        (
            '[controller]\nbackoff = "10m"\nbackoff_max = "20m"\n',
            *("controller.backoff_max", None),
            "controller.backoff_max: controller.backoff (10m) is more than controller.backoff_max (2m)",
        ),
        (
            '[identity]\nkeys_fresh = "2h"\nkeys_stale = "3h"\n',
            *("identity.keys_stale", "1h"),
            "identity.keys_stale: identity.keys_fresh (2h) is more than identity.keys_stale (1h)",
        ),
    ],
)
def test_a_change_that_makes_the_file_wrong_is_refused(home, text, name, value, message):
    (home / "config.toml").write_text(text)
    one = all_settings()[name]
    with pytest.raises(InvalidInput) as caught:
        files.change(home, one, value and one.from_text(value, where=name, directory=HERE))
    assert caught.value.message == message
    assert caught.value.hint.startswith("Lower ")
    assert (home / "config.toml").read_text() == text
    assert files.fault(home) is None


def test_a_file_that_is_wrong_already_may_be_corrected_one_setting_at_a_time(home):
    (home / "config.toml").write_text('[controller]\nbackoff = "10m"\n[identity]\nkeys_fresh = "2h"\n')
    assert "controller.backoff" in files.fault(home).message
    assert files.change(home, all_settings()["controller.backoff"], None)
    assert "identity.keys_fresh" in files.fault(home).message
    assert files.change(home, all_settings()["identity.keys_fresh"], None)
    assert files.fault(home) is None


@given(any_value())
def test_every_value_survives_both_files(tmp_path_factory, case):
    one, value = case
    home = tmp_path_factory.mktemp("home") / "home"
    try:
        assert files.change(home, one, value)
    except InvalidInput:
        assume(False)  # it contradicts the default of another setting
    files.remember(home, [SettingValue(one, value, ValueSource.OPTION, one.option)])
    file = home / "config.toml"
    assert from_document(files.read(file), file, ValueSource.FILE)[one.name].value == value
    files.change(home, one, None)
    if one.remembered:
        assert files.remembered(home)[one.name].value == value
    assert one.name not in from_document(files.read(file), file, ValueSource.FILE)


def test_in_a_home_that_cannot_be_written_nothing_is_forgotten(home):
    files.remember(home, from_options({"api.address": "127.0.0.1:1"}, HERE).values())
    with unwritable(home):
        for forgotten in (None, all_settings()["api.address"]):
            with pytest.raises(HostFault) as refused:
                files.forget(home, forgotten)
            assert refused.value.code == "Permission"
    assert files.forget(home, None)
