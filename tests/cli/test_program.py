"""The program as a whole: how it starts, what it lists, and how it shows an error."""

import json
import socket
import subprocess
import sys

import pytest

from bkpool.cli import COMMANDS, program
from bkpool.cli.errors import guarded
from bkpool.core.errors import Gone
from bkpool.telemetry.log_file import RotatedFile
from bkpool.workers.processes import slot_log

from .conftest import LONGEST_RUN, TIMEOUT

HEAVY = {
    "aiohttp",
    "urllib.request",
    "h2",
    "pydantic",
    "rich",
    "structlog",
    "yaml",
    "asyncio",
    "subprocess",
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("version",), ("release", "-t", "t" * 43), ("--help",)])
def test_a_light_command_imports_nothing_heavy(environment, api, appliance, arguments):
    assert not _imported(environment, arguments) & {*HEAVY, "cryptography"}


@pytest.mark.slow
def test_allocate_imports_no_more_than_it_takes_to_make_a_key(environment, api, appliance):
    assert not _imported(environment, ("allocate",)) & HEAVY


def _imported(environment, arguments):
    started = [sys.executable, "-X", "importtime", "-m", "bkpool", *arguments]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, check=True, timeout=LONGEST_RUN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "bkpool.cli" in imported
    return imported


def test_every_command_is_listed_with_its_own_summary():
    context = program.make_context("bkpool", [], resilient_parsing=True)
    for name, summary in COMMANDS.items():
        command = program.get_command(context, name)
        assert command is not None
        assert command.get_short_help_str(200) == summary


def test_a_mistyped_command_has_a_hint(called):
    assert called("buidl") == (2, "", "error: there is no command 'buidl'\nhint: Did you mean build?\n")
    assert called("zzz")[2] == "error: there is no command 'zzz'\nhint: See `bkpool --help`.\n"


def test_a_home_that_is_a_file_is_named(called, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BKPOOL_HOME", str(tmp_path / "file"))
    for command in ("status", "up", "config"):
        code, _, told = called(command)
        assert (code, told.splitlines()[0]) == (2, f"error: BKPOOL_HOME: {tmp_path / 'file'} is not a directory")


def test_an_error_is_shown_without_control_characters(capsys):
    def fail():
        raise Gone("ended\x1b[31m", hint="again\r\x07")

    assert guarded(fail) == 7
    assert capsys.readouterr().err == "error: ended[31m\nhint: again\n"


def test_an_interrupt_is_quiet(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert guarded(interrupt) == 130
    assert capsys.readouterr().err == ""


def test_a_traceback_that_cannot_be_saved_is_reported(capsys, monkeypatch):
    monkeypatch.setenv("BKPOOL_HOME", "/dev/null/home")
    monkeypatch.delenv("BKPOOL_DEBUG", raising=False)
    assert guarded(lambda: 1 / 0) == 70
    assert capsys.readouterr().err == (
        "error: internal error (ZeroDivisionError); please report it; BKPOOL_DEBUG=1 shows the traceback\n"
    )


@pytest.mark.parametrize("arguments", [(), ("auth",)])
def test_without_a_command_the_help_is_printed_once(called, arguments):
    code, out, err = called(*arguments)
    assert (code, err) == (0, "")
    assert out == called(*arguments, "--help")[1]
    assert out.count(f"Usage: {' '.join(['bkpool', *arguments])} [OPTIONS] COMMAND") == 1


@pytest.mark.parametrize("arguments", [("logs",), ("logs", "nobody"), ("logs", "../x")])
def test_a_missing_log_is_one_sentence(called, arguments):
    code, _, stderr = called(*arguments)
    assert code == 5
    assert stderr.startswith("error: there is no log of ")


def test_the_hint_names_the_namespaces_of_the_logs(called, home):
    (home / "logs").mkdir()
    for name in ("default.one-worker-0", "team.one-worker-0", "team.two-worker-0"):
        (home / "logs" / f"{name}.log").touch()
    assert called("logs", "one-worker-0", "-n", "nope")[2] == (
        f"error: there is no log of one-worker-0 of the namespace nope in {home}/logs\n"
        "hint: There are logs of: one-worker-0 (-n default), one-worker-0 (-n team), two-worker-0 (-n team).\n"
    )
    hint = called("logs", "three-worker-0", "-n", "team")[2].splitlines()[1]
    assert hint == "hint: There are logs of: one-worker-0 (-n default), one-worker-0, two-worker-0."


def test_the_log_of_a_worker_is_shown_and_followed(bkpool, started, home):
    (home / "logs").mkdir()
    log = home / "logs" / "default.w-0.log"
    log.write_text("one\ntwo\n")
    assert bkpool("logs", "w-0").stdout == "one\ntwo\n"
    process = started("logs", "-f", "-l", "1", "w-0")
    assert process.stdout.readline() == "two\n"
    with log.open("a") as file:
        file.write("three\n")
    assert process.stdout.readline() == "three\n"


def test_the_log_of_the_appliance_is_shown_and_followed_across_its_rotation(bkpool, started, home):
    (home / "logs").mkdir()
    log = home / "logs" / "appliance.log"
    for number, name in enumerate(("appliance.log.2", "appliance.log.1", "appliance.log")):
        (home / "logs" / name).write_text(f"{number}\n{number} again\n")
    assert bkpool("logs").stdout.splitlines() == ["0", "0 again", "1", "1 again", "2", "2 again"]
    assert bkpool("logs", "-l", "3").stdout.splitlines() == ["1 again", "2", "2 again"]
    assert bkpool("logs", "-l", "0").stdout == ""
    process = started("logs", "-f", "-l", "1")
    assert process.stdout.readline() == "2 again\n"
    with log.open("ab") as file:
        rotated = RotatedFile(log, [file.fileno()], size=20)
        for number in range(3, 9):
            rotated.write(f"{number} as before\n".encode())
            assert process.stdout.readline() == f"{number} as before\n"


def test_the_log_of_a_worker_is_shown_and_followed_across_its_limit(bkpool, started, home):
    (home / "logs").mkdir()
    log = home / "logs" / "default.w-0.log"
    with log.open("ab", buffering=0) as daemon:
        daemon.write(b"one\ntwo\n")
        slot_log.bound(log, 7)
        daemon.write(b"three\n")
        assert bkpool("logs", "w-0").stdout == "two\nthree\n"
        process = started("logs", "-f", "-l", "1", "w-0")
        assert process.stdout.readline() == "three\n"
        daemon.write(b"more than four\n")
        assert process.stdout.readline() == "more than four\n"
        slot_log.bound(log, 7)
        daemon.write(b"five\n")
        assert process.stdout.readline() == "five\n"


@pytest.mark.parametrize("options", [(), ("-f",)])
def test_a_reader_of_a_log_who_has_enough_is_no_error(started, home, options):
    (home / "logs").mkdir()
    (home / "logs" / "appliance.log").write_text("a line\n" * 100_000)
    process = started("logs", *options)
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.wait(TIMEOUT) == 1
    assert process.stderr.read() == ""
    process.stdout = None


def test_the_toolchain_shows_the_path_of_a_tool(bkpool, buildx, environment):
    assert bkpool("toolchain", "buildx").stdout == f"{buildx}\n"
    assert json.loads(bkpool("toolchain", "--json", "buildx").stdout) == {"buildx": str(buildx)}
    unknown = bkpool("toolchain", "nope")
    assert (unknown.returncode, unknown.stderr.splitlines()[0]) == (2, "error: TOOL: there is no tool 'nope'")


def test_doctor_fails_where_a_check_fails(bkpool, tmp_path):
    (tmp_path / "file").touch()
    done = bkpool("doctor", BKPOOL_HOME=str(tmp_path / "file" / "home"))
    report = json.loads(done.stdout)
    failed = [check for check in report["checks"] if check["ok"] is False]
    assert (done.returncode, report["ok"]) == (1, False)
    assert all(check["fix"] for check in failed)


def test_doctor_on_a_terminal_has_one_line_for_each_check(on_terminal):
    _, shown = on_terminal("doctor")
    assert any(line.startswith(("✓ python", "! python")) for line in shown.splitlines())


def test_doctor_checks_the_ports_of_the_settings(bkpool, home):
    (home / "config.toml").write_text('[api]\naddress = "127.0.0.1:18999"\n')
    checks = {check["name"]: check for check in json.loads(bkpool("doctor").stdout)["checks"]}
    assert checks["settings"]["ok"] is True
    assert "API" in checks["port 18999"]["detail"]


def test_doctor_knows_the_development_issuer_of_its_own_appliance(bkpool, home, appliance):
    with socket.create_server(("127.0.0.1", 0)) as issuer:
        port = issuer.getsockname()[1]
        (home / "config.toml").write_text(f'[dev_issuer]\nenabled = true\naddress = "127.0.0.1:{port}"\n')
        described = appliance | {"devIssuer": f"http://127.0.0.1:{port}"}
        (home / "appliance.json").write_text(json.dumps(described))
        checks = {check["name"]: check for check in json.loads(bkpool("doctor").stdout)["checks"]}
    assert checks[f"port {port}"]["detail"] == "development issuer: used by this bkpool"


def test_doctor_shows_a_fault_in_the_settings(bkpool, home):
    (home / "config.toml").write_text("[api]\ncolour = 1\n")
    done = bkpool("doctor")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["settings"]["ok"]) == (1, False)
    assert checks["settings"]["detail"].endswith("[api] colour: there is no such field")


def test_doctor_judges_the_appliance_that_runs(called, appliance, home):
    """Not the ports that another `up` would use."""
    (home / "config.toml").write_text('[api]\naddress = "127.0.0.1:1"\n')
    checks = {one["name"]: one for one in json.loads(called("doctor")[1])["checks"]}
    port = appliance["apiEndpoint"].rpartition(":")[2]
    assert checks[f"port {port}"]["detail"] == "API: used by this bkpool"
    assert checks["port 1235"]["detail"] == "gateway: used by this bkpool"
    assert "port 1" not in checks
