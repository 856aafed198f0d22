"""Gives a gateway the leases of the store's copy, and later each change of them.

Many changes come in parts, one in an iteration of the loop, so that no loop is held up. Whoever waits for one lease
need not wait for the others. It never writes to the store and reads nothing but the copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bkpool.gateway.control.lease_feed import LeaseFeed
from bkpool.gateway.session.lease_table import TableChange
from bkpool.store.mirror import Mirror, MirrorChange


class TableFeeder:
    """Feeds the tables of one gateway.

    Args:
        mirror: Has pools and workers.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.complete = asyncio.Event()
        """Set when the gateway has got everything that there was at the start."""
        self._mirror = mirror
        self._feed = LeaseFeed(mirror)
        self._update: Callable[[TableChange], None] = lambda _change: None
        self._next: asyncio.Handle | None = None
        self._ended = False

    def start(self, update: Callable[[TableChange], None]) -> Callable[[], None]:
        """Begins to hand on changes.

        Args:
            update: Takes them (`Gateway.update`).

        Returns:
            What ends it.
        """
        self._update = update
        self._feed = LeaseFeed(self._mirror)
        unsubscribe = self._mirror.subscribe_afterwards(self._on_change)
        self._hand_on_a_part()

        def end() -> None:
            unsubscribe()
            self._ended = True
            if self._next is not None:
                self._next.cancel()

        return end

    def hand_on(self, token_sha256: str) -> bool:
        """Hands on what the copy has of the lease with this token, at once and before everything else.

        Returns:
            Whether the copy has a lease with this token, or remembers its end.
        """
        found = self._feed.hurry(token_sha256)
        if found and not self._ended:
            self._hand_on_a_part()
        return found

    def _on_change(self, change: MirrorChange) -> None:
        self._feed.note(change)
        self._schedule()

    def _schedule(self) -> None:
        if self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._next = None
        self._hand_on_a_part()

    def _hand_on_a_part(self) -> None:
        change = self._feed.take()
        if change is not None:
            self._update(change)
        if self._feed.has_more:
            self._schedule()
        else:
            self.complete.set()
