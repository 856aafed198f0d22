"""The signals that end a build: remembered, and passed to whoever can act on them just now.

While this is in use no signal raises anything, so nothing between two statements is ever skipped: a lease that was
made is released.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Catches SIGINT, SIGTERM and SIGHUP. `act` is what a signal does at the moment; None: it is only remembered."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first one that came."""
        self._act: Callable[[int], object] | None = None
        self._before: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and `&` in a script: ignored stays ignored
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def act(self, action: Callable[[int], object] | None) -> None:
        """From now on a signal does this; one that came before is made up for at once."""
        self._act = action
        if action is not None and self.received is not None:
            action(self.received)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._act is not None:
            self._act(number)


def typed_at_terminal(number: int) -> bool:
    """Whether this signal came from the terminal's keys to our whole process group, children too.

    Sent on to them, a single Ctrl-C would count twice, and buildx leaves its cleaning up after the third.
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
