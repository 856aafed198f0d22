"""Sees when an event loop does not turn, and what keeps it: a thread posts beats to every loop and waits for them.

Nothing of it runs in the loops but one assignment a beat. It never interrupts what it finds.

A loop's lag is the time from a beat's posting until the loop runs it. It includes callbacks that are ahead of it, a
callback that blocks, the wait for the GIL while another thread holds it, and the wait for a processor: everything
that a client of this loop waits for too. While one C call of another thread keeps the GIL this thread does not run
either, so that such a time is seen in part, and only when it is over.
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

log = structlog.get_logger(__name__)

PATIENCE = 0.25
"""Seconds: a loop that leaves a beat unanswered for so long is blocked."""
QUIET = 10.0
"""Seconds: a loop that is blocked again at the same place is not worth another warning within these."""

_OURS = str(Path(bkpool.__file__).parent)


class LagMetrics(Protocol):
    """Counts what the watchdog finds."""

    def lagged(self, loop: str, seconds: float) -> None:
        """An event loop answered a beat this many seconds after it was posted."""

    def blocked(self, loop: str) -> None:
        """An event loop did not answer a beat in time."""


class Loop(Protocol):
    """What of an event loop is used here."""

    def call_soon_threadsafe(self, callback: Callable[[], object], /) -> object:
        """Posts the callback; raises RuntimeError once the loop is closed."""

    def is_closed(self) -> bool:
        """Whether it will never run a callback again."""


@dataclass(slots=True)
class Pulse:
    """The beats of one loop. Judges, and knows no clock: times are seconds of whoever calls."""

    sent_at: float | None = None
    answered_at: float | None = None
    blocked: bool = False
    warned: bool = False
    _warnings: dict[str, float] = field(default_factory=dict)

    def lag(self) -> float | None:
        """How long the beat that is under way took, if it has been answered."""
        if self.sent_at is None or self.answered_at is None:
            return None
        return self.answered_at - self.sent_at

    def overdue(self, now: float, patience: float) -> bool:
        """Whether the beat, which has not been answered, should have been."""
        return self.sent_at is not None and now - self.sent_at >= patience

    def worth_a_warning(self, place: str, now: float) -> bool:
        """Whether nothing was said of this place lately; it is taken as said."""
        self._warnings = {known: at for known, at in self._warnings.items() if now - at < QUIET}
        if place in self._warnings:
            return False
        self._warnings[place] = now
        return True

    def send(self, now: float) -> None:
        """The next beat is posted."""
        self.sent_at, self.answered_at = now, None
        self.blocked = self.warned = False


@dataclass(eq=False, slots=True)
class _Watched:
    name: str
    loop: Loop
    thread: int
    pulse: Pulse = field(default_factory=Pulse)


class LoopWatchdog:
    """A thread that watches event loops.

    Args:
        metrics: Where lags and blockages are counted.
        patience: Seconds for a loop to answer a beat; also the time between beats.
        clock: Seconds; the same in all threads.
        frames: The innermost frame of every thread.
    """

    def __init__(
        self,
        metrics: LagMetrics,
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        frames: Callable[[], Mapping[int, FrameType]] = sys._current_frames,  # noqa: SLF001 - the one way to a thread's stack
    ) -> None:
        self._metrics = metrics
        self._patience = patience
        self._clock = clock
        self._frames = frames
        self._watched: list[_Watched] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def watch(self, name: str, loop: Loop, thread: int) -> None:
        """Watches this loop, until it is closed.

        Args:
            name: What it is called in logs and metrics; of a bounded set.
            loop: The loop.
            thread: The ident of the thread that runs it.
        """
        self._watched.append(_Watched(name, loop, thread))

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        self._thread.join()

    def look(self) -> None:
        """Judges the beats that are under way, and posts the next ones."""
        for watched in list(self._watched):
            self._look_at(watched)

    def _run(self) -> None:
        while not self._stopping.wait(self._patience):
            self.look()

    def _look_at(self, watched: _Watched) -> None:
        if watched.loop.is_closed():
            self._watched.remove(watched)
            return
        pulse, now = watched.pulse, self._clock()
        lag = pulse.lag()
        if lag is not None:
            self._metrics.lagged(watched.name, lag)
            if pulse.warned:
                log.info("loop.turned", loop=watched.name, seconds=round(lag, 3))
        elif pulse.sent_at is not None:
            if pulse.overdue(now, self._patience) and not pulse.blocked:
                self._blocked(watched, now)
            return
        pulse.send(now)
        self._post(watched)

    def _blocked(self, watched: _Watched, now: float) -> None:
        pulse = watched.pulse
        pulse.blocked = True
        self._metrics.blocked(watched.name)
        ours, innermost = blocker(self._frames().get(watched.thread))
        pulse.warned = pulse.worth_a_warning(ours, now)
        if pulse.warned:
            log.warning("loop.blocked", loop=watched.name, by=ours, inside=innermost)

    def _post(self, watched: _Watched) -> None:
        pulse, clock = watched.pulse, self._clock

        def answer() -> None:
            pulse.answered_at = clock()

        with contextlib.suppress(RuntimeError):  # it was closed just now, and the next look will see it
            watched.loop.call_soon_threadsafe(answer)


def blocker(frame: FrameType | None) -> tuple[str, str]:
    """Where a thread is: its innermost frame of ours and its innermost of all, each as `file:line function`."""
    innermost = _place(frame)
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return _place(frame), innermost


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "unknown"
    code = frame.f_code
    return f"{code.co_filename.removeprefix(str(Path(_OURS).parent) + '/')}:{frame.f_lineno} {code.co_qualname}"
