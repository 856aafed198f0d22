"""The watchdog: a loop that does not turn is counted and its blocker named, once. Only the last test takes time."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest
from structlog.testing import capture_logs

from bkpool.gateway.control.server import new_loop
from bkpool.gateway.session import certificate
from bkpool.gateway.session.metrics import GatewayMetrics
from bkpool.telemetry.loop_watchdog import PATIENCE, QUIET, LoopWatchdog, blocker


class Looped:
    """A loop that turns when it is told to."""

    def __init__(self):
        self.posted = []
        self.closed = False

    def call_soon_threadsafe(self, callback):
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.posted.append(callback)

    def is_closed(self):
        return self.closed

    def turn(self):
        while self.posted:
            self.posted.pop(0)()


class Watch:
    """A watchdog over one loop, its clock, and where the loop's thread is."""

    def __init__(self):
        self.now = 1000.0
        self.metrics = GatewayMetrics()
        self.loop = Looped()
        self.frame = sys._getframe()
        self.dog = LoopWatchdog(self.metrics, clock=lambda: self.now, frames=lambda: {7: self.frame})
        self.dog.watch("gateway-0", self.loop, 7)

    def look(self, later=PATIENCE):
        """What is logged when the watchdog looks after so many seconds."""
        self.now += later
        with capture_logs() as logs:
            self.dog.look()
        return [entry["event"] for entry in logs]

    def block(self, seconds=1.0):
        """One blockage from its beginning to its end: everything that is logged of it."""
        looks = [self.look() for _ in range(int(seconds / PATIENCE))]
        self.loop.turn()
        return [event for look in [*looks, self.look()] for event in look]

    def count(self, name):
        return self.metrics.registry.get_sample_value(f"buildkit_gateway_loop_{name}", {"loop": "gateway-0"}) or 0


@pytest.fixture
def watch():
    watch = Watch()
    watch.look()
    return watch


def test_a_loop_that_turns_is_measured_and_nothing_is_said_of_it(watch):
    for _ in range(4):
        watch.now += 0.002
        watch.loop.turn()
        assert watch.look() == []
    assert watch.count("lag_seconds_count") == 4
    assert watch.count("lag_seconds_sum") == pytest.approx(0.008)
    assert watch.count("blocked_total") == 0


def test_a_blocked_loop_is_told_at_once_and_once_and_when_it_is_over(watch):
    assert watch.look(PATIENCE - 0.01) == [], "it may still answer"
    assert watch.look(0.01) == ["loop.blocked"], "while it is still blocked"
    assert [watch.look() for _ in range(8)] == [[]] * 8
    watch.loop.turn()
    with capture_logs() as logs:
        watch.dog.look()
    assert [(entry["event"], entry["seconds"]) for entry in logs] == [("loop.turned", PATIENCE * 9)]
    assert watch.count("blocked_total") == 1
    assert watch.count("lag_seconds_sum") == PATIENCE * 9


def test_one_beat_is_under_way_at_a_time(watch):
    """A loop that is blocked for an hour has one callback to run for it afterwards."""
    for _ in range(100):
        watch.look()
    assert len(watch.loop.posted) == 1


def test_the_same_place_is_not_worth_another_warning_at_once_but_it_is_counted(watch):
    assert watch.block() == ["loop.blocked", "loop.turned"]
    assert watch.block() == []
    assert watch.count("blocked_total") == 2
    watch.now += QUIET
    watch.loop.turn()
    watch.look()
    assert watch.block() == ["loop.blocked", "loop.turned"]


def test_another_place_is_worth_its_own_warning(watch):
    assert watch.block() == ["loop.blocked", "loop.turned"]
    watch.frame = _frame_inside(certificate.token_in_name)
    assert watch.block() == ["loop.blocked", "loop.turned"]


@pytest.mark.parametrize("answered", [True, False])
def test_a_closed_loop_is_watched_no_more(watch, answered):
    """Also with a beat under way, which it will never answer."""
    if answered:
        watch.loop.turn()
    watch.loop.closed = True
    assert watch.look() == []
    assert [watch.look() for _ in range(8)] == [[]] * 8
    assert watch.count("blocked_total") == 0


def test_the_blocker_is_named_by_our_innermost_place_and_by_the_innermost_of_all():
    ours, innermost = blocker(_frame_inside(certificate.token_in_name))
    assert ours.startswith("bkpool/gateway/session/certificate.py:")
    assert ours.endswith(" token_in_name")
    assert innermost.endswith(" _Name.removeprefix")
    assert "test_loop_watchdog.py:" in innermost
    assert blocker(None) == ("unknown", "unknown")


class _Name:
    """A name that notes who looks at it, and keeps him until he is let go."""

    def __init__(self, let_go=None):
        self.let_go = let_go
        self.frame = None

    def removeprefix(self, _prefix):
        self.frame = sys._getframe()
        if self.let_go is not None:
            self.let_go.wait(10)
        return self


def _frame_inside(function):
    """A frame that a function of ours has called."""
    name = _Name()
    function(name)
    return name.frame


class _Told(GatewayMetrics):
    """Metrics that can be waited for."""

    def __init__(self):
        super().__init__()
        self.seen, self.over = threading.Event(), threading.Event()

    def blocked(self, loop):
        super().blocked(loop)
        self.seen.set()

    def lagged(self, loop, seconds):
        super().lagged(loop, seconds)
        if self.seen.is_set():
            self.over.set()


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, new_loop], ids=["asyncio", "uvloop"])
def test_a_blocked_event_loop_is_seen(make_loop):
    """A real loop in a thread of its own, blocked by a function of ours until that has been said of it."""
    loop = make_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    metrics, name = _Told(), _Name(let_go=threading.Event())
    dog = LoopWatchdog(metrics, patience=0.03)
    dog.watch("gateway-0", loop, thread.ident)
    with capture_logs() as logs:
        loop.call_soon_threadsafe(certificate.token_in_name, name)
        dog.start()
        assert metrics.seen.wait(10)
        name.let_go.set()
        assert metrics.over.wait(10)
        dog.stop()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    blocked, turned = logs[:2]
    assert (blocked["event"], blocked["loop"]) == ("loop.blocked", "gateway-0")
    assert blocked["by"].endswith(" token_in_name")
    assert "threading.py" in blocked["inside"]
    assert turned["event"] == "loop.turned"
    assert turned["seconds"] >= 0.03
