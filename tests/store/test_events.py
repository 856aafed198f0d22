"""The recorder of events, against an API in memory. In e2e/kind/test_events.py, kubectl shows the events."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import Forbidden, InvalidInput, NotFound, Unavailable
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.store.events import RETRY_PAUSE, SERIES_REMEMBERED, KubernetesRecorder, LogRecorder
from bkpool.store.pending_events import MOST_PENDING, PendingEvents
from support.captured_logs import capture_logs

POOL = Pool(metadata=Metadata(name="p", uid="u", resource_version="7"))


class Api:
    def __init__(self) -> None:
        self.events: dict[str, dict] = {}
        self.fault: Exception | None = None
        self._written = asyncio.Event()

    async def until(self, condition) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._written.clear()
                await self._written.wait()

    async def create(self, path, body):
        self._written.set()
        if self.fault:
            raise self.fault
        self.events[f"{path}/{body['metadata']['name']}"] = body
        return body

    async def patch(self, path, body):
        """By the path of the core group, where the note is called message."""
        self._written.set()
        found = self.events.get(path.replace("/api/v1/", "/apis/events.k8s.io/v1/"))
        if found is None:
            raise NotFound(path)
        if self.fault:
            raise self.fault
        found |= {"note" if name == "message" else name: value for name, value in body.items()}

    @property
    def notes(self) -> list[tuple[str, int]]:
        return [(event["note"], event.get("series", {}).get("count", 1)) for event in self.events.values()]


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorder(api, clock) -> KubernetesRecorder:
    return KubernetesRecorder(api, "replica-1", now=clock)


class Seconds:
    """A monotonic clock that only the test, or a pause, moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


async def test_an_event_names_the_object_what_happened_and_the_reporter(api, recorder):
    recorder.record(POOL, "ScaledUp", "p-worker-0 is made", warning=True)
    await recorder.close()

    ((path, event),) = api.events.items()
    assert path.startswith("/apis/events.k8s.io/v1/namespaces/default/events/p.")
    assert event["regarding"]["kind"] == "BuildKitPool"
    assert (event["regarding"]["name"], event["regarding"]["uid"]) == ("p", "u")
    assert (event["type"], event["reason"], event["note"]) == ("Warning", "ScaledUp", "p-worker-0 is made")
    assert event["eventTime"] == "2030-01-01T00:00:00.000000Z"
    assert event["reportingInstance"] == "replica-1"


async def test_events_are_written_in_the_background(api, recorder):
    running = asyncio.create_task(recorder.run())
    for message in ("one", "two"):
        recorder.record(POOL, f"Reason{message}", message)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (message, 1) in api.notes
    recorder.record(POOL, "Released", "at the very end")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert ("at the very end", 1) in api.notes


async def test_a_repeated_event_changes_the_object_for_ten_minutes(api, clock, recorder):
    for minutes, note in ((0, "no image"), (1, "no room"), (9, "no node"), (11, "no image")):
        clock.now = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        recorder.record(POOL, "Failed", note, warning=True)
        recorder.record(POOL, f"Another{minutes}", "something else")
        await recorder.close()

    assert [entry for entry in api.notes if entry[0] != "something else"] == [
        ("no node (the last of 3 such events)", 3),
        ("no image", 1),
    ]
    assert len(api.notes) == 6
    (series,) = (event["series"] for event in api.events.values() if "series" in event)
    assert series["lastObservedTime"] == "2030-01-01T00:09:00.000000Z"


async def test_events_that_wait_together_are_written_as_one(api, clock, recorder):
    for minute in range(3):
        clock.now = datetime(2030, 1, 1, 0, minute, tzinfo=UTC)
        recorder.record(POOL, "Failed", f"try {minute}")
    await recorder.close()
    (event,) = api.events.values()
    assert event["note"] == "try 2 (the last of 3 such events)"
    assert event["eventTime"] == "2030-01-01T00:00:00.000000Z"
    assert event["series"] == {"count": 3, "lastObservedTime": "2030-01-01T00:02:00.000000Z"}


async def test_the_writing_is_slow_and_goes_on_by_itself(api):
    seconds = Seconds()
    pending = PendingEvents(rate=2, burst=1, merge_time=30)
    recorder = KubernetesRecorder(api, "r", clock=seconds, pause=seconds.pause, pending=pending)
    for number in range(3):
        recorder.record(POOL, f"Reason{number}", "x")
    running = asyncio.create_task(recorder.run())
    await api.until(lambda: len(api.events) == 3)
    recorder.record(POOL, "Reason0", "y")
    await api.until(lambda: ("y (the last of 2 such events)", 2) in api.notes)
    assert seconds.pauses == [0.5, 0.5, 29.0], "the same event is not written again before"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_event_that_was_deleted_is_created_again(api, recorder):
    recorder.record(POOL, "Failed", "no image")
    await recorder.close()
    api.events.clear()
    recorder.record(POOL, "Failed", "no image")
    await recorder.close()
    assert api.notes == [("no image", 1)]


async def test_an_event_that_cannot_be_written_is_logged_and_the_others_are_written(api, recorder):
    api.fault = Unavailable("the API server does not answer")
    recorder.record(POOL, "Failed", "no image")
    with capture_logs() as logs:
        await recorder.close()
    api.fault = None
    recorder.record(POOL, "Ready", "there")
    await recorder.close()

    assert [line["event"] for line in logs] == ["events.not_written", "events.left_out"]
    assert api.notes == [("no image", 1), ("there", 1)]


class Outage:
    """A fault of the API that is over after so many requests."""

    def __init__(self, api: Api, fault: Exception, requests: int) -> None:
        self._api, self._left = api, requests
        api.fault = fault
        self._create, self._patch = api.create, api.patch
        api.create, api.patch = self.create, self.patch

    async def create(self, path, body):
        self._count()
        return await self._create(path, body)

    async def patch(self, path, body):
        self._count()
        return await self._patch(path, body)

    def _count(self):
        self._left -= 1
        if self._left < 0:
            self._api.fault = None


@pytest.fixture
async def run():
    """Runs recorders until the end of the test."""
    tasks = []

    def start(recorder):
        tasks.append(asyncio.create_task(recorder.run()))

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_event_waits_until_the_api_server_answers_again(api, run):
    seconds = Seconds()
    recorder = KubernetesRecorder(api, "r", clock=seconds, pause=seconds.pause)
    Outage(api, Unavailable("the API server does not answer"), 3)
    with capture_logs() as logs:
        recorder.record(POOL, "Failed", "no image")
        recorder.record(POOL, "Failed", "no room")
        run(recorder)
        await api.until(lambda: api.events)
    assert api.notes == [("no room (the last of 2 such events)", 2)]
    assert seconds.pauses[:3] == [RETRY_PAUSE] * 3, "one request in this time"
    assert [(line["event"], line.get("left_out")) for line in logs] == [
        ("events.not_written", None),
        ("events.written_again", 0),
    ]


async def test_an_event_that_could_not_be_changed_is_changed_when_the_api_server_answers_again(api, run):
    seconds = Seconds()
    recorder = KubernetesRecorder(api, "r", clock=seconds, pause=seconds.pause)
    recorder.record(POOL, "Failed", "no image")
    await recorder.close()
    Outage(api, Unavailable("the API server does not answer"), 2)
    recorder.record(POOL, "Failed", "no room")
    run(recorder)
    await api.until(lambda: ("no room (the last of 2 such events)", 2) in api.notes)
    assert len(api.events) == 1


async def test_an_event_that_is_being_written_when_the_recorder_ends_is_written(api, clock, recorder):
    hangs, create = asyncio.Event(), api.create

    async def hang(_path, _body):
        hangs.set()
        await asyncio.Event().wait()

    api.create = hang
    running = asyncio.create_task(recorder.run())
    recorder.record(POOL, "Failed", "no image")
    await hangs.wait()
    api.create = create
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert api.notes == [("no image", 1)]


async def test_events_that_are_refused_are_counted_and_the_log_says_how_many_when_others_are_written(api, run):
    seconds = Seconds()
    recorder = KubernetesRecorder(api, "r", clock=seconds, pause=seconds.pause)
    Outage(api, Forbidden("it may not create events"), 3)
    with capture_logs() as logs:
        for number in range(5):
            recorder.record(POOL, f"Reason{number}", "x")
        run(recorder)
        await api.until(lambda: len(api.events) == 2)
    assert [(line["event"], line.get("left_out")) for line in logs] == [
        ("events.not_written", None),
        ("events.written_again", 3),
    ]


async def test_events_that_are_still_not_written_at_the_end_are_counted(api, recorder):
    api.fault = Unavailable("the API server does not answer")
    for number in range(3):
        recorder.record(POOL, "Failed", f"try {number}")
    recorder.record(POOL, "Lost", "x")
    with capture_logs() as logs:
        await recorder.close()
    assert (logs[-1]["event"], logs[-1]["events"]) == ("events.left_out", 4)


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (Unavailable("the API server does not answer"), "`events.written_again` tells when"),
        (Forbidden("events is forbidden"), "they give the right"),
        (InvalidInput("note: too long"), "report it"),
    ],
)
async def test_the_log_says_what_to_do_about_an_event_that_was_not_written(api, recorder, fault, advice):
    api.fault = fault
    recorder.record(POOL, "Failed", "no image")
    with capture_logs() as logs:
        await recorder.close()
    told = next(line for line in logs if line["event"] == "events.not_written")
    assert (told["object"], told["reason"]) == (str(POOL.key), "Failed")
    assert advice in told["hint"]


async def test_the_same_trouble_is_logged_once(api, recorder):
    api.fault = Unavailable("the API server does not answer")
    with capture_logs() as logs:
        for number in range(3):
            recorder.record(POOL, f"Reason{number}", "x")
        await recorder.close()
        api.fault = None
        recorder.record(POOL, "Ready", "there")
        await recorder.close()
        api.fault = Unavailable("the API server does not answer")
        recorder.record(POOL, "Again", "x")
        await recorder.close()
    told = [line["event"] for line in logs if line["event"] != "events.left_out"]
    assert told == ["events.not_written", "events.written_again", "events.not_written"]


async def test_an_object_that_cannot_be_changed_is_followed_by_a_new_one(api, recorder):
    recorder.record(POOL, "Failed", "no image")
    await recorder.close()

    async def refuse(_path, _body):
        raise InvalidInput("message: is immutable")

    api.patch = refuse
    recorder.record(POOL, "Failed", "no room")
    await recorder.close()
    assert api.notes == [("no image", 1), ("no room", 1)]


async def test_what_is_left_out_is_logged_once_and_memory_has_a_bound(api, recorder):
    with capture_logs() as logs:
        for number in range(MOST_PENDING + 50):
            recorder.record(POOL, f"Flood{number}", "x")
    assert [line["event"] for line in logs] == ["events.too_many"]
    assert "`kubectl get events -A`" in logs[0]["hint"]
    with capture_logs() as logs:
        await recorder.close()
    assert [(line["event"], line["left_out"]) for line in logs] == [("events.written_again", 50)]
    assert len(api.events) == MOST_PENDING
    for number in range(SERIES_REMEMBERED + 10):
        recorder.record(POOL, f"Calm{number}", "x")
        await recorder.close()
    assert len(recorder._series) == SERIES_REMEMBERED


async def test_long_texts_are_cut_to_the_limits_of_the_api(api, recorder):
    recorder.record(POOL, "R" * 500, "m" * 5000)
    await recorder.close()
    (event,) = api.events.values()
    assert (len(event["reason"]), len(event["note"])) == (128, 1024)


def test_without_a_cluster_an_event_is_logged():
    with capture_logs() as logs:
        LogRecorder().record(POOL, "Failed", "no room", warning=True)
    assert logs == [
        {
            "event": "object.event",
            "log_level": "warning",
            "kind": "BuildKitPool",
            "object": "default/p",
            "reason": "Failed",
            "message": "no room",
        }
    ]
