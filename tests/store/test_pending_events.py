"""Which events wait and which comes next. Seconds are given; nothing here waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.names import Slot
from bkpool.core.pool import Pool
from bkpool.core.resource import Metadata
from bkpool.core.worker import Worker, new_worker
from bkpool.store.pending_events import PendingEvent, PendingEvents, pending_event

POOL = Pool(metadata=Metadata(name="p", uid="pool"))
BEGIN = datetime(2030, 1, 1, tzinfo=UTC)


def worker(number: int) -> Worker:
    made = new_worker(Slot("default", "p", number), POOL, None, {})
    return made.but(metadata=made.metadata.but(uid=f"worker-{number}"))


def event(about=POOL, reason="Allocated", message="", *, warning=False, at=0.0) -> PendingEvent:
    return pending_event(about, reason, message, warning=warning, at=BEGIN + timedelta(seconds=at))


def taken(pending: PendingEvents, now: float, **options) -> list[tuple[str, str, int]]:
    found = []
    while (one := pending.take(now, **options)) is not None:
        found.append((one.about.name, one.reason, one.times))
    return found


def test_events_of_one_object_and_reason_wait_as_one():
    pending = PendingEvents()
    for number, message in enumerate(("leased to ann", "leased to bob", "leased to cy")):
        pending.add(event(worker(0), message=message, at=number), number)
    pending.add(event(worker(0), "Released"), 3)
    pending.add(event(worker(1)), 3)

    first = pending.take(3)
    assert (first.times, first.message) == (3, "leased to cy")
    assert (first.at, first.last) == (BEGIN, BEGIN + timedelta(seconds=2))
    assert first.note(first.times) == "leased to cy (the last of 3 such events)"
    assert taken(pending, 3) == [("p-worker-0", "Released", 1), ("p-worker-1", "Allocated", 1)]
    assert pending.wait(3) is None


def test_a_worker_that_is_leased_every_second_costs_one_write_in_the_merge_time():
    pending = PendingEvents(merge_time=30)
    writes = []
    for second in range(91):
        pending.add(event(worker(0)), second)
        writes += [(second, *one) for one in taken(pending, second)]
    assert [(second, times) for second, _, _, times in writes] == [(0, 1), (30, 30), (60, 30), (90, 30)]
    pending.add(event(worker(0)), 91)
    assert pending.wait(91) == 29


def test_in_the_long_run_only_so_many_are_written_a_second():
    pending = PendingEvents(rate=20, burst=100)
    for number in range(1000):
        pending.add(event(worker(number)), 0)
    assert len(taken(pending, 0)) == 100, "at once"
    assert pending.wait(0) == pytest.approx(0.05)
    assert sum(len(taken(pending, second / 10)) for second in range(1, 101)) == 200, "in ten seconds"


def test_warnings_are_written_first():
    pending = PendingEvents(burst=1)
    pending.add(event(worker(0)), 0)
    pending.add(event(worker(1), "Failed", warning=True), 0)
    assert taken(pending, 0) == [("p-worker-1", "Failed", 1)]


def test_an_event_that_becomes_a_warning_goes_first_and_is_written_once():
    pending = PendingEvents(burst=2)
    pending.add(event(worker(0), "Ended"), 0)
    pending.add(event(worker(1), "Ended"), 0)
    pending.add(event(worker(1), "Ended", warning=True), 0)
    assert taken(pending, 0) == [("p-worker-1", "Ended", 2), ("p-worker-0", "Ended", 1)]
    assert taken(pending, 100) == []


def test_of_too_many_the_oldest_are_counted_at_their_pool():
    pending = PendingEvents(most=3, rate=1, burst=1)
    for number in range(6):
        pending.add(event(worker(number), message=f"leased to user {number}", at=number), 0)

    assert len(pending) == 3
    assert [(one.about.name, one.times) for one in pending.waiting.values()] == [
        ("p", 4),
        ("p-worker-4", 1),
        ("p-worker-5", 1),
    ]
    (of_pool,) = (one for one in pending.waiting.values() if one.about.kind == "BuildKitPool")
    assert (of_pool.about.uid, of_pool.at) == ("pool", BEGIN)
    assert of_pool.note(99) == "4 times on 4 workers, the last: p-worker-3: leased to user 3"
    assert pending.dropped == 0


def test_only_what_cannot_be_counted_elsewhere_is_left_out():
    pending = PendingEvents(most=2)
    for number in range(5):
        pending.add(event(POOL, f"Reason{number}"), 0)
    assert list(pending.waiting) == [("pool", "Reason3"), ("pool", "Reason4")]
    assert pending.dropped == 3


def test_an_event_that_could_not_be_written_waits_again_with_what_came_meanwhile():
    pending = PendingEvents(merge_time=30)
    pending.add(event(worker(0), message="first"), 0)
    pending.add(event(worker(1), "Other"), 0)
    out = pending.take(0)
    pending.add(event(worker(0), message="second", at=1), 1)
    pending.put_back(out, 2)
    assert next(iter(pending.waiting)) == out.key, "it is the oldest again"
    again = [one for _ in range(2) if (one := pending.take(2))]
    assert [(one.about.name, one.times) for one in again] == [("p-worker-1", 1), ("p-worker-0", 2)]
    assert (again[1].message, again[1].at) == ("second", BEGIN)
    pending.put_back(again[1], 3)
    assert taken(pending, 3) == [("p-worker-0", "Allocated", 2)]
    assert pending.wait(3) is None


def test_at_the_end_everything_is_taken_whatever_the_rate():
    pending = PendingEvents(burst=1)
    for _ in range(2):
        pending.add(event(worker(0)), 0)
        assert len(taken(pending, 0)) <= 1
    pending.add(event(worker(1)), 0)
    assert len(taken(pending, 0, hurry=True)) == 2


RECORDED = st.lists(
    st.tuples(
        st.integers(0, 5),  # which worker; 5: the pool itself
        st.sampled_from(["Allocated", "Released", "Failed"]),
        st.booleans(),
        st.sampled_from([0.0, 0.1, 1.0, 40.0]),  # seconds until the next one
        st.booleans(),  # whether somebody writes now
    ),
    max_size=60,
)


@given(RECORDED)
def test_no_event_is_lost_or_counted_twice_and_the_bounds_hold(recorded):
    pending = PendingEvents(most=6, merge_time=10, rate=2, burst=3)
    now, written, recorded_times = 0.0, [], 0
    for number, reason, warning, pause, write in recorded:
        about = POOL if number == 5 else worker(number)
        pending.add(event(about, reason, warning=warning, at=now), now)
        recorded_times += 1
        assert len(pending) <= 6
        if write:
            while (one := pending.take(now)) is not None:
                written.append((now, one))
        now += pause
    for at, one in written:
        assert not [1 for other_at, other in written if other.key == one.key and at < other_at < at + 10]
    while (one := pending.take(now, hurry=True)) is not None:
        written.append((now, one))
    assert sum(one.times for _, one in written) + pending.dropped == recorded_times
    assert pending.wait(now) is None
    assert len(pending) == 0


def test_while_nothing_can_be_written_the_heaps_stay_as_small_as_what_waits():
    """Events of workers are counted in those of their pool again and again, and nothing is taken out."""
    pending = PendingEvents(most=50)
    for number in range(5000):
        pending.add(event(worker(number % 200), warning=number % 3 == 0), number)
    assert sum(len(heap) for heap in pending._due) <= 2 * (2 * 50 + 64)
    found = taken(pending, 5000, hurry=True)
    assert sum(times for _, _, times in found) == 5000
