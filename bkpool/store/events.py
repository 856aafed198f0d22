"""Records for people what happened to an object: in the log, and in a cluster as Event objects.

Recording never waits and never fails, and nothing depends on it. An Event that the API server does not take now waits
for it. What is left out is counted, and the log says how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol
from uuid import uuid4

import structlog

from bkpool.core.errors import BkpoolError, Forbidden, InvalidInput, NotFound, Unavailable
from bkpool.core.names import API_VERSION, GROUP, Key
from bkpool.core.resource import Resource
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.times import micro
from bkpool.store.pending_events import EventKey, PendingEvent, PendingEvents, pending_event

log = structlog.get_logger(__name__)

CONTROLLER = f"{GROUP}/bkpool"
"""The reportingController of every Event."""
SERIES_TIME = timedelta(minutes=10)
"""An event that is repeated within this time only changes the Event object that exists already, as in client-go's
correlator."""
SERIES_REMEMBERED = 4096
"""Event objects that can be changed. The one that was used the longest ago is forgotten first."""
RETRY_PAUSE = 5.0
"""Seconds without a request after one that the API server did not answer."""
CLOSE_TIMEOUT = 2.0
"""Seconds in which `close` writes what still waits."""
_LONGEST_NOTE, _LONGEST_REASON = 1024, 128  # characters: the API's own limits (events.k8s.io/v1)
_API = "events.k8s.io/v1"

_TOO_MANY = (
    "Leases go on; only Events are missing. If `events.not_written` was logged before, the API server does not take "
    "them. Else `kubectl get events -A` shows what happens so often."
)
_WAITING = "Nothing to do if the API server is back soon: the events wait, and `events.written_again` tells when."
_FORBIDDEN = (
    "Leases go on; only Events are missing. Apply this version's manifests: they give the right to write them."
)
_REFUSED = "Leases go on; this Event is missing. If it happens often, report it as a fault of bkpool."


class Recorder(Protocol):
    """Takes from all rooms what happened to an object."""

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """Records an event in the background; returns at once and never raises.

        Args:
            about: The object, as stored (it has a uid).
            reason: One word in CamelCase, for programs.
            message: One sentence, for people, without any secret.
            warning: Whether a person should look into it.
        """


class LogRecorder(Recorder):
    """Writes to the log only."""

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        write = log.warning if warning else log.info
        write("object.event", kind=about.KIND, object=str(about.key), reason=reason, message=message)


class _Series(NamedTuple):
    """An Event object that exists."""

    name: str
    times: int
    since: datetime


class KubernetesRecorder(Recorder):
    """Writes Event objects about the objects; `kubectl describe` shows them.

    Args:
        api: The cluster. Its creator closes it.
        reporter: This replica's name (reportingInstance).
        now: The clock.
        clock: Monotonic seconds.
        pause: Waits that many seconds.
        pending: What waits to be written.
    """

    def __init__(
        self,
        api: KubeApi,
        reporter: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        pending: PendingEvents | None = None,
    ) -> None:
        self._api = api
        self._reporter = reporter[:_LONGEST_REASON]
        self._now = now
        self._clock = clock
        self._pause = pause
        self._pending = PendingEvents() if pending is None else pending
        self._series: OrderedDict[EventKey, _Series] = OrderedDict()
        self._trouble = ""
        """Why the last event was not written; empty: it was."""
        self._refused = 0
        """Events that the API has refused for good."""
        self._told = 0
        """How many events that were left out the log has told of."""
        self._told_of_flood = False
        self._recorded = asyncio.Event()

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        event = pending_event(about, reason[:_LONGEST_REASON], message, warning=warning, at=self._now())
        before = self._pending.dropped
        self._pending.add(event, self._clock())
        if self._pending.dropped > before and not self._told_of_flood:  # how many are left out is told at the end
            log.warning("events.too_many", waiting=len(self._pending), hint=_TOO_MANY)
            self._told_of_flood = True
        self._recorded.set()

    async def run(self) -> None:
        """Writes what is recorded, one event at a time, until cancelled; then does what `close` does."""
        try:
            while True:
                self._recorded.clear()
                if await self._write_all(hurry=False):
                    await self._until_due(self._pending.wait(self._clock()))
                else:
                    await self._pause(RETRY_PAUSE)
        finally:
            await self.close()

    async def close(self) -> None:
        """Writes what still waits, within CLOSE_TIMEOUT."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._write_all(hurry=True)
        except TimeoutError:
            pass
        if self._left_out > self._told or self._pending:
            waiting = sum(event.times for event in self._pending.waiting.values())
            log.warning("events.left_out", events=self._left_out - self._told + waiting)
            self._told = self._left_out

    async def _until_due(self, seconds: float | None) -> None:
        """Waits that long, but no longer than until something is recorded."""
        recorded = asyncio.ensure_future(self._recorded.wait())
        waits = [recorded] if seconds is None else [recorded, asyncio.ensure_future(self._pause(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    @property
    def _left_out(self) -> int:
        """How many events will never be written."""
        return self._pending.dropped + self._refused

    async def _write_all(self, *, hurry: bool) -> bool:
        """Writes what may be written now. Returns False as soon as the API server does not answer."""
        while (event := self._pending.take(self._clock(), hurry=hurry)) is not None:
            if not await self._try_to_write(event):
                return False
        return True

    async def _try_to_write(self, event: PendingEvent) -> bool:
        """Writes an event, or counts that it was refused. Returns False if the API server does not answer."""
        try:
            await self._write(event)
        except asyncio.CancelledError:
            self._pending.put_back(event, self._clock())
            raise
        except Unavailable as error:
            self._pending.put_back(event, self._clock())
            self._note_trouble(event, error)
            return False
        except BkpoolError as error:
            self._refused += event.times
            self._note_trouble(event, error)
        else:
            self._note_success()
        return True

    def _note_trouble(self, event: PendingEvent, error: BkpoolError) -> None:
        if error.message != self._trouble:  # once, and not for each of them
            about, hint = str(Key(event.about.namespace, event.about.name)), _hint(error)
            log.warning("events.not_written", object=about, reason=event.reason, error=error.message, hint=hint)
        self._trouble = error.message

    def _note_success(self) -> None:
        """After trouble, or when what a flood has left is written, the log tells how many events are left out."""
        if self._trouble or (self._told_of_flood and not self._pending):
            log.warning("events.written_again", left_out=self._left_out - self._told)
            self._told, self._trouble, self._told_of_flood = self._left_out, "", False

    async def _write(self, event: PendingEvent) -> None:
        before = self._series.get(event.key)
        if before is not None and event.last - before.since <= SERIES_TIME and await self._change(before, event):
            return
        created = await self._api.create(paths.group(_API, "events", event.about.namespace), self._document(event))
        self._remember(event, _Series(created["metadata"]["name"], event.times, event.at))

    async def _change(self, before: _Series, event: PendingEvent) -> bool:
        """Adds to the count of the Event object that exists; returns False if that is not possible.

        By the path of the core group: events.k8s.io lets nobody change the note.
        """
        times = before.times + event.times
        series = {"count": times, "lastObservedTime": micro(event.last)}
        body = {"message": event.note(times)[:_LONGEST_NOTE], "series": series}
        try:
            await self._api.patch(paths.core("events", event.about.namespace, before.name), body)
        except (NotFound, InvalidInput):
            return False
        self._remember(event, before._replace(times=times))
        return True

    def _remember(self, event: PendingEvent, series: _Series) -> None:
        self._series[event.key] = series
        self._series.move_to_end(event.key)
        if len(self._series) > SERIES_REMEMBERED:
            self._series.popitem(last=False)

    def _document(self, event: PendingEvent) -> Doc:
        about = event.about
        repeated = (
            {"series": {"count": event.times, "lastObservedTime": micro(event.last)}} if event.times > 1 else {}
        )
        return {
            "apiVersion": _API,
            "kind": "Event",
            "metadata": {"name": f"{about.name}.{uuid4().hex[:16]}", "namespace": about.namespace},
            "eventTime": micro(event.at),
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "action": event.reason,
            "note": event.note(event.times)[:_LONGEST_NOTE],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": about.kind,
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
                "resourceVersion": about.version,
            },
            "reportingController": CONTROLLER,
            "reportingInstance": self._reporter,
            **repeated,
        }


def _hint(error: BkpoolError) -> str:
    """What an operator should do if an event was not written."""
    if isinstance(error, Unavailable):
        return _WAITING
    return _FORBIDDEN if isinstance(error, Forbidden) else _REFUSED
