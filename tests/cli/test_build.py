"""`build` with a stand-in for buildx, which shows the signals, arguments and files that it was given.

The real buildx is in e2e.
"""

import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from bkpool.cli import child, lease
from bkpool.cli.build import command as build_command
from bkpool.cli.private_directory import remove_abandoned

from .conftest import next_said, settled

pytestmark = pytest.mark.slow

TOKEN = "t0ken-" + "A" * 37
TIMEOUT = 60.0

BUILDX = """#!{python} -ES
import json, os, signal, sys
def cmdline(pid):
    return open(f"/proc/{{pid}}/cmdline").read()
if sys.argv[1] == "version":
    print("github.com/docker/buildx v0.38.2 0000000")
elif sys.argv[1] == "create":
    if os.environ.get("CREATE_FAILS"):
        sys.exit("first line\\nERROR: no such driver")
    os.mkdir(os.environ["BUILDX_CONFIG"])
    with open(os.path.join(os.environ["BUILDX_CONFIG"], "argv"), "w") as file:
        json.dump(sys.argv[1:], file)
else:
    config = os.environ["BUILDX_CONFIG"]
    private = os.path.dirname(config)
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if os.environ.get("CATCHES"):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(40 + number))
        else:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    print(json.dumps({{
        "argv": sys.argv[1:],
        "pid": os.getpid(),
        "created": json.load(open(os.path.join(config, "argv"))),
        "private": private,
        "mode": oct(os.stat(private).st_mode & 0o777),
        "files": {{name: oct(os.stat(os.path.join(private, name)).st_mode & 0o777) for name in os.listdir(private)}},
        "seen": cmdline(os.getpid()) + cmdline(os.getppid()) + repr(os.environ),
    }}), flush=True)
    print("read: " + sys.stdin.read())
    sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def environment(environment, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "buildx"
    script.write_text(BUILDX.format(python=sys.executable))
    script.chmod(0o755)
    # Only ours: with an empty cache nothing else could be found.
    return environment | {"PATH": str(tools), "BKPOOL_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}


def test_buildx_gets_the_arguments_the_lease_and_the_terminal(bkpool, api, appliance):
    done = bkpool("build", "-p", "big", "-tpool", "--load", ".", "--namespace=team", stdin="context", CODE="3")
    assert done.returncode == 3
    first, *rest = done.stdout.splitlines()
    report = json.loads(first)
    assert report["argv"] == ["build", "--builder", "bkpool", "-tpool", "--load", "."]
    assert rest == ["read: context"]
    private = report["private"]
    options = f"cacert={private}/ca.crt,cert={private}/client.crt,key={private}/client.key"
    assert report["created"] == [
        *("create", "--name", "bkpool", "--driver", "remote", "--driver-opt", options, "tcp://localhost:1235")
    ]
    asked = api.next("allocate").body
    assert (asked["poolName"], asked["namespace"]) == ("big", "team")
    assert asked["jobId"]
    assert api.next("release").body == {"token": TOKEN}


def test_keys_are_private_while_the_build_runs_and_gone_after_it(bkpool, api, appliance):
    report = json.loads(bkpool("build", ".").stdout.splitlines()[0])
    assert report["mode"] == "0o700"
    assert report["files"]["client.key"] == "0o600"
    assert not Path(report["private"]).exists()


def test_the_token_is_in_no_argv_environment_or_file_of_the_build(bkpool, api, appliance):
    done = bkpool("build", ".")
    report = json.loads(done.stdout.splitlines()[0])
    assert TOKEN not in report["seen"] + done.stderr
    assert "lease.json" not in report["files"]


@pytest.mark.parametrize(
    ("number", "catches"), [(signal.SIGTERM, ""), (signal.SIGTERM, "1"), (signal.SIGINT, "1"), (signal.SIGHUP, "1")]
)
def test_a_signal_reaches_buildx_and_its_exit_code_is_returned(started, api, appliance, number, catches):
    process = started("build", ".", CATCHES=catches)
    report = json.loads(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(TIMEOUT) == (40 if catches else 128) + number
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}
    assert not Path(report["private"]).exists()


def test_a_signal_while_waiting_for_the_lease_leaves_nothing(started, api, appliance):
    def wait(_call, connection):
        process.send_signal(signal.SIGTERM)
        assert connection.recv(1) == b""
        raise ConnectionAbortedError  # as a server does whose caller went away

    api.before_answer["allocate"] = wait
    process = started("build", ".")
    assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert process.stdout.read() == ""
    api.next("allocate")
    assert api.calls.empty()


def test_a_lease_that_arrives_after_the_signal_is_released(started, api, appliance):
    def answer_all_the_same(_call, connection):
        process.send_signal(signal.SIGTERM)
        assert connection.recv(1) == b""

    api.before_answer["allocate"] = answer_all_the_same
    process = started("build", ".")
    assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    assert process.stdout.read() == ""
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}


def test_the_lease_is_renewed_while_the_build_runs(started, api, appliance):
    process = started("build", "--ttl", "1s", ".")
    api.next("allocate")
    assert api.next("renew").body == {"token": TOKEN, "ttl": "1s"}
    process.communicate("", timeout=TIMEOUT)
    assert process.returncode == 0


def test_a_lease_that_may_not_be_renewed_is_reported_once_and_the_build_continues(started, api, appliance):
    refused = {"code": "NotRenewable", "message": "this lease cannot be renewed: no rule names this caller"}
    api.answers["renew"] = (403, {"error": refused})
    process = started("build", "--ttl", "1s", ".")
    assert next_said(process) == f"warning: {refused['message']}\n"
    process.communicate("", timeout=TIMEOUT)
    assert process.returncode == 0


def test_a_lost_lease_is_reported_and_the_build_continues(started, api, appliance):
    api.answers["renew"] = (410, {"error": {"code": "Gone", "message": "the worker was lost"}})
    process = started("build", "--ttl", "1s", ".")
    assert next_said(process) == "warning: the lease is lost: the worker was lost\n"
    process.communicate("", timeout=TIMEOUT)
    assert process.returncode == 0


def test_a_builder_that_cannot_be_made_is_one_line_and_the_lease_is_released(bkpool, api, appliance):
    done = bkpool("build", ".", CREATE_FAILS="1")
    assert done.returncode == 71
    assert settled(done.stderr).startswith("error: buildx could not create a builder: ERROR: no such driver\nhint: ")
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}


def test_an_answer_without_certificates_is_released_too(bkpool, api, appliance):
    status, lease = api.answers["allocate"]
    api.answers["allocate"] = (status, lease | {"clientCert": "***"})
    assert bkpool("build", ".").returncode == 69
    api.next("allocate")
    api.next("release")


def test_a_release_that_fails_does_not_change_the_builds_exit_code(bkpool, api, appliance):
    api.answers["release"] = (503, {"error": {"code": "Unavailable", "message": "stopping"}})
    done = bkpool("build", ".", CODE="0")
    assert done.returncode == 0
    assert "the worker was not released, and its lease will expire by itself: stopping" in done.stderr


@pytest.mark.parametrize(
    ("given", "ours", "theirs"),
    [
        (["."], {}, ["."]),
        (["-t", "a", ".", "--pool", "p"], {"pool": "p"}, ["-t", "a", "."]),
        (["--pool=p", "--", "--pool=q"], {"pool": "p"}, ["--pool=q"]),
        (["-p", "p", "-pq", "-p=r"], {"pool": "p"}, ["-pq", "-p=r"]),
        (["-n", "--", "."], {"namespace": "--"}, ["."]),
        (["--", "--help"], {}, ["--help"]),
        ([], {}, []),
    ],
)
def test_our_options_are_separated_from_those_of_buildx(given, ours, theirs, monkeypatch):
    monkeypatch.delenv("BKCTL_NAMESPACE", raising=False)
    context = build_command.make_context("build", list(given))
    assert context.obj == theirs
    assert {name: context.params[name] for name in ours} == ours


def test_driver_options_survive_a_comma_in_a_path():
    arguments = lease.create_arguments({"gatewayEndpoint": "gw:1"}, Path("/a,b"), "x")
    assert arguments[-2:] == ['"cacert=/a,b/ca.crt","cert=/a,b/client.crt","key=/a,b/client.key"', "tcp://gw:1"]


def test_kill_9_of_bkpool_ends_buildx_and_the_next_build_removes_the_keys(started, bkpool, api, appliance, tmp_path):
    process = started("build", ".")
    report = json.loads(process.stdout.readline())
    private = Path(report["private"])
    buildx = os.pidfd_open(report["pid"])
    process.kill()
    assert select.select([buildx], [], [], TIMEOUT)[0], "buildx goes on"
    os.close(buildx)
    assert (private / "client.key").exists()
    assert bkpool("build", ".").returncode == 0
    assert not private.exists()


def test_the_keys_of_a_build_that_runs_are_not_removed_by_another(started, bkpool, api, appliance):
    process = started("build", ".")
    private = Path(json.loads(process.stdout.readline())["private"])
    assert bkpool("build", ".").returncode == 0
    assert (private / "client.key").exists()
    process.communicate("", timeout=TIMEOUT)
    assert not private.exists()


def test_a_child_whose_parent_has_ended_before_it_could_ask_for_the_signal_ends():
    """The child of a child calls what the first process prepared, so its parent is not the one that it should be."""
    prepare = child.ends_with_parent()
    ours, theirs = os.pipe()
    if (middle := os.fork()) == 0:
        if (last := os.fork()) == 0:
            prepare()
            os._exit(0)
        _, status = os.waitpid(last, 0)
        os.write(theirs, bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(theirs)
    assert os.read(ours, 1) == bytes([128 + signal.SIGKILL])
    os.close(ours)


def test_the_lease_of_a_build_ends_when_it_is_unused(bkpool, api, appliance):
    """A service of an earlier version takes any metadata."""
    bkpool("build", ".")
    assert api.next("allocate").body["metadata"] == {"endWhenUnused": "true"}


def test_only_own_directories_that_nobody_holds_are_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "bkpool-private-link").symlink_to(tmp_path / "kept")
    (tmp_path / "bkpool-private-file").touch()
    (tmp_path / "bkpool-private-left").mkdir()
    (tmp_path / "bkpool-private-left" / "client.key").touch()
    remove_abandoned(tmp_path, "bkpool-private-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bkpool-private-file", "bkpool-private-link", "kept"]
