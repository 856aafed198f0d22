"""The line before a pool: who is served next when a worker comes free.

One synchronous function looks at the pool and serves the line, first come first served; the callers do the I/O. It
knows nothing of stores or tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from bkpool.allocation.leases import living
from bkpool.core.errors import NoCapacity
from bkpool.core.names import LABEL_REQUEST, Slot
from bkpool.core.worker import Worker

MAX_WAITERS = 1000
"""Requests that may wait for one pool at once; one more is refused (DESIGN rule 11)."""


@dataclass(eq=False, slots=True)
class Waiter:
    """One request in the line."""

    owner: str
    """Digest of whose cache would suit it."""
    request_key: str | None
    """Key of (identity, job): a lease that carries it already is this request's too."""
    served: asyncio.Future[Worker | Slot] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WaitQueue:
    """The waiters of one pool, and the slots that they are claiming at this moment."""

    def __init__(self, choose: Callable[[Waiter, frozenset[Slot]], Worker | Slot | None]) -> None:
        self._choose = choose
        self._waiting: deque[Waiter] = deque()
        self._claiming: set[Slot] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, waiter: Waiter, *, first: bool = False) -> None:
        """Stands at the end; or at the front, after a claim that another replica won.

        Raises:
            NoCapacity: The line is full.
        """
        if len(self._waiting) >= MAX_WAITERS:
            raise NoCapacity(
                f"{len(self._waiting)} requests wait for this pool already",
                hint="Raise spec.scaling.max of the pool, or try again later.",
                code="TooManyWaiters",
                retry_after=30,
            )
        (self._waiting.appendleft if first else self._waiting.append)(waiter)

    def leave(self, waiter: Waiter) -> None:
        """Gives up waiting; a place that was already assigned goes back."""
        with suppress(ValueError):
            self._waiting.remove(waiter)
        if waiter.served.done() and not waiter.served.cancelled() and not waiter.served.exception():
            self.claimed(waiter.served.result())
        waiter.served.cancel()

    def claimed(self, spot: Worker | Slot) -> None:
        """The claim was made, or was lost: the store knows, so the slot need not be kept apart any more."""
        self._claiming.discard(_slot(spot))

    def dismiss(self, error: Exception) -> None:
        """Sends everybody away: the pool is gone."""
        while self._waiting:
            self._waiting.popleft().served.set_exception(error)

    def serve(self, workers: Collection[Worker], now: datetime) -> None:
        """Gives places to waiters, in order, until there are none left to give.

        A waiter whose job got a lease meanwhile (a repeated request) is given that one, wherever it stands.
        """
        held = {key: w for w in living(workers, now) if (key := w.metadata.labels.get(LABEL_REQUEST))}
        for waiter in [w for w in self._waiting if w.request_key in held]:
            self._waiting.remove(waiter)
            waiter.served.set_result(held[waiter.request_key or ""])
        while self._waiting:
            spot = self._choose(self._waiting[0], frozenset(self._claiming))
            if spot is None:
                return
            self._claiming.add(_slot(spot))
            self._waiting.popleft().served.set_result(spot)


def _slot(spot: Worker | Slot) -> Slot:
    return spot.slot if isinstance(spot, Worker) else spot
