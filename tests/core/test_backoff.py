from __future__ import annotations

import pytest

from bkpool.core.backoff import Backoff


def test_each_pause_is_twice_the_one_before_up_to_the_longest():
    backoff = Backoff(1.0)
    assert [backoff.failed() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])


def test_success_begins_again_with_the_first_pause():
    backoff = Backoff(60.0, first=1.0)
    backoff.failed()
    backoff.failed()
    backoff.succeeded()
    assert backoff.failed() == 1.0


def test_jitter_takes_a_part_of_the_pause():
    assert Backoff(5.0, jitter=lambda: 0.5).failed() == pytest.approx(0.05)


def test_no_number_of_failures_overflows():
    backoff = Backoff(15.0)
    for _ in range(10_000):
        pause = backoff.failed()
    assert pause == 15.0
