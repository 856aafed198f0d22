"""Counts the answers that are being made, so that what nobody waits for comes after them, or a moment later.

It belongs to one event loop. It holds nothing up for longer than that moment, however many answers there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import TypeVar

LONGEST = 0.05
"""Seconds, at most, for which something is put off: about as long as twenty leases at once take."""

_Value = TypeVar("_Value", bound=Hashable)
Later = Callable[[float, Callable[[], None]], asyncio.TimerHandle]
"""Calls a function after that many seconds (`loop.call_later`)."""


class Rush:
    """The answers that are being made now.

    Args:
        later: Calls a function later; None: by the running loop.
    """

    def __init__(self, later: Later | None = None) -> None:
        self._later = later
        self._answers: set[Hashable] = set()
        self._put_off: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_on(self) -> bool:
        """Whether an answer is being made."""
        return bool(self._answers)

    def begins(self, answer: Hashable) -> None:
        """Notes that an answer is being made for which nothing has to be waited but the store."""
        self._answers.add(answer)

    def ends(self, answer: Hashable) -> None:
        """Notes that an answer is given, or has to wait. Does nothing if that is known."""
        if answer in self._answers:
            self._answers.discard(answer)
            if not self._answers:
                self._go_on()

    def afterwards(self, function: Callable[[], None]) -> None:
        """Calls a function when no answer is being made any more, or after `LONGEST`; at once if none is."""
        if not self.is_on:
            function()
            return
        self._put_off.append(function)
        if self._timer is None:
            later = self._later or asyncio.get_running_loop().call_later
            self._timer = later(LONGEST, self._go_on)

    def collected(self, callback: Callable[[_Value], None]) -> tuple[Callable[[_Value], None], Callable[[], None]]:
        """What calls back with each value: at once, or while answers are being made once after them.

        Returns:
            What takes a value, which can be hashed; and what forgets those that it has put off.
        """
        noted: dict[_Value, None] = {}

        def note(value: _Value) -> None:
            if noted or self.is_on:
                if not noted:
                    self.afterwards(hand_on)
                noted[value] = None
            else:
                callback(value)

        def hand_on() -> None:
            values = list(noted)
            noted.clear()
            for value in values:
                callback(value)

        return note, noted.clear

    def _go_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        functions, self._put_off = self._put_off, []
        for function in functions:
            function()
