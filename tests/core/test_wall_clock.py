from datetime import UTC, datetime, timedelta

import pytest

from bkpool.core.wall_clock import LONGEST_SLEEP, ClockReading, pause_until

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(("seconds", "pause"), [(-5, 0), (0, 0), (7, 7), (30, 30), (36_000, LONGEST_SLEEP)])
def test_a_sleep_ends_at_its_time_and_no_piece_of_it_is_long(seconds, pause):
    assert pause_until(NOW + timedelta(seconds=seconds), NOW) == pause


@pytest.mark.parametrize(
    ("wall", "monotonic", "jumped"), [(30, 30, False), (30.9, 30, False), (36_030, 30, True), (-60, 5, True)]
)
def test_a_clock_that_was_set_is_noticed(wall, monotonic, jumped):
    before = ClockReading(NOW, 100)
    assert before.jumped(ClockReading(NOW + timedelta(seconds=wall), 100 + monotonic)) is jumped
