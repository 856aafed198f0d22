"""Detects a blocked event loop and names what blocks it: a thread posts heartbeats to every loop and awaits them.

A heartbeat costs the watched loop one assignment. The watchdog never interrupts what it finds.

A loop's lag is the time from the post of a heartbeat until the loop runs it. It contains everything that a client of
the loop waits for too: the callbacks queued before it, a callback that blocks, the GIL while another thread holds it,
and the processor. While a single C call of another thread holds the GIL, the watchdog's thread cannot run either. It
then sees the blockage late and measures only a part of it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import structlog

import bkpool
from bkpool.telemetry.loop_metrics import LoopMetrics

log = structlog.get_logger(__name__)

HEARTBEAT_TIMEOUT = 0.25
"""Seconds: a loop that does not run a heartbeat within this time is blocked."""
WARNING_INTERVAL = 10.0
"""Seconds: a loop that is blocked again at the same place within this time is not logged again."""

_PACKAGE = str(Path(bkpool.__file__).parent)


class WatchedLoop(Protocol):
    """The part of an event loop that the watchdog uses."""

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        """Posts the callback. Raises RuntimeError once the loop is closed."""

    def is_closed(self) -> bool:
        """Whether the loop will never run a callback again."""


@dataclass(slots=True)
class Heartbeat:
    """The current heartbeat of one loop. It has no clock: the caller passes times, in seconds of one clock."""

    posted_at: float | None = None
    ran_at: float | None = None
    blocked: bool = False
    warned: bool = False
    _warned_at: dict[str, float] = field(default_factory=dict)

    def lag(self) -> float | None:
        """Seconds from post to run; None if the loop has not run the heartbeat yet."""
        if self.posted_at is None or self.ran_at is None:
            return None
        return self.ran_at - self.posted_at

    def overdue(self, now: float, timeout: float) -> bool:
        """Whether an unanswered heartbeat was posted at least `timeout` seconds ago."""
        return self.posted_at is not None and now - self.posted_at >= timeout

    def should_warn(self, place: str, now: float) -> bool:
        """Whether this place was not logged within WARNING_INTERVAL. If so, it counts as logged from now on."""
        self._warned_at = {known: at for known, at in self._warned_at.items() if now - at < WARNING_INTERVAL}
        if place in self._warned_at:
            return False
        self._warned_at[place] = now
        return True

    def post(self, now: float) -> None:
        """Starts the next heartbeat."""
        self.posted_at, self.ran_at = now, None
        self.blocked = self.warned = False


@dataclass(eq=False, slots=True)
class _Watched:
    name: str
    loop: WatchedLoop
    thread: int
    heartbeat: Heartbeat = field(default_factory=Heartbeat)


class LoopWatchdog:
    """A thread that watches event loops.

    Args:
        metrics: Counts lags and blockages.
        timeout: Seconds in which a loop must run a heartbeat; also the time between two checks.
        clock: Returns seconds; the same clock in all threads.
        frames: Returns the innermost frame of every thread, by the thread's ident.
    """

    def __init__(
        self,
        metrics: LoopMetrics,
        *,
        timeout: float = HEARTBEAT_TIMEOUT,
        clock: Callable[[], float] = time.monotonic,
        frames: Callable[[], Mapping[int, FrameType]] = sys._current_frames,  # noqa: SLF001 - the only access to another thread's stack
    ) -> None:
        self._metrics = metrics
        self._timeout = timeout
        self._clock = clock
        self._frames = frames
        self._watched: list[_Watched] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def watch(self, name: str, loop: WatchedLoop, thread: int) -> None:
        """Watches this loop until it is closed.

        Args:
            name: The loop's name in logs and metrics, from a bounded set.
            loop: The loop.
            thread: The ident of the thread that runs the loop.
        """
        self._watched.append(_Watched(name, loop, thread))

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread and waits for its end."""
        self._stopping.set()
        self._thread.join()

    def check(self) -> None:
        """Judges the current heartbeat of every loop and posts the next one where it was answered."""
        for watched in list(self._watched):
            self._check(watched)

    def _run(self) -> None:
        while not self._stopping.wait(self._timeout):
            try:
                self.check()
            except Exception:  # it only watches, so the rest goes on, and so does the next check
                log.exception("watchdog.failed")

    def _check(self, watched: _Watched) -> None:
        if watched.loop.is_closed():
            self._watched.remove(watched)
            return
        heartbeat, now = watched.heartbeat, self._clock()
        lag = heartbeat.lag()
        if lag is not None:
            self._metrics.heartbeat(watched.name, lag)
            if heartbeat.warned:
                log.info("loop.unblocked", loop=watched.name, seconds=round(lag, 3))
        elif heartbeat.posted_at is not None:
            if heartbeat.overdue(now, self._timeout) and not heartbeat.blocked:
                self._report_blocked(watched, now)
            return
        heartbeat.post(now)
        self._post(watched)

    def _report_blocked(self, watched: _Watched, now: float) -> None:
        heartbeat = watched.heartbeat
        heartbeat.blocked = True
        in_bkpool, innermost = blocker(self._frames().get(watched.thread))  # first: it may end at any moment
        self._metrics.blocked(watched.name)
        heartbeat.warned = heartbeat.should_warn(in_bkpool, now)
        if heartbeat.warned:
            log.warning("loop.blocked", loop=watched.name, by=in_bkpool, inside=innermost)

    def _post(self, watched: _Watched) -> None:
        heartbeat, clock = watched.heartbeat, self._clock

        def answer() -> None:
            heartbeat.ran_at = clock()

        with contextlib.suppress(RuntimeError):  # the loop was closed just now; the next check removes it
            watched.loop.call_soon_threadsafe(answer)


def blocker(frame: FrameType | None) -> tuple[str, str]:
    """Where a thread is: its innermost frame in bkpool and its innermost frame, each as `file:line function`.

    Args:
        frame: The thread's innermost frame; None gives "unknown" twice.
    """
    innermost = _place(frame)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return _place(frame), innermost


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "unknown"
    code = frame.f_code
    return f"{code.co_filename.removeprefix(str(Path(_PACKAGE).parent) + '/')}:{frame.f_lineno} {code.co_qualname}"
