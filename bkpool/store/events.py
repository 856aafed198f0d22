"""Records for people what happened to an object: in the log, and in a cluster as Event objects.

Recording never waits and never fails, and nothing depends on it. If an Event cannot be written, the log says so.
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

from bkpool.core.errors import BkpoolError, InvalidInput, NotFound
from bkpool.core.names import API_VERSION, GROUP
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
CLOSE_TIMEOUT = 2.0
"""Seconds in which `close` writes what still waits."""
_LONGEST_NOTE, _LONGEST_REASON = 1024, 128  # characters: the API's own limits (events.k8s.io/v1)
_API = "events.k8s.io/v1"


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
        self._dropped = 0
        self._recorded = asyncio.Event()

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        event = pending_event(about, reason[:_LONGEST_REASON], message, warning=warning, at=self._now())
        self._pending.add(event, self._clock())
        if self._pending.dropped and not self._dropped:
            log.warning("events.dropped", waiting=len(self._pending))
        self._dropped = self._pending.dropped
        self._recorded.set()

    async def run(self) -> None:
        """Writes what is recorded, one event at a time, until cancelled; then does what `close` does."""
        try:
            while True:
                self._recorded.clear()
                while (event := self._pending.take(self._clock())) is not None:
                    await self._try_to_write(event)
                await self._until_due(self._pending.wait(self._clock()))
        finally:
            await self.close()

    async def close(self) -> None:
        """Writes what still waits, within CLOSE_TIMEOUT."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                while (event := self._pending.take(self._clock(), hurry=True)) is not None:
                    await self._try_to_write(event)
        except TimeoutError:
            log.warning("events.dropped", waiting=len(self._pending))

    async def _until_due(self, seconds: float | None) -> None:
        """Waits that long, but no longer than until something is recorded."""
        recorded = asyncio.ensure_future(self._recorded.wait())
        waits = [recorded] if seconds is None else [recorded, asyncio.ensure_future(self._pause(seconds))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _try_to_write(self, event: PendingEvent) -> None:
        try:
            await self._write(event)
        except BkpoolError as error:
            if error.message != self._trouble:  # once, and not for each of them
                log.warning("events.not_written", object=event.about.name, reason=event.reason, error=error.message)
            self._trouble = error.message
        else:
            self._trouble = ""

    async def _write(self, event: PendingEvent) -> None:
        before = self._series.pop(event.key, None)
        if before is not None and event.last - before.since <= SERIES_TIME and await self._change(before, event):
            return
        created = await self._api.create(paths.group(_API, "events", event.about.namespace), self._document(event))
        self._remember(event, _Series(created["metadata"]["name"], event.times, event.at))

    async def _change(self, before: _Series, event: PendingEvent) -> bool:
        """Counts on in the Event object that exists; returns False if that is not possible.

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
