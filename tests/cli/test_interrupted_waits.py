"""Every wait of a command acts on a signal at once, also on one that arrives just before the wait.

The program runs within this process, so that the signal can be put into that gap.
"""

import ctypes
import itertools
import operator
import os
import select
import signal
import socket
import threading

import pytest

from bkpool.cli import client as client_module
from bkpool.cli import credentials, lease, main
from bkpool.cli.client import Client
from bkpool.cli.signals import Signals
from support.signal_gap import with_signal_before

from .conftest import TOKEN, forget_surroundings

TIMEOUT = 60.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

BUILDX = """#!/bin/sh
[ "$1" = version ] && echo "github.com/docker/buildx v0.38.2 0000000"
echo "$1" >> "$CALLS"
[ "$1" = "$WAITS" ] && exec /bin/sleep 30
exit 0
"""


@pytest.fixture
def program(home, monkeypatch, tmp_path):
    """Runs the program within this process, as its console script does. Returns the exit code."""
    forget_surroundings(monkeypatch)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "buildx").write_text(BUILDX)
    (tools / "buildx").chmod(0o755)
    calls = tmp_path / "calls"
    # Only ours: with an empty cache nothing else could be found.
    for name, value in {"BKPOOL_HOME": home, "BKPOOL_CACHE": tmp_path, "PATH": tools, "CALLS": calls}.items():
        monkeypatch.setenv(name, str(value))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process; pytest may have its own

    def run(*args):
        monkeypatch.setattr("sys.argv", ["bkpool", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def calls_of_buildx(directory):
    calls = directory / "calls"
    return calls.read_text().split() if calls.exists() else []


class HangUps:
    """Holds an answer until the caller has hung up.

    Args:
        answers: Whether the answer is sent then.
    """

    def __init__(self, *, answers):
        self.answers = answers
        self.seen = threading.Event()

    def __call__(self, _call, connection):
        hung_up = select.poll()
        hung_up.register(connection, select.POLLRDHUP)  # reads nothing: OpenSSL would not answer after an end
        if hung_up.poll(TIMEOUT * 1000):
            self.seen.set()
        if not self.answers:
            raise ConnectionAbortedError


@pytest.fixture
def never_answers():
    """Holds an answer until the end of the test; the test fails if it has waited for that answer."""
    the_end, waited_for = threading.Event(), threading.Event()

    def prepare(before=lambda: None):
        def wait(*_):
            before()
            if not the_end.wait(TIMEOUT):
                waited_for.set()
            raise ConnectionAbortedError

        return wait

    yield prepare
    the_end.set()
    assert not waited_for.is_set()


def put_signal_before_the_answer(monkeypatch, number):
    """The signal arrives just before the first system call that waits for the API's answer."""
    recv_into = with_signal_before(socket.SocketType.recv_into, number)
    monkeypatch.setattr(socket.socket, "recv_into", recv_into)


@pytest.mark.parametrize("arguments", [["allocate"], ["build", "."]], ids=["allocate", "build"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_just_before_the_wait_for_a_lease_ends_it(
    program, api, appliance, monkeypatch, capfd, arguments, number
):
    hang_up = api.before_answer["allocate"] = HangUps(answers=False)
    put_signal_before_the_answer(monkeypatch, number)
    assert program(*arguments) == 128 + number
    assert hang_up.seen.is_set()
    api.next("allocate")
    assert api.calls.empty()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("arguments", [["allocate"], ["build", "."]], ids=["allocate", "build"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_lease_that_arrives_after_such_a_signal_is_released(
    program, api, appliance, monkeypatch, capfd, tmp_path, arguments, number
):
    hang_up = api.before_answer["allocate"] = HangUps(answers=True)
    put_signal_before_the_answer(monkeypatch, number)
    assert program(*arguments) == 128 + number
    assert hang_up.seen.is_set()
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}
    assert capfd.readouterr().out == ""
    assert "create" not in calls_of_buildx(tmp_path)  # no builder is made for it


@pytest.mark.parametrize("waits", ["create", "build"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_just_before_the_wait_for_buildx_is_passed_on(program, api, appliance, monkeypatch, waits, number):
    monkeypatch.setenv("WAITS", waits)
    undisturbed, disturbed = os.waitid, with_signal_before(os.waitid, number)
    ends = []

    def waitid(*args):
        call = disturbed if waits == ("build" if ends else "create") else undisturbed
        ends.append(call(*args))

    monkeypatch.setattr(os, "waitid", waitid)
    assert program("build", ".") == 128 + number
    assert [end.si_status for end in ends] == ([0, number] if waits == "build" else [number])
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}


def test_ctrl_c_just_before_the_wait_for_any_other_answer_ends_the_command(
    program, api, appliance, never_answers, monkeypatch
):
    api.before_answer["pools"] = never_answers()
    put_signal_before_the_answer(monkeypatch, signal.SIGINT)
    assert program("status") == 130


# --- waits that no system call of the main thread ends --------------------------------------------------------------


def uninterruptible(until):
    """Waits in C, without a look for signals, as the look-up of a name does. Ends when `until` contains 0."""
    usleep = ctypes.CDLL(None).usleep  # returns 0
    return any(map(until.__contains__, map(usleep, itertools.repeat(1000))))


@pytest.mark.parametrize("arguments", [["allocate"], ["build", "."], ["status"]], ids=operator.itemgetter(0))
def test_a_signal_during_the_look_up_of_the_name_ends_the_command(program, monkeypatch, arguments):
    monkeypatch.setenv("BKCTL_ENDPOINT", "http://api.example")
    until, ended = set(), threading.Event()

    def look_up(*_args, **_options):
        os.kill(os.getpid(), signal.SIGINT)
        uninterruptible(until)
        ended.set()
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    rescue = threading.Timer(TIMEOUT, until.add, [0])
    rescue.start()
    try:
        assert program(*arguments) == 130
        assert not ended.is_set()
    finally:
        until.add(0)
        rescue.cancel()
        rescue.join()
        assert ended.wait(TIMEOUT)


def test_a_signal_while_a_refused_token_is_replaced_sends_no_second_request(api, appliance, home, monkeypatch):
    monkeypatch.setenv("BKPOOL_HOME", str(home))
    api.answers["allocate"] = (401, {"error": {"code": "Unauthenticated", "message": "expired"}})
    tokens = iter(["first"])

    def fetch():
        for token in tokens:
            return token
        signal.raise_signal(signal.SIGTERM)
        return "second"

    client = Client()
    client._credential = credentials.Credential("test", fetch)
    with Signals() as signals, pytest.raises(SystemExit) as ended:
        lease.allocate(client, {"poolName": "default", "wait": "1m"}, signals)
    assert ended.value.code == 128 + signal.SIGTERM
    api.next("allocate")
    assert api.calls.empty()


# --- a server that does not notice, or does not care ----------------------------------------------------------------


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_server_that_ignores_the_hang_up_is_given_up_after_a_time(
    program, api, appliance, never_answers, monkeypatch
):
    monkeypatch.setattr(client_module, "GIVE_UP_TIMEOUT", 0.05)
    api.before_answer["allocate"] = never_answers(interrupt)
    assert program("allocate") == 130


def test_a_second_signal_gives_such_a_server_up_at_once(program, api, appliance, never_answers, monkeypatch):
    monkeypatch.setattr(client_module, "GIVE_UP_TIMEOUT", 3600.0)
    hang_up = HangUps(answers=False)

    def interrupt_twice(call, connection):
        interrupt()
        with pytest.raises(ConnectionAbortedError):
            hang_up(call, connection)
        interrupt()
        never_answers()(call, connection)

    api.before_answer["allocate"] = interrupt_twice
    assert program("allocate") == 130
    assert hang_up.seen.is_set()


def test_a_second_signal_counts_while_the_first_is_still_handled(program, api, appliance, never_answers, monkeypatch):
    signals = iter([signal.SIGINT])

    def timer(*args):
        for number in signals:
            signal.raise_signal(number)
        return threading.Timer(*args)

    monkeypatch.setattr(client_module, "GIVE_UP_TIMEOUT", 3600.0)
    monkeypatch.setattr(client_module, "Timer", timer)
    api.before_answer["allocate"] = never_answers(interrupt)
    assert program("allocate") == 130


def test_a_release_at_the_end_of_a_build_is_given_up_a_time_after_a_signal(
    program, api, appliance, never_answers, monkeypatch, capfd
):
    monkeypatch.setattr(client_module, "GIVE_UP_TIMEOUT", 0.05)
    api.before_answer["release"] = never_answers(interrupt)
    assert program("build", ".") == 0
    assert "warning: the worker was not released, and its lease will expire by itself" in capfd.readouterr().err


def test_a_release_that_is_answered_after_a_signal_has_succeeded(program, api, appliance, capfd):
    api.before_answer["release"] = lambda *_: interrupt()
    assert program("build", ".") == 0
    assert "warning" not in capfd.readouterr().err


def test_a_lease_that_arrives_over_tls_after_a_signal_is_released(program, api, over_tls):
    """The answer is sent before the server sees the end. Each of its records must still be decrypted."""
    over_tls("localhost", apiCa="ca.crt")
    hang_up = HangUps(answers=True)

    def interrupt_and_answer(call, connection):
        interrupt()
        hang_up(call, connection)

    api.before_answer["allocate"] = interrupt_and_answer
    assert program("allocate") == 130
    assert hang_up.seen.is_set()
    api.next("allocate")
    assert api.next("release").body == {"token": TOKEN}
