"""up and down as processes. The appliance is a stand-in that follows the variable DO; the real one is in e2e."""

import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bkpool.cli import down
from bkpool.home.lock import HomeLock, holder

pytestmark = pytest.mark.slow

TIMEOUT = 60.0
WAITING = "waiting for the appliance to end"
"""The line may go on: nothing answers at the address of the stand-in's API."""

APPLIANCE = """
import json, os, signal, sys, threading, time, types
from dataclasses import dataclass

module = types.ModuleType("bkpool.appliance")

class RunOptions:
    def __init__(self, **given):
        self.__dict__ |= given

def passed_on(fd):
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False

received, arrived = os.pipe()

def catch(*numbers):
    # A mask would not do: a thread that began before it, or that is ending, can still take a signal.
    for number in numbers:
        signal.signal(number, lambda number, _frame: os.write(arrived, bytes([number])))

def next_signal():
    return os.read(received, 1)[0]

def run(options, ready):
    from bkpool.core.errors import HostFault
    from bkpool.home.lock import HomeLock
    do = os.environ.get("DO")
    if do == "fail":
        raise HostFault("port 8082 is taken", hint="Free it.", code="PortTaken", exit_code=72)
    if do == "die":
        sys.stderr.write("first\\nlast words\\n")
        os._exit(9)
    if do == "refuse":
        sys.stderr.write("error: no room\\nhint: Make some.\\n")
        os._exit(9)
    if do == "crash":
        raise ZeroDivisionError("internal detail")
    catch(signal.SIGINT)  # SIGTERM ends a start
    if do in {"drain", "deaf"}:
        catch(signal.SIGUSR2)
    with HomeLock(options.home):
        if do == "slow":
            ready({"progress": "backend: process (as asked)"})
            while not (options.home / "go").exists():
                time.sleep(0.01)
        catch(signal.SIGTERM)
        described = {
            "pid": os.getpid(), "apiEndpoint": "http://127.0.0.1:8082", "gatewayEndpoint": "tcp://localhost:1235",
            "metricsEndpoint": "http://127.0.0.1:9090", "backend": "process",
        }
        (options.home / "appliance.json").write_text(json.dumps(described))
        ready({"progress": "backend: process (as asked)"})
        ready({"progress": "getting buildkitd"})
        if do in {"many", "many, then fail"}:
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):
                    thread.join()  # progress is shown from its end on
            for step in range(1469):
                ready({"progress": f"buildkitd: building with go, step {step}"})
        if do == "many, then fail":
            raise HostFault("no", hint="Try.")
        inherited = [int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and passed_on(int(fd))]
        shown = {"pool_files": str(options.pool_files)} | {
            f"{section}.{field}": str(value) for section, values in options.settings for field, value in values
        }
        ready(described | {"settings": shown, "cwd": os.getcwd(), "inherited": inherited})
        print("up and running", file=sys.stderr, flush=True)
        got = [next_signal()]
        if do == "drain":
            until = os.environ.get("UNTIL", "2030-01-01T00:00:00+00:00")
            (options.home / "appliance.new").write_text(json.dumps(described | {"draining": {"until": until}}))
            (options.home / "appliance.new").replace(options.home / "appliance.json")
        while do == "deaf" or (do == "drain" and got[-1] == signal.SIGUSR2):
            got.append(next_signal())
            (options.home / "got").write_text(json.dumps(got))
        if do == "drain" and len(got) == 1:
            got.append(next_signal())
        (options.home / "got").write_text(json.dumps(got))
        (options.home / "appliance.json").unlink()
    return 0

def purge(home, cache):
    (home / "purged").touch()

module.RunOptions, module.run, module.purge = RunOptions, run, purge
sys.modules["bkpool.appliance"] = module
"""


@pytest.fixture
def environment(environment, tmp_path):
    stand_in = tmp_path / "stand-in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(APPLIANCE)
    return environment | {"PYTHONPATH": f"{stand_in}:{environment['PYTHONPATH']}"}


@pytest.fixture
def up(bkpool_here, home):
    """Starts an appliance in the background, and ends it after the test."""
    running = []

    def start(*args, run=bkpool_here, **variables):
        done = run("up", "-d", *args, **variables)
        report = json.loads(done.stdout)
        running.append(os.pidfd_open(report["pid"]))
        return report

    yield start
    for process in running:
        if not _ended(process, 0):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            assert _ended(process, TIMEOUT)
        os.close(process)


def _ended(process, seconds):
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _is_progress(line):
    """Whether it is shown only because the machine is slow."""
    return line in {"starting\n", "getting buildkitd\n"} or line.startswith(WAITING)


def _settled(stderr):
    """What stays on the screen, without the progress that a slow machine shows meanwhile."""
    return "".join(line for line in stderr.splitlines(True) if not _is_progress(line))


def _next_said(process):
    return next(line for line in iter(process.stderr.readline, "") if not _is_progress(line))


def test_up_in_the_background_returns_when_it_is_ready_and_down_when_it_has_ended(up, bkpool, home):
    report = up(run=bkpool)
    assert report["apiEndpoint"] == "http://127.0.0.1:8082"
    assert json.loads(bkpool("down").stdout) == {"stopped": True, "purged": False, "leftovers": 0}
    assert json.loads((home / "got").read_text()) == [signal.SIGTERM]
    assert "up and running" in (home / "logs" / "appliance.log").read_text()


def test_the_appliance_holds_no_directory_or_pipe_of_its_parent(up, bkpool, started, home):
    report = up(run=bkpool)
    # It closes its end of the parent's pipe after the parent has read that it is ready.
    assert any(line == "up and running\n" for line in started("logs", "-f").stdout)
    assert report["cwd"] == str(home)
    assert report["inherited"] == []
    assert os.getsid(report["pid"]) == report["pid"]
    open_now = Counter(str(entry.readlink()) for entry in Path(f"/proc/{report['pid']}/fd").iterdir())
    ends = {count for target, count in open_now.items() if target.startswith("pipe:")}
    assert ends <= {2}, "a pipe with only one end in the appliance"


def test_the_chosen_backend_is_shown(bkpool_here, up):
    up()
    bkpool_here("down")
    again = bkpool_here("up", "-d")
    assert _settled(again.stderr).startswith("backend: process (as asked)\nbkpool is up (backend process, pid ")
    assert bkpool_here("down").returncode == 0


def test_every_option_reaches_the_appliance_in_the_background(up, tmp_path):
    (tmp_path / "pool.yaml").touch()
    report = up(
        *("-f", "pool.yaml", "--backend", "process", "--gateway-host", "a", "--gateway-host", "b"),
        *("--api-address", "[::1]:8082", "--gateway-address", "0.0.0.0:1235", "--drain-timeout", "90s"),
        *("--api-cert", "pool.yaml", "--api-key", "pool.yaml", "--api-tls"),
        *("--dev-issuer", "--dev-issuer-address", "[::1]:8889"),
    )
    settings = report["settings"]
    assert settings["pool_files"] == f"({tmp_path / 'pool.yaml'!r},)"
    assert settings["gateway.hosts"] == "('a', 'b')"
    assert settings["api.address"] == "[::1]:8082"
    assert settings["gateway.address"] == "0.0.0.0:1235"
    assert settings["appliance.drain_timeout"] == "0:01:30"
    assert settings["api.cert"] == settings["api.key"] == str(tmp_path / "pool.yaml")
    assert settings["api.tls"] == settings["dev_issuer.enabled"] == "True"
    assert settings["dev_issuer.address"] == "[::1]:8889"


def test_a_second_up_succeeds(up, bkpool_here):
    first = up()
    again = bkpool_here("up", "-d", "--backend", "auto", "--api-address", "127.0.0.1:8082")
    assert again.returncode == 0
    assert json.loads(again.stdout)["pid"] == first["pid"]
    assert "is already running" in again.stderr


def test_a_second_up_with_another_address_says_what_runs(up, bkpool_here):
    up()
    again = bkpool_here("up", "--api-address", "127.0.0.1:9999")
    assert again.returncode == 74
    assert again.stderr.startswith("error: --api-address: bkpool is already running (pid ")


def test_a_second_up_with_another_value_is_refused(up, bkpool_here, home):
    up("--drain-timeout", "2m")

    def refused(*given, used):
        again = bkpool_here("up", "-d", *given)
        assert (again.returncode, again.stdout) == (74, "")
        assert again.stderr.startswith(f"error: {given[0]}: bkpool is already running (pid ")
        assert f"), with {used}\nhint: Run `bkpool down` first" in again.stderr

    refused("--gateway-address", "0.0.0.0:1235", used="tcp://localhost:1235")
    refused("--api-address", "0.0.0.0:8082", used="api.address 127.0.0.1:8082")
    refused("--gateway-host", "x", used="gateway.hosts localhost")
    refused("--plain-http", used="api.plain_http false")
    refused("--backend", "kind", used="process")
    (home / "running.json").unlink()
    refused("--drain-timeout", "1h", used="appliance.drain_timeout 2m")


def test_a_second_up_with_the_values_in_use_succeeds(up, bkpool_here, home):
    up("--gateway-host", "a", BKPOOL_APPLIANCE_DRAIN_TIMEOUT="1h")
    (home / "config.toml").write_text('[appliance]\ndrain_timeout = "5m"\n')
    same = ("--gateway-host", "a", "--gateway-address", "0.0.0.0:1235", "--drain-timeout", "60m", "--no-plain-http")
    assert bkpool_here("up", "-d", *same, "--api-address", "127.0.0.1:0").returncode == 0
    assert bkpool_here("up", "-d", "--drain-timeout", "5m").returncode == 74


def test_of_two_ups_at_once_the_second_waits_for_the_first(started, bkpool_here, home):
    first = started("up", DO="slow")
    assert _next_said(first) == "backend: process (as asked)\n"
    second = started("up", "-d")
    assert any(line.startswith("waiting for another `bkpool up`") for line in iter(second.stderr.readline, ""))
    (home / "go").touch()
    shown, told = second.communicate(timeout=TIMEOUT)
    assert (second.returncode, json.loads(shown)["pid"]) == (0, first.pid)
    assert "is already running" in told
    assert bkpool_here("down").returncode == 0


def test_of_two_ups_at_once_the_second_fails_if_the_first_ends(started, home):
    first = started("up", DO="slow")
    assert _next_said(first) == "backend: process (as asked)\n"
    second = started("up", "-d")
    for line in iter(second.stderr.readline, ""):
        if line.startswith("waiting"):
            break
    first.kill()
    assert second.wait(TIMEOUT) == 74


def test_ctrl_c_while_it_starts_says_that_nothing_runs(started, home):
    process = started("up", "-d", DO="slow")
    for line in iter(process.stderr.readline, ""):
        if line.startswith("backend"):
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    assert "interrupted: nothing is running\n" in process.stderr.read()
    assert holder(home) is None


@pytest.mark.parametrize("option", ["--api-tls", "--dev-issuer"])
def test_a_second_up_with_a_missing_feature_is_refused(up, bkpool_here, option):
    up()
    again = bkpool_here("up", "-d", option)
    assert again.returncode == 74
    assert again.stderr.startswith(f"error: {option}: bkpool is already running (pid ")


def test_pool_files_for_a_running_appliance_cause_a_note(up, bkpool_here, tmp_path):
    up()
    (tmp_path / "pool.yaml").touch()
    assert "read at the start only" in bkpool_here("up", "-d", "-f", "pool.yaml").stderr


@pytest.mark.parametrize("detach", [(), ("-d",)])
def test_up_shows_the_error_of_the_appliance(bkpool, detach):
    done = bkpool("up", *detach, DO="fail")
    assert (done.returncode, done.stdout) == (72, "")
    assert _settled(done.stderr) == "error: port 8082 is taken\nhint: Free it.\n"


def test_for_an_appliance_that_dies_silently_up_shows_its_log(bkpool_here, home):
    done = bkpool_here("up", "-d", DO="die")
    assert done.returncode == 71
    assert _settled(done.stderr).startswith("error: the appliance ended before it was ready: last words\nhint: Read ")


def test_of_an_appliance_that_ends_with_an_error_in_its_log_up_shows_the_error_and_not_its_hint(bkpool_here):
    done = bkpool_here("up", "-d", DO="refuse")
    assert _settled(done.stderr).startswith("error: the appliance ended before it was ready: no room\nhint: Read ")


def test_an_error_before_the_appliance_begins_reaches_the_up_that_waits(environment, tmp_path):
    ours, theirs = os.pipe()
    with os.fdopen(ours) as reader:
        subprocess.run(
            [sys.executable, "-m", "bkpool", "up", "--metrics-address", "[]:1"],
            env=environment | {"BKPOOL_READY_FD": str(theirs)},
            cwd=tmp_path,
            pass_fds=(theirs,),
            capture_output=True,
            check=False,
            timeout=TIMEOUT,
        )
        os.close(theirs)
        failed = json.loads(reader.readline())["failed"]
    assert failed["message"] == "--metrics-address: '[]:1' is not of the form HOST:PORT"
    assert (failed["code"], failed["exit_code"]) == ("InvalidInput", 2)


@pytest.mark.parametrize("detach", [(), ("-d",)])
def test_an_internal_error_is_one_line_and_its_traceback_is_saved(bkpool, home, detach):
    done = bkpool("up", *detach, DO="crash")
    assert done.returncode in {70, 71}
    assert "internal error (ZeroDivisionError); please report it" in done.stderr
    assert "Traceback" not in done.stderr
    assert "internal detail" in (home / "logs" / "crash.log").read_text()
    assert (home / "logs" / "crash.log").stat().st_mode & 0o777 == 0o600


def test_a_debug_run_shows_the_traceback(bkpool):
    assert "Traceback" in bkpool("up", DO="crash", BKPOOL_DEBUG="1").stderr


def test_up_in_the_foreground_runs_until_its_signal(started, home):
    process = started("up")
    assert _next_said(process) == "backend: process (as asked)\n"
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line == "}\n":
            break
    assert json.loads("".join(shown))["backend"] == "process"
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 0
    assert json.loads((home / "got").read_text()) == [signal.SIGINT]


def test_many_steps_on_a_terminal_are_one_line(on_terminal):
    code, shown = on_terminal("up", DO="many, then fail", TERM="xterm")
    assert code == 71
    assert "building with go, step 1468" in shown
    assert shown.count("\n") <= 6, shown


def test_many_steps_in_the_foreground_are_few_lines(started):
    process = started("up", DO="many")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("bkpool is up"):
            break
    assert lines[-1].startswith("bkpool is up"), lines
    assert len(lines) <= 5, lines
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 0


def test_down_without_an_appliance_succeeds(bkpool, home):
    assert json.loads(bkpool("down").stdout) == {"stopped": False, "purged": False, "leftovers": 0}
    assert json.loads(bkpool("down", "--purge").stdout) == {"stopped": False, "purged": True, "leftovers": 0}
    assert (home / "purged").exists()


def test_down_waits_for_the_drain_and_ctrl_c_ends_only_the_wait(up, started, home):
    report = up(DO="drain")
    process = started("down")
    assert process.stderr.readline().startswith(WAITING)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT) == 130
    assert "goes on draining" in process.stderr.read()
    assert Path(f"/proc/{report['pid']}").exists()


def test_a_second_down_joins_the_drain_and_cuts_nothing(up, started, bkpool_here, home):
    """The first one was ended by Ctrl-C. SIGTERM of somebody else is a second signal and does cut."""
    report = up(DO="drain")
    for _ in range(2):
        down = started("down")
        assert down.stderr.readline().startswith(WAITING)
        down.send_signal(signal.SIGINT)
        assert down.wait(TIMEOUT) == 130
    last = started("down")
    assert last.stderr.readline().startswith(WAITING)
    os.kill(report["pid"], signal.SIGTERM)
    assert last.wait(TIMEOUT) == 0
    assert json.loads((home / "got").read_text()) == [signal.SIGUSR2] * 3 + [signal.SIGTERM]


def test_up_while_it_drains_says_that_it_stops(up, started, bkpool_here):
    report = up(DO="drain", TZ="UTC")
    down = started("down")
    assert down.stderr.readline().startswith(WAITING)
    for detach in ((), ("-d",)):
        again = bkpool_here("up", *detach, TZ="UTC")
        assert (again.returncode, again.stdout) == (74, "")
        assert again.stderr == (
            f"error: bkpool is stopping (pid {report['pid']}); its builds may go on until 00:00:00\n"
            "hint: Run `bkpool down`, which waits until it has ended, and then `bkpool up` again.\n"
        )
    assert bkpool_here("down", "--now").returncode == 0
    assert down.wait(TIMEOUT) == 0


@pytest.mark.parametrize(
    ("do", "until", "options", "fault"),
    [
        ("deaf", "", (), "was told to end, and has not ended within 0 s"),
        ("deaf", "", ("--now",), "was told to end, and has not ended within 0 s"),
        ("drain", "2026-01-01T00:00:00+00:00", (), "should have cut its builds at 00:00:00, and still runs"),
    ],
)
def test_down_does_not_wait_for_ever_for_an_appliance_that_hangs(
    up, bkpool_here, home, monkeypatch, do, until, options, fault
):
    report = up(DO=do, UNTIL=until)
    if do == "deaf":
        (home / "appliance.json").unlink()
    monkeypatch.setattr(down, "END_TIMEOUT", 0.0)
    monkeypatch.setattr(down, "POLL_INTERVAL", 0.05)
    done = bkpool_here("down", *options, TZ="UTC")
    assert done.returncode == 71
    assert _settled(done.stderr).startswith(f"error: the appliance (pid {report['pid']}) {fault}\n")
    assert f"`kill -9 {report['pid']}` ends it" in done.stderr


def test_down_of_an_appliance_whose_signals_are_not_handled_is_bounded(up, bkpool_here, monkeypatch):
    report = up(DO="deaf", BKPOOL_APPLIANCE_DRAIN_TIMEOUT="0s")
    os.kill(report["pid"], signal.SIGSTOP)
    monkeypatch.setattr(down, "END_TIMEOUT", 0.0)
    monkeypatch.setattr(down, "POLL_INTERVAL", 0.05)
    done = bkpool_here("down")
    assert done.returncode == 71
    fault = "has not begun to end within 0 s"
    assert _settled(done.stderr).startswith(f"error: the appliance (pid {report['pid']}) {fault}\n")


def test_down_signals_no_program_that_does_not_hold_the_home(bkpool, bkpool_here, home):
    """As with an appliance in a container: its number means another program here."""
    with subprocess.Popen(["sleep", "100"]) as other:
        with HomeLock(home):
            (home / "lock").write_text(f"{other.pid:<20}\n")
            done = bkpool_here("down", "--now")
        assert other.poll() is None
        other.kill()
    assert done.returncode == 71
    assert done.stderr == (
        f"error: {home} is held, but not by process {other.pid} of this machine, which its lock names\n"
        "hint: The appliance runs in a container, or on another machine that shares the directory: stop it there.\n"
    )


def test_on_a_terminal_purge_asks_first(up, on_terminal, bkpool_here, home):
    report = up()
    question = f"This removes all leases, keys, build caches and remembered options in {home}. Go on? [y/N]: "
    assert on_terminal("down", "--purge", typed="n\n") == (1, f"n\n{question}nothing was changed\n")
    assert holder(home) == report["pid"]
    code, shown = on_terminal("down", "--purge", typed="y\n")
    assert (code, shown) == (0, f"y\n{question}bkpool is down, and state and caches are removed\n")
    up()
    assert on_terminal("down", "--purge", "--yes") == (0, "bkpool is down, and state and caches are removed\n")


def test_down_now_sends_the_second_signal(up, bkpool_here, home):
    up(DO="drain")
    assert bkpool_here("down", "--now").returncode == 0
    assert sorted(json.loads((home / "got").read_text())) == [signal.SIGINT, signal.SIGTERM]


def test_on_a_terminal_up_shows_the_endpoints_and_next_steps(up, on_terminal):
    up()
    code, shown = on_terminal("up", "-d")
    assert code == 0
    assert "gateway  tcp://localhost:1235" in shown
    assert "next: bkpool build" in shown
    assert on_terminal("down") == (0, "bkpool is down\n")


@pytest.mark.parametrize("detach", [(), ("-d",)])
def test_a_home_that_cannot_be_created_is_one_line(bkpool, tmp_path, detach):
    (tmp_path / "file").touch()
    done = bkpool("up", *detach, BKPOOL_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_next_up_uses_the_options_of_the_last_one_and_says_so(up, bkpool_here, home, tmp_path):
    (tmp_path / "pool.yaml").touch()
    up("-f", "pool.yaml", "--api-address", "127.0.0.1:1", "--gateway-host", "a", "--gateway-host", "b", "--api-tls")
    assert (home / "remembered.toml").stat().st_mode & 0o777 == 0o600
    bkpool_here("down")
    done = bkpool_here("up", "-d", "--api-address", "127.0.0.1:2")
    assert done.stderr.splitlines()[0] == (
        "remembered from an earlier up: --api-tls --gateway-host a --gateway-host b "
        "(`bkpool config unset --all` forgets)"
    )
    settings = json.loads(done.stdout)["settings"]
    assert settings["gateway.hosts"] == "('a', 'b')"
    assert settings["api.address"] == "127.0.0.1:2"
    assert settings["pool_files"] == "()"
    bkpool_here("down")
    report = up("--no-api-tls", BKPOOL_GATEWAY_HOSTS="c")
    assert (report["settings"]["api.tls"], report["settings"]["gateway.hosts"]) == ("False", "('c',)")
    assert report["settings"]["api.address"] == "127.0.0.1:2"
    bkpool_here("down")
    assert json.loads(bkpool_here("config", "unset", "gateway.hosts").stdout)["forgotten"] is True
    report = up()
    assert (report["settings"]["api.tls"], report["settings"]["gateway.hosts"]) == ("False", "()")
    bkpool_here("down")
    assert json.loads(bkpool_here("config", "unset", "--all").stdout)["forgotten"] is True
    assert up()["settings"]["api.address"] == "127.0.0.1:8082"


def test_an_up_that_fails_is_not_remembered(bkpool_here, home):
    assert bkpool_here("up", "-d", "--api-address", "127.0.0.1:1", DO="fail").returncode == 72
    assert not (home / "remembered.toml").exists()


def test_the_file_and_the_environment_reach_the_appliance_in_the_background(up, home, tmp_path):
    (home / "config.toml").write_text('[api]\nkey = "api.key"\n\n[controller]\nmax_failures = 7\n')
    (home / "api.key").touch()
    (tmp_path / "api.crt").touch()
    settings = up(BKPOOL_API_CERT="api.crt", BKPOOL_GATEWAY_FIRST_WAIT="3s")["settings"]
    assert settings["controller.max_failures"] == "7"
    assert settings["gateway.first_wait"] == "0:00:03"
    assert settings["api.cert"] == str(tmp_path / "api.crt")
    assert settings["api.key"] == str(home / "api.key")


@pytest.mark.parametrize("detach", [(), ("-d",)])
def test_a_fault_in_the_file_is_one_line_and_nothing_starts(bkpool, home, detach):
    (home / "config.toml").write_text("[gateway]\nconections = 5\n")
    done = bkpool("up", *detach)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: {home}/config.toml: [gateway] conections: there is no such field\nhint: Did you mean connections?\n"
    )


def test_a_remembered_file_that_is_gone_says_how_to_forget_it(up, bkpool_here, tmp_path):
    for name in ("api.crt", "api.key"):
        (tmp_path / name).touch()
    up("--api-cert", "api.crt", "--api-key", "api.key")
    bkpool_here("down")
    (tmp_path / "api.crt").unlink()
    done = bkpool_here("up", "-d")
    assert done.returncode == 2
    assert "hint: Give --api-cert again, or forget it: `bkpool config unset api.cert`.\n" in done.stderr
