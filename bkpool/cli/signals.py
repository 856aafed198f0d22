"""The signals that end a build: remembered, and passed on once to what can act on them at that moment.

While `Signals` is in use, no signal raises an exception. So no statement is ever skipped, and a lease that was made
is released.
"""

from __future__ import annotations

import os
import select
import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Catches SIGINT, SIGTERM and SIGHUP. To be used in the main thread."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that arrived."""
        self._action: Callable[[int], object] | None = None
        self._pending: deque[int] = deque()
        """Signals that no action has had yet."""
        self._handlers_before: dict[
            int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None
        ] = {}
        self._wakeup_read, self._wakeup_write = -1, -1
        self._wakeup_before = -1

    def __enter__(self) -> Self:
        self._wakeup_read, self._wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and `&` in a script: ignored signals stay ignored
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)

    def act(self, action: Callable[[int], object] | None) -> None:
        """Sets what a signal does from now on. None: it is only remembered.

        The action is also called, at once, for each signal that no action has had yet.
        """
        self._action = action
        self._deliver()

    def wait_for(self, pid: int) -> None:
        """Waits until a child has ended. A signal is acted on at once, also if it arrives just before the wait.

        A wait for the child alone would not notice such a signal until the child ends: Python runs a handler only
        when the system call returns. The wake-up descriptor is written by the signal itself.
        """
        child = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(child, select.POLLIN)
            poll.register(self._wakeup_read, select.POLLIN)
            while child not in {descriptor for descriptor, _ in poll.poll()}:
                with suppress(BlockingIOError):
                    os.read(self._wakeup_read, 512)
        finally:
            os.close(child)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        self._pending.append(number)
        self._deliver()

    def _deliver(self) -> None:
        # A signal may arrive at any line here and call this again: each one is taken from the queue only once.
        while self._action is not None:
            try:
                number = self._pending.popleft()
            except IndexError:
                return
            self._action(number)


def typed_at_terminal(number: int) -> bool:
    """Whether this signal came from a key of the terminal, which sends it to our whole process group.

    The children then have it already. Passing it on as well would count one Ctrl-C twice, and buildx stops its
    clean-up at the third.
    """
    if number != signal.SIGINT:
        return False
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
