"""A home of another user, an appliance that is down while another program has its port, and no command at all."""

import io
import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Event, Thread

import pytest

from bkpool.cli import client, console, launch
from bkpool.cli.home import fault_at_home

pytestmark = pytest.mark.slow

AS_NOBODY = """
import importlib, json, os, sys
import bkpool.cli as cli
for name in cli.COMMANDS:
    importlib.import_module(f"bkpool.cli.{name.replace('-', '_')}")
import bkpool.appliance, bkpool.toolchain.doctor, bkpool.cli.tools, bkpool.pki.storage
os.setgroups([])
os.setuid(65534)
for command in json.loads(sys.argv[1]):
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(theirs, 2)
        os.close(theirs)
        sys.argv[:] = ["bkpool", *command]
        sys.exit(cli.main())
    os.close(theirs)
    with open(ours) as said:
        stderr = said.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), stderr]), flush=True)
"""
"""Imports everything as root, because the tests may be in a directory of root, and becomes another user.

Each command runs in a fork, because the imports take longer than all commands.
"""
COMMANDS = (
    ("status",),
    ("logs",),
    ("pki", "show"),
    ("kubeconfig",),
    ("allocate",),
    ("down",),
    ("up", "-d"),
    ("config",),
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_home_of_another_user_is_a_sentence(environment, home):
    (home / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps(COMMANDS)],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    answers = dict(zip(COMMANDS, map(json.loads, done.stdout.splitlines()), strict=True))
    for command, (code, stderr) in answers.items():
        assert code in {77, 78}, command
        assert stderr.startswith(f"error: {home}"), command
        assert "Permission denied\nhint: " in stderr, command
        belongs = " belongs to user 0. Run bkpool as that user, or set BKPOOL_HOME to a directory of yours."
        assert belongs in stderr, command


def test_an_error_elsewhere_is_not_one_at_the_home(home, monkeypatch):
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    for path in (str(home), f"{home}/x/y", str(home.parent)):
        assert fault_at_home(PermissionError(13, "Permission denied", path)).code == "Permission"
    assert fault_at_home(PermissionError(13, "Permission denied", "/elsewhere")) is None
    assert fault_at_home(PermissionError()) is None


class Stranger(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


def test_another_program_at_the_port_of_an_appliance_that_is_down_is_named(called, home, monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        monkeypatch.setattr(client, "API_PORT", server.server_port)
        Thread(target=server.handle_request, daemon=True).start()
        code, _, err = called("status")
    assert code == 69
    assert err.startswith(
        f"error: the appliance of this home ({home}) is not running, and what answers at "
        f"http://localhost:{server.server_port} is another program\nhint: Start it"
    )


def test_an_appliance_that_is_down_is_named_by_its_home_where_nothing_listens_either(called, home, monkeypatch):
    with socket.socket() as taken:  # bound, so that nobody else gets the port, and never listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(client, "API_PORT", port)
        code, _, err = called("status")
    assert code == 69
    assert err == (
        f"error: the appliance of this home ({home}) is not running, and no appliance answers at "
        f"http://localhost:{port}\nhint: Start it with `bkpool up -d`, or set BKCTL_ENDPOINT.\n"
    )


def test_status_shows_only_the_pools_of_the_namespace_that_is_given(called, api, appliance):
    names = [("a", "default"), ("b", "team")]
    api.answers["pools"] = (200, {"pools": [{"name": name, "namespace": namespace} for name, namespace in names]})
    code, out, _ = called("status", "-n", "team")
    assert code == 0
    assert '"b"' in out
    assert '"a"' not in out


def test_logs_say_that_the_appliance_has_its_log_elsewhere(called, home, appliance):
    (home / "logs").mkdir()
    (home / "logs" / "appliance.log").write_text("")
    code, _, err = called("logs")
    assert code == 0
    assert err.startswith(f"note: bkpool runs in the foreground (pid {os.getpid()})")


def test_notes_of_a_start_stay_on_the_screen(capsys):
    launch.show(None, "note: no file names pool default/two any more")
    launch.show(None, "opening the store")
    assert capsys.readouterr().err == "note: no file names pool default/two any more\n"


class Screen(io.TextIOWrapper):
    """A stderr with bytes below it that says that it is a terminal, and tells when something was drawn."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self.drawn = Event()

    def isatty(self):
        return True

    def write(self, text):
        written = super().write(text)
        if "starting" in text:
            self.drawn.set()
        return written


def test_a_note_above_the_spinner_has_a_line_of_its_own(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(console, "PROGRESS_DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    with console.Progress("starting") as progress:
        assert screen.drawn.wait(60)
        launch.show(progress, "backend: process (as asked)")
    before = screen.buffer.getvalue().decode().partition("backend: process (as asked)\n")[0]
    assert before.endswith("\r\x1b[2K"), "the line with the spinner was erased"


def test_status_says_that_there_is_no_pool(on_terminal, api, appliance):
    api.answers["pools"] = (200, {"pools": [{"name": "a", "namespace": "default"}]})
    code, shown = on_terminal("status", "-n", "team")
    assert code == 0
    assert "there is no pool in namespace 'team' that you may use" in shown
