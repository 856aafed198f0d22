"""Asks a worker whether it is there before it is given to a caller: rule 14 (docs/rules.md#r14).

What the store says of it may be of a former life. It never chooses a worker, and ends none.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime

from bkpool.core.errors import Conflict, NotFound
from bkpool.core.names import Slot
from bkpool.core.queueing import Target
from bkpool.core.worker import Phase, Worker
from bkpool.store import Store
from bkpool.store.mirror import Mirror

Answers = Callable[[Slot, str], Awaitable[bool]]
"""Whether the buildkitd in a slot answers now, that of the worker with this uid (`Daemons.answers`)."""


async def as_stored(_slot: Slot, _worker_uid: str) -> bool:
    """An `Answers` that believes what is stored."""
    return True


class Presence:
    """Asks workers, and notes on those that do not answer that they do not.

    Args:
        store: Where the workers are.
        mirror: Gets what was written or read.
        now: The clock.
        answers: Asks.
    """

    def __init__(self, store: Store, mirror: Mirror, now: Callable[[], datetime], answers: Answers) -> None:
        self._store = store
        self._mirror = mirror
        self._now = now
        self._answers = answers

    async def of_target(self, target: Target) -> bool:
        """Whether a request may claim what it was given. A worker that is not ready is started for it, so it may."""
        return not isinstance(target, Worker) or target.phase is not Phase.IDLE or await self.of(target)

    async def of(self, worker: Worker) -> bool:
        """Whether a worker answers. If not, no replica gives it away, and the controller looks at it."""
        if await self._answers(worker.slot, worker.uid):
            return True
        silent = worker.noted_silent(self._now())
        with suppress(Conflict, NotFound):
            if silent is not worker:
                self._mirror.apply(await self._store.replace_status(silent))
                return False
        with suppress(NotFound):  # it has changed, so that the same choice is not made again
            self._mirror.apply(await self._store.get(Worker, *worker.key))
        return False
