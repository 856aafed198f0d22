"""Follows each lease from its claim until its caller has the answer, and writes down that they have it.

Until then the lease itself says that nobody has it. So if this process is killed, the controller finds it and ends it
(rule 14, docs/rules.md#r14). Nothing here makes an answer wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Protocol

import structlog

from bkpool.allocation.leases import LeaseService, lease_facts
from bkpool.allocation.open_requests import OpenRequests
from bkpool.core.backoff import Backoff
from bkpool.core.errors import BkpoolError, Gone, NotFound
from bkpool.core.unreadable import UnreadableObject
from bkpool.core.worker import UNDELIVERED_RENEWAL, Worker

log = structlog.get_logger(__name__)

MARK_DELAY = 1.0
"""Seconds from an answer to its mark. Most leases are connected or over by then, and need none. A caller who breaks
the connection in this time may not have read the answer, although their side has it."""
_LOOK_INTERVAL = 0.1
"""Seconds after which it is asked what became of answers. The marks that are due then are written together."""
LONGEST_WAIT = 60.0
"""Seconds for which an answer may be on its way. After that nobody knows whether its caller got it."""
_RETRY_DELAY = 1.0
"""Seconds after which a mark that could not be written is written again; twice as long after each further failure."""
_LONGEST_RETRY_DELAY = 60.0
_AT_ONCE = 16
"""Writes at the same time."""


class Delivery(Enum):
    """What became of an answer."""

    TAKEN = auto()
    """The caller's side has all of it."""
    ON_ITS_WAY = auto()
    LOST = auto()
    """The caller had hung up before all of it was there."""
    UNKNOWN = auto()
    """The caller's side had all of it and then broke the connection: a program that was killed may not have read it,
    and some proxies end every connection like that."""


_MAY_CHANGE_FOR = {Delivery.ON_ITS_WAY: LONGEST_WAIT, Delivery.TAKEN: MARK_DELAY}
"""Seconds after an answer for which this may not be the last word."""


class Receipt(Protocol):
    """Knows what became of one answer."""

    def delivery(self) -> Delivery:
        """What became of it until now."""


class Abandon(Protocol):
    """Ends leases in the background (`Abandoner.abandon`)."""

    def __call__(self, worker: Worker) -> None:
        """Ends the lease of this worker."""


@dataclass(slots=True)
class _Answer:
    worker: Worker
    receipt: Receipt
    sent_at: float


@dataclass(frozen=True, slots=True)
class _Mark:
    worker: Worker
    due_at: float
    pauses: Backoff = field(default_factory=lambda: Backoff(_LONGEST_RETRY_DELAY, first=_RETRY_DELAY))


class Deliveries:
    """The leases of this replica's requests that no caller is known to have.

    Args:
        leases: Writes what is known.
        abandon: Ends the lease of a worker in the background.
        replica: The name of this replica in this run.
        pause: Waits that many seconds.
    """

    def __init__(
        self,
        leases: LeaseService,
        abandon: Abandon,
        replica: str,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._leases = leases
        self._abandon = abandon
        self._replica = replica
        self._pause = pause
        self._requests = OpenRequests()
        self._open: dict[str, Worker] = {}
        self._answers: list[_Answer] = []
        self._marks: dict[str, _Mark] = {}
        """Leases that their callers have. The store does not say so yet."""
        self._waited = 0.0
        """Seconds that were waited for answers and marks: the time of both."""
        self._marking: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._requests)

    async def close(self) -> None:
        """Writes what is known now about answers that were sent. The others are left to the controller."""
        tasks = [task for task in (self._marking, self._renewing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._settle(closing=True)
        await self._write_marks(list(self._marks))

    def begin(self, worker: Worker, *, known: bool) -> None:
        """Notes one more request for the worker's lease.

        Args:
            worker: The worker.
            known: The lease existed before this request, so a caller may have it already.
        """
        self._requests.add(worker.held_lease.id, known=known)
        self.claimed(worker)

    def claiming(self, lease_id: str) -> None:
        """Notes the request whose lease is about to be written. Others may share the lease before it is answered."""
        self._requests.add(lease_id, known=False)

    def claimed(self, worker: Worker) -> None:
        """Notes that the lease of a request is in the store."""
        self._open[worker.held_lease.id] = worker
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_while_open())

    def not_claimed(self, lease_id: str) -> None:
        """Notes that the lease of a request was not written, as far as is known."""
        self._requests.remove(lease_id)

    def give_up(self, worker: Worker) -> None:
        """Notes that one request for the lease is over. If no other needs it and no caller has it, the lease ends."""
        lease_id = worker.held_lease.id
        abandoned = self._requests.remove(lease_id)
        if lease_id not in self._requests:
            self._open.pop(lease_id, None)
        if abandoned:
            self._abandon(worker)

    def answered(self, worker: Worker, receipt: Receipt) -> None:
        """Notes that the answer to one request was written. Once it is known what became of it, the request ends."""
        self._answers.append(_Answer(worker, receipt, self._waited))
        if self._marking is None:
            self._marking = asyncio.create_task(self._mark_while_answers_come())

    async def _mark_while_answers_come(self) -> None:
        try:
            while self._answers or self._marks:
                await self._pause(_LOOK_INTERVAL)
                self._waited += _LOOK_INTERVAL
                self._settle()
                await self._write_marks([one for one, mark in self._marks.items() if mark.due_at <= self._waited])
        finally:
            self._marking = None

    def _settle(self, *, closing: bool = False) -> None:
        """Asks what became of each answer. Those of which that may change are asked again later."""
        answers, self._answers = self._answers, []
        for answer in answers:
            delivery = answer.receipt.delivery()
            if self._waited - answer.sent_at < _MAY_CHANGE_FOR.get(delivery, 0.0) and not closing:
                self._answers.append(answer)
                continue
            lease_id = answer.worker.held_lease.id
            if delivery is not Delivery.LOST:
                self._requests.answered(lease_id)
            if delivery is Delivery.TAKEN:
                self._marks[lease_id] = _Mark(answer.worker, self._waited)
            self.give_up(answer.worker)

    async def _write_marks(self, lease_ids: list[str]) -> None:
        """Writes the marks of these leases: with SQLite in one transaction. A mark that fails is written later.

        It is given up if its worker cannot be read: nobody can write to it before somebody has repaired it.
        """
        slots = asyncio.Semaphore(_AT_ONCE)
        errors: list[BkpoolError] = []

        async def write(lease_id: str) -> None:
            async with slots:
                mark = self._marks[lease_id]
                try:
                    await self._leases.mark_delivered(mark.worker)
                except UnreadableObject as error:
                    errors.append(error)
                    del self._marks[lease_id]
                except BkpoolError as error:
                    errors.append(error)
                    self._marks[lease_id] = replace(mark, due_at=self._waited + mark.pauses.failed())
                else:
                    del self._marks[lease_id]

        await asyncio.gather(*(write(one) for one in lease_ids))
        if errors:
            log.warning("leases.not_marked", leases=len(errors), error=errors[0].message)

    async def _renew_while_open(self) -> None:
        """Renews the leases whose requests take long, so that the controller does not end them."""
        try:
            renewed: set[str] = set()
            while self._open:
                await self._pause(UNDELIVERED_RENEWAL.total_seconds())
                slots = asyncio.Semaphore(_AT_ONCE)
                await asyncio.gather(*(self._renew(self._open[one], slots) for one in renewed & self._open.keys()))
                renewed = set(self._open)
        finally:
            self._renewing = None

    async def _renew(self, worker: Worker, slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                await self._leases.renew_undelivered(worker, self._replica)
            except (Gone, NotFound):
                pass  # its requests see that it is over
            except BkpoolError as error:
                log.warning("lease.not_renewed", **lease_facts(worker), error=error.message)
