"""What a person would ask about, told beside the object it concerns: in the log, and in a cluster as Events.

Telling never waits, never fails and never decides anything; an Event that cannot be written is a line in the log.
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
"""Who reports, in every Event (reportingController)."""
WAITING = 1000
"""Events that wait to be written; beyond this the oldest are dropped. At 5 ms each, five seconds of writing."""
FOLDED = timedelta(minutes=10)
"""What is told again within this time is counted in the Event that is there, as client-go's correlator does."""
REMEMBERED = 1000
"""Events that can be counted on; the longest unheard of is forgotten first."""
FAREWELL = 2.0
"""Seconds that `close` gives to what still waits."""
_LONGEST_NOTE, _LONGEST_REASON = 1024, 128  # characters: the API's own limits (events.k8s.io/v1)
_API = "events.k8s.io/v1"


class Recorder(Protocol):
    """Whom the rooms tell what happened to an object."""

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """Passes it on in the background; returns at once and never raises.

        Args:
            about: The object, as stored (it has a uid).
            reason: One word in CamelCase, for programs.
            message: One sentence, for people; no secret.
            warning: Whether somebody should look at it.
        """


class LogRecorder(Recorder):
    """Tells the log alone."""

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        say = log.warning if warning else log.info
        say("object.event", kind=about.KIND, object=str(about.key), reason=reason, message=message)


class _Told(NamedTuple):
    about: Resource
    reason: str
    message: str
    warning: bool
    at: datetime

    @property
    def same(self) -> tuple[str, str, str]:
        return (self.about.uid, self.reason, self.message)


class _Written(NamedTuple):
    path: str
    times: int
    since: datetime


class KubernetesRecorder(Recorder):
    """Writes Events beside the objects; `kubectl describe` shows them.

    Args:
        api: The cluster. Whoever made it closes it.
        reporter: This replica's name (reportingInstance).
        now: The clock.
    """

    def __init__(
        self, api: KubeApi, reporter: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._api = api
        self._reporter = reporter[:_LONGEST_REASON]
        self._now = now
        self._waiting: deque[_Told] = deque(maxlen=WAITING)
        self._written: OrderedDict[tuple[str, str, str], _Written] = OrderedDict()
        self._overflowing = False
        self._told = asyncio.Event()

    def record(self, about: Resource, reason: str, message: str, *, warning: bool = False) -> None:
        """See Recorder."""
        if len(self._waiting) == WAITING and not self._overflowing:
            self._overflowing = True
            log.warning("events.dropped", waiting=WAITING)
        self._waiting.append(_Told(about, reason, message, warning, self._now()))
        self._told.set()

    async def run(self) -> None:
        """Writes what is told, one at a time, until cancelled; and then what still waits, as `close` does."""
        try:
            while True:
                await self._told.wait()
                await self._write_waiting()
        finally:
            await self.close()

    async def close(self) -> None:
        """Writes what still waits, as far as it goes in FAREWELL."""
        try:
            async with asyncio.timeout(FAREWELL):
                await self._write_waiting()
        except TimeoutError:
            log.warning("events.dropped", waiting=len(self._waiting))

    async def _write_waiting(self) -> None:
        self._told.clear()
        while self._waiting:
            told = self._waiting.popleft()
            try:
                await self._write(told)
            except BkpoolError as error:
                log.warning("events.not_written", object=str(told.about.key), reason=told.reason, error=error.message)
        self._overflowing = False

    async def _write(self, told: _Told) -> None:
        before = self._written.pop(told.same, None)
        if before is None or told.at - before.since > FOLDED or not await self._count(before, told):
            path = paths.group(_API, "events", told.about.key.namespace)
            made = await self._api.create(path, self._event(told))
            self._remember(told, _Written(f"{path}/{made['metadata']['name']}", 1, told.at))

    async def _count(self, before: _Written, told: _Told) -> bool:
        """Counts it in the Event that is there; False if that has gone."""
        series = {"count": before.times + 1, "lastObservedTime": micro(told.at)}
        try:
            await self._api.patch(before.path, {"series": series})
        except NotFound:
            return False
        self._remember(told, before._replace(times=before.times + 1))
        return True

    def _remember(self, told: _Told, written: _Written) -> None:
        self._written[told.same] = written
        if len(self._written) > REMEMBERED:
            self._written.popitem(last=False)

    def _event(self, told: _Told) -> Doc:
        about, reason = told.about, told.reason[:_LONGEST_REASON]
        namespace, name = about.key
        return {
            "apiVersion": _API,
            "kind": "Event",
            "metadata": {"name": f"{name}.{uuid4().hex[:16]}", "namespace": namespace},
            "eventTime": micro(told.at),
            "type": "Warning" if told.warning else "Normal",
            "reason": reason,
            "action": reason,
            "note": told.message[:_LONGEST_NOTE],
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
