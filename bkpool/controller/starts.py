"""How many workers start at once, in all pools together, and which pool may start the next one.

A start counts for a short time only: what takes longer waits for something else, such as a node or an image, and
costs nothing here. It starts nothing, and the start of a leased worker never waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice

from bkpool.core.names import Key, Slot

COUNTS_FOR = 10.0
"""Seconds for which a start counts at most. A pod whose image is there answers after one."""


class Starts:
    """The starts that are under way, and the pools that want more.

    Args:
        most: How many may be under way until no other worker without a lease is started.
        look_again: Called with a pool that may start a worker now.
        counts_for: See `COUNTS_FOR`.
    """

    def __init__(self, most: int, look_again: Callable[[Key], None], counts_for: float = COUNTS_FOR) -> None:
        self._most = most
        self._look_again = look_again
        self._counts_for = counts_for
        self._under_way: dict[Slot, asyncio.TimerHandle] = {}
        self._waiting: dict[Key, None] = {}
        """In the order in which they may start one: who was served last comes last."""

    @property
    def left(self) -> int:
        """How many workers without a lease may begin to start. Below zero if many leased ones start."""
        return self._most - len(self._under_way)

    def began(self, slot: Slot) -> None:
        """Notes that a start has begun, of a worker with or without a lease."""
        self._under_way[slot] = asyncio.get_running_loop().call_later(self._counts_for, self.ended, slot)

    def ended(self, slot: Slot) -> None:
        """Notes that a start has ended, if one was under way in the slot."""
        if (timer := self._under_way.pop(slot, None)) is not None:
            timer.cancel()
            self._next()

    def planned(self, pool: Key, *, begun: int, wanted: int) -> None:
        """Takes note of a plan.

        Args:
            pool: Of which pool.
            begun: How many workers without a lease it starts.
            wanted: How many it would start if it might.
        """
        waited = pool in self._waiting
        if begun or not wanted:
            self._waiting.pop(pool, None)
        if wanted > begun:
            self._waiting.setdefault(pool)
        elif waited:
            self._next()

    def close(self) -> None:
        """Forgets everything."""
        for timer in self._under_way.values():
            timer.cancel()
        self._under_way.clear()
        self._waiting.clear()

    def _next(self) -> None:
        for pool in list(islice(self._waiting, max(0, self.left))):
            self._look_again(pool)
