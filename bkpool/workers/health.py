"""Asks the daemons that are up again and again whether they still answer, few at once and at a bounded rate.

With thousands of workers each is asked less often; one that is about to be used, or that somebody complains of, is
asked at once. It never decides what happens to a daemon that does not answer, and knows neither processes nor pods.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import structlog

from bkpool.core.errors import HostFault, Unavailable, WorkerFailed
from bkpool.core.names import Slot
from bkpool.core.observation import Silence

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ProbeLimits:
    """How often daemons are asked; times are in seconds. Tests use shorter ones."""

    interval: float = 10.0
    """Between two probes of one daemon, give or take a fifth, so that they spread out."""
    answer: float = 2.0
    """For an answer. A daemon that has nothing to do needs two thousandths."""
    retry: float = 0.5
    """Between a probe without an answer and the next one."""
    fresh: float = 3.0
    """So long an answer counts for a worker that is about to be handed out."""
    at_once: int = 64
    """Probes under way. Each has a file descriptor."""
    per_second: float = 25.0
    """Probes that begin in a second; one costs about 0.3 ms of a processor, over TLS 1.3 ms.
    3,000 daemons take two minutes."""


DEFAULT_PROBES = ProbeLimits()


class DaemonLost(Exception):
    """Something of a daemon was removed, so that nobody can use it any more. Its text says what.

    Args:
        text: What was removed.
        builds_fail: Not even a build that runs can succeed.
    """

    def __init__(self, text: str, *, builds_fail: bool = False) -> None:
        super().__init__(text)
        self.builds_fail = builds_fail


@dataclass(eq=False, slots=True)
class _Entry:
    """A daemon that has answered once. Times are of a monotonic clock."""

    answered_at: float
    due: float
    """When it is asked next."""
    silent_since: float | None = None
    """When the first probe without an answer began."""
    silence: Silence | None = None
    probe: asyncio.Future[None] | None = None
    """The probe that is under way."""


class Health:
    """Which daemons answer.

    Args:
        ask: Returns when the daemon in a slot has answered. Otherwise it raises Unavailable or WorkerFailed, or
            DaemonLost, or takes longer than it may.
        changed: Called with a slot when its daemon has stopped answering, answers again, or is silent for longer.
        limits: How often.
        jitter: Returns a number from 0 to 1.
    """

    def __init__(
        self,
        ask: Callable[[Slot], Awaitable[None]],
        changed: Callable[[Slot], None],
        limits: ProbeLimits = DEFAULT_PROBES,
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._ask = ask
        self._changed = changed
        self._limits = limits
        self._jitter = jitter
        self._entries: dict[Slot, _Entry] = {}
        self._queue: list[tuple[float, int, Slot]] = []  # a heap; one whose time is not that of its entry is old
        self._number = itertools.count()
        self._wake = asyncio.Event()
        self._places = asyncio.Semaphore(limits.at_once)

    def began(self, slot: Slot) -> None:
        """A daemon is up in this slot: it has just answered."""
        now = _now()
        self._entries[slot] = entry = _Entry(now, now)
        self._schedule(slot, entry, now + self._jitter() * self._limits.interval)

    def ended(self, slot: Slot) -> None:
        """There is no daemon in this slot any more that should answer."""
        self._entries.pop(slot, None)

    def silence(self, slot: Slot) -> Silence | None:
        """How long a daemon has not answered; None: it answered the last time."""
        entry = self._entries.get(slot)
        return entry.silence if entry else None

    async def answers(self, slot: Slot, *, fresh: bool = True) -> bool:
        """Whether a daemon that was up still answers.

        Args:
            slot: Where it is.
            fresh: An answer of a moment ago counts as well.
        """
        entry = self._entries.get(slot)
        if entry is None:
            return False
        if not fresh or entry.silence or _now() - entry.answered_at > self._limits.fresh:
            await self._probe(slot, entry)
        return self._entries.get(slot) is entry and entry.silence is None

    async def run(self) -> None:
        """Asks all daemons in turn until it is cancelled."""
        probes: set[asyncio.Task[None]] = set()
        try:
            while True:
                slot, entry = await self._next()
                async with self._places:  # more are not begun than can be under way
                    pass
                probe = asyncio.create_task(self._probe(slot, entry))
                probes.add(probe)
                probe.add_done_callback(probes.discard)
                await asyncio.sleep(1 / self._limits.per_second)
        finally:
            for probe in probes:
                probe.cancel()
            await asyncio.gather(*probes, return_exceptions=True)

    async def _next(self) -> tuple[Slot, _Entry]:
        """Waits until the next daemon is to be asked."""
        while True:
            self._wake.clear()
            due = None
            while self._queue:
                due, _, slot = self._queue[0]
                entry = self._entries.get(slot)
                if entry is not None and entry.due == due:
                    if due <= _now():
                        heapq.heappop(self._queue)
                        return slot, entry
                    break
                heapq.heappop(self._queue)
                due = None
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()

    def _schedule(self, slot: Slot, entry: _Entry, due: float) -> None:
        entry.due = due
        heapq.heappush(self._queue, (due, next(self._number), slot))
        self._wake.set()

    async def _probe(self, slot: Slot, entry: _Entry) -> None:
        """Asks once. Callers that come meanwhile wait for the same answer."""
        if entry.probe is None:
            entry.probe = asyncio.ensure_future(self._ask_once(slot, entry))
        await asyncio.shield(entry.probe)

    async def _ask_once(self, slot: Slot, entry: _Entry) -> None:
        lost: DaemonLost | None = None
        async with self._places:
            begun = _now()
            try:
                async with asyncio.timeout(self._limits.answer):
                    await self._ask(slot)
                answered = True
            except (TimeoutError, Unavailable, WorkerFailed):
                answered = False
            except DaemonLost as error:
                answered, lost = False, error
            except HostFault as error:  # this machine's fault, not the daemon's
                log.warning("worker.not_probed", worker=str(slot.worker), reason=error.message)
                answered = entry.silence is None  # nothing new is known
            except Exception:
                log.exception("worker.probe_crashed", worker=str(slot.worker))
                answered = entry.silence is None  # nothing new is known
            finally:
                entry.probe = None
        if self._entries.get(slot) is entry:  # it has not ended meanwhile
            self._note(slot, entry, begun if answered else None, begun, lost)

    def _note(
        self, slot: Slot, entry: _Entry, answered_at: float | None, begun: float, lost: DaemonLost | None
    ) -> None:
        before, limits = entry.silence, self._limits
        if answered_at is not None:
            entry.answered_at, entry.silent_since, entry.silence = answered_at, None, None
            pause = limits.interval * (0.8 + 0.4 * self._jitter())
        else:
            entry.silent_since = begun if entry.silent_since is None else entry.silent_since
            entry.silence = Silence(
                timedelta(seconds=_now() - entry.silent_since),
                lost=str(lost or ""),
                builds_fail=lost is not None and lost.builds_fail,
            )
            pause = limits.retry
        self._schedule(slot, entry, _now() + pause)
        if before is None and entry.silence is not None:
            log.warning("worker.silent", worker=str(slot.worker), reason=str(lost or "it does not answer"))
        elif before is not None and entry.silence is None:
            log.info("worker.answers_again", worker=str(slot.worker), after=round(before.lasted.total_seconds(), 1))
        if entry.silence != before:
            self._changed(slot)


def _now() -> float:
    return asyncio.get_running_loop().time()
