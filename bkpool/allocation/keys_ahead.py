"""Keys for the certificates of callers who send none of their own, made in moments in which nobody asks for a lease.

A key takes a fifth of the time of a certificate: so little that it needs no thread. It never makes anybody wait, and
keeps no key that was given away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bkpool.pki.authority import LeafKey

MOST = 32
"""Keys that are kept."""
_QUIET = 0.25
"""Seconds without a lease after which keys are made."""

Later = Callable[[float, Callable[[], None]], asyncio.TimerHandle]
"""Calls a function after that many seconds (`loop.call_later`)."""


class KeysAhead:
    """The keys, for one event loop.

    Args:
        later: Calls a function later; None: by the running loop.
    """

    def __init__(self, later: Later | None = None) -> None:
        self._later = later
        self._keys: list[LeafKey] = []
        self._timer: asyncio.TimerHandle | None = None
        self._taken = False
        """Whether a key was taken while the timer ran."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._keys)

    def take(self) -> LeafKey:
        """A key that nobody else has or gets: one that was made ahead, else a new one."""
        if self._closed:
            return LeafKey.new()
        if self._timer is None:
            self._set_timer(_QUIET)
        else:
            self._taken = True
        return self._keys.pop() if self._keys else LeafKey.new()

    def close(self) -> None:
        """Makes no more keys ahead, and forgets those that there are."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._keys.clear()

    def _set_timer(self, seconds: float) -> None:
        later = self._later or asyncio.get_running_loop().call_later
        self._taken = False
        self._timer = later(seconds, self._make_one)

    def _make_one(self) -> None:
        """Makes one key, so that the loop is not held up, if no lease was made in this time."""
        self._timer = None
        if self._taken:
            self._set_timer(_QUIET)
            return
        self._keys.append(LeafKey.new())
        if len(self._keys) < MOST:
            self._set_timer(0)
