"""Records for people what happened to an object: in the log, and in a cluster as Event objects.

Recording never waits and never fails, and nothing depends on it. If an Event cannot be written, the log says so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol
from uuid import uuid4

import structlog

from bkpool.core.errors import BkpoolError, NotFound
from bkpool.core.names import API_VERSION, GROUP
from bkpool.core.resource import Resource
from bkpool.kube import Doc, KubeApi, paths
from bkpool.kube.times import micro

log = structlog.get_logger(__name__)

CONTROLLER = f"{GROUP}/bkpool"
"""The reportingController of every Event."""
QUEUE_SIZE = 1000
"""Events that may wait to be written; beyond this the oldest are dropped. At 5 ms each, five seconds of writing."""
SERIES_TIME = timedelta(minutes=10)
"""An event that is repeated within this time only raises the count of the Event object that exists already, as in
client-go's correlator."""
SERIES_REMEMBERED = 1000
"""Event objects whose count can be raised. The one that was used the longest ago is forgotten first."""
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


class _Pending(NamedTuple):
    about: Resource
    reason: str
    message: str
    warning: bool
    at: datetime

    @property
    def series_key(self) -> tuple[str, str, str]:
        return (self.about.uid, self.reason, self.message)


class _Series(NamedTuple):
    path: str
    times: int
    since: datetime


class KubernetesRecorder(Recorder):
    """Writes Event objects about the objects; `kubectl describe` shows them.

    Args:
        api: The cluster. Its creator closes it.
        reporter: This replica's name (reportingInstance).
        now: The clock.
    """

    def __init__(
        self, api: KubeApi, reporter: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._api = api
        self._reporter = reporter[:_LONGEST_REASON]
        self._now = now
        self._queue: deque[_Pending] = deque(maxlen=QUEUE_SIZE)
        self._series: OrderedDict[tuple[str, str, str], _Series] = OrderedDict()
        self._overflowing = False
        self._queued = asyncio.Event()

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        if len(self._queue) == QUEUE_SIZE and not self._overflowing:
            self._overflowing = True
            log.warning("events.dropped", waiting=QUEUE_SIZE)
        self._queue.append(_Pending(about, reason, message, warning, self._now()))
        self._queued.set()

    async def run(self) -> None:
        """Writes what is recorded, one event at a time, until cancelled; then does what `close` does."""
        try:
            while True:
                await self._queued.wait()
                await self._write_queued()
        finally:
            await self.close()

    async def close(self) -> None:
        """Writes what still waits, within CLOSE_TIMEOUT."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._write_queued()
        except TimeoutError:
            log.warning("events.dropped", waiting=len(self._queue))

    async def _write_queued(self) -> None:
        self._queued.clear()
        while self._queue:
            event = self._queue.popleft()
            try:
                await self._write(event)
            except BkpoolError as error:
                log.warning(
                    "events.not_written", object=str(event.about.key), reason=event.reason, error=error.message
                )
        self._overflowing = False

    async def _write(self, event: _Pending) -> None:
        before = self._series.pop(event.series_key, None)
        if before is None or event.at - before.since > SERIES_TIME or not await self._raise_count(before, event):
            path = paths.group(_API, "events", event.about.key.namespace)
            created = await self._api.create(path, self._event(event))
            self._remember(event, _Series(f"{path}/{created['metadata']['name']}", 1, event.at))

    async def _raise_count(self, before: _Series, event: _Pending) -> bool:
        """Raises the count of the Event object that exists; returns False if it has been deleted."""
        series = {"count": before.times + 1, "lastObservedTime": micro(event.at)}
        try:
            await self._api.patch(before.path, {"series": series})
        except NotFound:
            return False
        self._remember(event, before._replace(times=before.times + 1))
        return True

    def _remember(self, event: _Pending, series: _Series) -> None:
        self._series[event.series_key] = series
        if len(self._series) > SERIES_REMEMBERED:
            self._series.popitem(last=False)

    def _event(self, event: _Pending) -> Doc:
        about, reason = event.about, event.reason[:_LONGEST_REASON]
        namespace, name = about.key
        return {
            "apiVersion": _API,
            "kind": "Event",
            "metadata": {"name": f"{name}.{uuid4().hex[:16]}", "namespace": namespace},
            "eventTime": micro(event.at),
            "type": "Warning" if event.warning else "Normal",
            "reason": reason,
            "action": reason,
            "note": event.message[:_LONGEST_NOTE],
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": about.KIND,
                "namespace": namespace,
                "name": name,
                "uid": about.uid,
                "resourceVersion": about.metadata.resource_version or "",
            },
            "reportingController": CONTROLLER,
            "reportingInstance": self._reporter,
        }
