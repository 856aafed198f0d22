"""The signals that end a command: noticed in every wait, remembered, and passed on once to what can act on them.

While `Signals` is in use, no signal raises an exception by itself. So no statement is ever skipped, and a lease that
was made is released.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from threading import Thread, main_thread
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPT = signal.SIGURG
"""Interrupts a system call of the main thread and does nothing else. A program that does not catch it ignores it."""
_INTERRUPT_INTERVAL = 0.01  # seconds until the main thread is interrupted again, if no handler has run
_Handler = signal.Handlers | Callable[[int, FrameType | None], object] | int | None


class WaitInterrupter:
    """Lets a signal interrupt every wait of the main thread, whenever it arrives. To be used in the main thread.

    Python runs the handler of a signal between two instructions. If a signal arrives after the last instruction
    before a system call, the call is not interrupted, and the handler would run only when the call returns by itself.
    But the signal itself writes to the wake-up descriptor. A thread reads it and interrupts the main thread until the
    handlers have run.
    """

    def __init__(self) -> None:
        self._runs = 0
        """How often the main thread has handled an interruption."""
        self._closing = False
        self._wakeup, self._written_by_signals = os.pipe2(os.O_CLOEXEC)
        self._wakeup_before = -1
        self._handler_before: _Handler = None
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        os.set_blocking(self._written_by_signals, False)
        self._handler_before = signal.signal(_INTERRUPT, self._count)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()  # with all signals blocked: they are for the main thread
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._wakeup_before = signal.set_wakeup_fd(self._written_by_signals, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._written_by_signals)
        self._thread.join()
        os.close(self._wakeup)
        signal.signal(_INTERRUPT, self._handler_before)

    def _watch(self) -> None:
        while numbers := os.read(self._wakeup, 512):
            if set(numbers) - {_INTERRUPT}:
                self._interrupt()

    def _interrupt(self) -> None:
        # Python runs the handlers of all signals that have arrived in the order of their numbers, and _INTERRUPT has
        # a high one. Two runs, because the first may be the end of a pass that began before the signal arrived.
        enough = self._runs + 2
        while self._runs < enough and not self._closing:
            signal.pthread_kill(main_thread().ident or 0, _INTERRUPT)
            time.sleep(_INTERRUPT_INTERVAL)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self._runs += 1


class Signals:
    """Catches SIGINT, SIGTERM and SIGHUP. To be used in the main thread."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that arrived."""
        self._action: Callable[[int], object] | None = None
        self._pending: deque[int] = deque()
        """Signals that no action has had yet."""
        self._handlers_before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and `&` in a script: ignored signals stay ignored
                self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def act(self, action: Callable[[int], object] | None) -> None:
        """Sets what a signal does from now on. None: it is only remembered.

        The action is also called, at once, for each signal that no action has had yet.
        """
        self._action = action
        self._deliver()

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
