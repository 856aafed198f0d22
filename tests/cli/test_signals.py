"""Signals at the worst moments: each is acted on once, and at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from bkpool.cli.signals import Signals


@pytest.fixture
def signals():
    with Signals() as caught:
        yield caught


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_signal_that_arrives_just_before_the_wait_is_acted_on(signals, child):
    # The kernel gives the signal to another thread, so it does not interrupt the system call of this one. That is
    # what happens to a signal between Python's last look for signals and the system call.
    signals.act(child.send_signal)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        sender = threading.Timer(0.2, _kill_from_another_thread)
        sender.start()
        ended = threading.Timer(20, child.kill)
        ended.start()
        signals.wait_for(child.pid)
        assert child.wait() == -signal.SIGHUP
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        ended.cancel()
        sender.join()
        ended.join()


def _kill_from_another_thread():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # a thread inherits the mask of its parent
    os.kill(os.getpid(), signal.SIGHUP)


def test_the_wait_ends_with_the_child_while_nothing_else_happens(signals):
    with subprocess.Popen(["true"]) as process:
        signals.wait_for(process.pid)
        assert process.wait() == 0


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


def test_handlers_and_wakeup_descriptor_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == (before[0], -1)
    signal.set_wakeup_fd(before[1])
