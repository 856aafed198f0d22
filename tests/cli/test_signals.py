"""Signals at the worst moments: each is acted on once, and at once."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest

from bkpool.cli.signals import Signals, WaitInterrupter
from support.signal_gap import with_signal_before

TOO_LONG = 60.0
"""Seconds after which a wait that should have been interrupted ends, so that the test fails."""


@pytest.fixture
def signals():
    with Signals() as caught:
        yield caught


class Interrupted(Exception):
    pass


def interrupt(*_):
    raise Interrupted


@pytest.fixture
def took_too_long():
    """Tells whether the wait was interrupted only because it took too long."""
    late = threading.Event()

    def interrupt_main_thread():
        late.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    timer = threading.Timer(TOO_LONG, interrupt_main_thread)
    timer.start()
    yield late.is_set
    timer.cancel()
    timer.join()
    signal.signal(signal.SIGUSR1, before)


def recv(sock):
    return partial(sock.recv, 1)


def recv_with_timeout(sock):
    sock.settimeout(2 * TOO_LONG)
    return partial(sock.recv, 1)


def send(sock):
    sock.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))
    sock.setblocking(True)
    return partial(sock.send, b"x")


def read(sock):
    return partial(os.read, sock.fileno(), 1)


def poll(sock):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return partial(poll.poll, 2000 * TOO_LONG)


def sleep(_sock):
    return partial(time.sleep, 2 * TOO_LONG)


def acquire(_sock):
    lock = threading.Lock()
    lock.acquire()
    return lock.acquire


def get(_sock):
    return SimpleQueue().get


@pytest.mark.parametrize("wait", [recv, recv_with_timeout, send, read, poll, sleep, acquire, get])
def test_a_signal_that_arrives_just_before_a_wait_interrupts_it(took_too_long, wait):
    before = signal.signal(signal.SIGTERM, interrupt)
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs, WaitInterrupter():
            wait_with_signal_before = with_signal_before(wait(ours), signal.SIGTERM)
            with pytest.raises(Interrupted):
                wait_with_signal_before()
        assert not took_too_long()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_arrives_just_before_the_wait_for_a_child_is_passed_on(signals, took_too_long):
    with WaitInterrupter(), subprocess.Popen(["sleep", str(2 * TOO_LONG)]) as child:
        signals.act(child.send_signal)
        wait = with_signal_before(os.waitid, signal.SIGHUP)
        assert wait(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGHUP
    assert not took_too_long()


def test_a_wait_goes_on_after_a_signal_that_raises_nothing(signals, took_too_long):
    with WaitInterrupter(), subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        signals.act(lambda _: child.stdin.close())
        wait = with_signal_before(os.waitid, signal.SIGHUP)
        assert wait(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT).si_status == 0
    assert not took_too_long()


def test_the_thread_that_watches_takes_no_signal_from_the_main_thread():
    """Else a program that waits for a signal with its mask, as in sigwait(3), would not get it."""
    program = """
import os, signal
from bkpool.cli.signals import WaitInterrupter
with WaitInterrupter():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.sigwait({signal.SIGTERM}) == signal.SIGTERM
"""
    # In a new process: the one of pytest may have other threads, which could take it.
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=TOO_LONG).returncode == 0


def test_after_the_interrupter_all_is_as_before():
    """Threads and descriptors that earlier tests have left may end meanwhile."""

    def opened():
        return {*threading.enumerate(), *(entry.name for entry in Path("/proc/self/fd").iterdir())}

    handler, before, wakeup = signal.getsignal(signal.SIGURG), opened(), signal.set_wakeup_fd(-1)
    with WaitInterrupter():
        assert opened() - before
        assert signal.getsignal(signal.SIGURG) != handler
    assert signal.set_wakeup_fd(wakeup) == -1
    assert signal.getsignal(signal.SIGURG) == handler
    assert opened() <= before


def test_a_signal_at_any_line_of_act_is_passed_on_once(signals):
    line = 0
    while True:
        had = []
        if not _act_with_signal_at(signals, had.append, line):
            break
        assert had == [signal.SIGTERM], f"line event {line}"
        signals.act(None)
        line += 1
    assert line >= 3


def test_a_signal_at_any_line_while_another_is_passed_on_is_passed_on_once(signals):
    line = 0
    while True:
        had = []
        signals.act(None)
        signal.raise_signal(signal.SIGHUP)
        if not _act_with_signal_at(signals, had.append, line):
            break
        assert sorted(had) == [signal.SIGHUP, signal.SIGTERM], f"line event {line}"
        line += 1
    assert line >= 3


def _act_with_signal_at(signals, action, line):
    """Calls `act` and raises SIGTERM at this line event in it; returns whether there was such a line."""
    seen = 0

    def trace(frame, event, _argument):
        nonlocal seen
        if frame.f_code not in {Signals.act.__code__, Signals._deliver.__code__}:
            return None
        if event == "line":
            if seen == line:
                seen += 1
                signal.raise_signal(signal.SIGTERM)
            else:
                seen += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        signals.act(action)
    finally:
        sys.settrace(before)
    return seen > line


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
