"""The recorder of events, against an API in memory. In e2e/kind/test_events.py, kubectl shows the events."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.errors import NotFound, Unavailable
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.store.events import QUEUE_SIZE, SERIES_REMEMBERED, KubernetesRecorder, LogRecorder
from support.captured_logs import capture_logs

POOL = Pool(metadata=Metadata(name="p", uid="u", resource_version="7"))


class Api:
    def __init__(self) -> None:
        self.events: dict[str, dict] = {}
        self.fault: Exception | None = None

    async def create(self, path, body):
        if self.fault:
            raise self.fault
        self.events[f"{path}/{body['metadata']['name']}"] = body
        return body

    async def patch(self, path, body):
        if path not in self.events:
            raise NotFound(path)
        self.events[path] |= body

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
        recorder.record(POOL, "Allocated", message)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (message, 1) in api.notes
    recorder.record(POOL, "Released", "at the very end")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert ("at the very end", 1) in api.notes


async def test_a_repeated_event_raises_the_count_for_ten_minutes(api, clock, recorder):
    for minutes in (0, 1, 9, 11):
        clock.now = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
        recorder.record(POOL, "Failed", "no image", warning=True)
        recorder.record(POOL, "Failed", f"another at {minutes}")
        await recorder.close()

    assert [entry for entry in api.notes if entry[0] == "no image"] == [("no image", 3), ("no image", 1)]
    assert len(api.notes) == 6


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

    assert [line["event"] for line in logs] == ["events.not_written"]
    assert api.notes == [("there", 1)]


async def test_of_too_many_events_the_newest_are_kept_and_that_is_logged_once(api, recorder):
    with capture_logs() as logs:
        for number in range(QUEUE_SIZE + 50):
            recorder.record(POOL, "Flood", str(number))
    await recorder.close()

    assert [line["event"] for line in logs] == ["events.dropped"]
    assert [note for note, _ in api.notes] == [str(number) for number in range(50, QUEUE_SIZE + 50)]
    recorder.record(POOL, "Calm", "one more")
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
