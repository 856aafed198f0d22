"""The watchdog counts each blocked loop and names the blocker once. Only the last test takes real time."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from bkpool.gateway.control.server import new_loop
from bkpool.gateway.session import certificate
from bkpool.telemetry.loop_metrics import LoopMetrics
from bkpool.telemetry.loop_watchdog import HEARTBEAT_TIMEOUT, WARNING_INTERVAL, LoopWatchdog, blocker
from bkpool.telemetry.registry import new_registry
from support.captured_logs import capture_logs


class ManualLoop:
    """A loop that runs its callbacks when the test says so."""

    def __init__(self):
        self.posted = []
        self.closed = False

    def call_soon_threadsafe(self, callback):
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.posted.append(callback)

    def is_closed(self):
        return self.closed

    def run_posted(self):
        while self.posted:
            self.posted.pop(0)()


class Watch:
    """A watchdog of one loop, its clock, and the current frame of the loop's thread."""

    def __init__(self):
        self.now = 1000.0
        self.registry = new_registry()
        self.loop = ManualLoop()
        self.frame = sys._getframe()
        self.watchdog = LoopWatchdog(
            LoopMetrics(self.registry), clock=lambda: self.now, frames=lambda: {7: self.frame}
        )
        self.watchdog.watch("gateway-0", self.loop, 7)

    def check(self, after=HEARTBEAT_TIMEOUT):
        """The events that the watchdog logs when it checks after this many seconds."""
        self.now += after
        with capture_logs() as logs:
            self.watchdog.check()
        return [entry["event"] for entry in logs if entry.get("loop") == "gateway-0"]

    def block(self, seconds=1.0):
        """One blockage from its start to its end: all events that are logged for it."""
        checks = [self.check() for _ in range(int(seconds / HEARTBEAT_TIMEOUT))]
        self.loop.run_posted()
        return [event for check in [*checks, self.check()] for event in check]

    def count(self, name):
        return self.registry.get_sample_value(f"bkpool_loop_{name}", {"loop": "gateway-0"}) or 0


@pytest.fixture
def watch():
    watch = Watch()
    watch.check()
    return watch


def test_a_loop_in_time_is_measured_and_not_logged(watch):
    for _ in range(4):
        watch.now += 0.002
        watch.loop.run_posted()
        assert watch.check() == []
    assert watch.count("lag_seconds_count") == 4
    assert watch.count("lag_seconds_sum") == pytest.approx(0.008)
    assert watch.count("blocked_total") == 0


def test_a_blocked_loop_is_logged_once_while_it_is_blocked_and_once_when_it_ends(watch):
    assert watch.check(HEARTBEAT_TIMEOUT - 0.01) == [], "it still has time"
    assert watch.check(0.01) == ["loop.blocked"], "while it is still blocked"
    assert [watch.check() for _ in range(8)] == [[]] * 8
    watch.loop.run_posted()
    with capture_logs() as logs:
        watch.watchdog.check()
    assert [(entry["event"], entry["seconds"]) for entry in logs] == [("loop.unblocked", HEARTBEAT_TIMEOUT * 9)]
    assert watch.count("blocked_total") == 1
    assert watch.count("lag_seconds_sum") == HEARTBEAT_TIMEOUT * 9


def test_a_blocked_loop_has_one_heartbeat_queued(watch):
    """A loop that is blocked for an hour has only one callback to run for it afterwards."""
    for _ in range(100):
        watch.check()
    assert len(watch.loop.posted) == 1


def test_a_second_blockage_at_the_same_place_is_counted_but_not_logged(watch):
    assert watch.block() == ["loop.blocked", "loop.unblocked"]
    assert watch.block() == []
    assert watch.count("blocked_total") == 2
    watch.now += WARNING_INTERVAL
    watch.loop.run_posted()
    watch.check()
    assert watch.block() == ["loop.blocked", "loop.unblocked"]


def test_a_blockage_at_another_place_is_logged(watch):
    assert watch.block() == ["loop.blocked", "loop.unblocked"]
    watch.frame = _frame_called_by(certificate.token_in_name)
    assert watch.block() == ["loop.blocked", "loop.unblocked"]


@pytest.mark.parametrize("answered", [True, False])
def test_a_closed_loop_is_no_longer_watched(watch, answered):
    """Also if a heartbeat is still unanswered. The closed loop will never run it."""
    if answered:
        watch.loop.run_posted()
    watch.loop.closed = True
    assert watch.check() == []
    assert [watch.check() for _ in range(8)] == [[]] * 8
    assert watch.count("blocked_total") == 0


def test_the_blocker_is_the_innermost_frame_in_bkpool_and_the_innermost_frame():
    in_bkpool, innermost = blocker(_frame_called_by(certificate.token_in_name))
    assert in_bkpool.startswith("bkpool/gateway/session/certificate.py:")
    assert in_bkpool.endswith(" token_in_name")
    assert innermost.endswith(" _BlockingName.removeprefix")
    assert "test_loop_watchdog.py:" in innermost
    assert blocker(None) == ("unknown", "unknown")


class _BlockingName:
    """A string-like name. It keeps the frame that reads it, and can block that frame until it is released."""

    def __init__(self, release=None):
        self.release = release
        self.frame = None
        self.blocks = threading.Event()
        """Set from when the frame is blocked."""

    def removeprefix(self, _prefix):
        self.frame = sys._getframe()
        if self.release is not None:
            self.blocks.set()
            self.release.wait(60)
        return self


def _frame_called_by(function):
    """A frame outside of bkpool that a function of bkpool has called."""
    name = _BlockingName()
    function(name)
    return name.frame


class _AwaitableMetrics(LoopMetrics):
    """Metrics with events, so that a test can wait for a blockage and for its end."""

    def __init__(self):
        super().__init__(new_registry())
        self.blockage_seen, self.over, self.end_seen = threading.Event(), threading.Event(), threading.Event()

    def blocked(self, loop):
        super().blocked(loop)
        self.blockage_seen.set()
        assert self.over.wait(60)  # what blocks a loop may end at any moment

    def heartbeat(self, loop, seconds):
        super().heartbeat(loop, seconds)
        if self.blockage_seen.is_set():
            self.end_seen.set()


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, new_loop], ids=["asyncio", "uvloop"])
def test_a_blocked_event_loop_is_detected(make_loop):
    """A real loop in a thread is blocked by a function of bkpool until the blockage has been reported."""
    loop = make_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    metrics, name = _AwaitableMetrics(), _BlockingName(release=threading.Event())
    watchdog = LoopWatchdog(metrics, timeout=0.03)
    watchdog.watch("gateway-0", loop, thread.ident)
    with capture_logs() as logs:
        loop.call_soon_threadsafe(certificate.token_in_name, name)
        assert name.blocks.wait(60)
        watchdog.start()
        assert metrics.blockage_seen.wait(60)
        name.release.set()
        loop.call_soon_threadsafe(metrics.over.set)
        assert metrics.end_seen.wait(60)
        watchdog.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    blocked, unblocked = logs[:2]
    assert (blocked["event"], blocked["loop"]) == ("loop.blocked", "gateway-0")
    assert blocked["by"].endswith(" token_in_name")
    assert "threading.py" in blocked["inside"]
    assert unblocked["event"] == "loop.unblocked"
    assert unblocked["seconds"] >= 0.03
