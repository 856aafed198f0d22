"""Records are counted right however they are cut into reads."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from bkpool.gateway.net.record_counter import RecordCounter


@given(lengths=st.lists(st.integers(0, 300), max_size=20), cuts=st.lists(st.integers(0, 3000), max_size=30))
def test_records_are_counted_in_any_cuts(lengths, cuts):
    stream = b"".join(b"\x17\3\3" + length.to_bytes(2) + bytes(length) for length in lengths)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    counter = RecordCounter()
    parts = [counter.count(memoryview(stream)[begin:end]) for begin, end in itertools.pairwise(places)]
    assert sum(parts) == len(lengths)


def test_a_record_counts_when_its_header_is_complete():
    counter = RecordCounter()
    record = b"\x17\3\3\0\3abc"
    assert [counter.count(memoryview(record[at : at + 1])) for at in range(8)] == [0, 0, 0, 0, 1, 0, 0, 0]


@given(cuts=st.lists(st.integers(0, 60), max_size=12))
def test_it_knows_when_a_header_comes_next(cuts):
    stream = memoryview(b"".join(b"\x17\3\3" + length.to_bytes(2) + bytes(length) for length in (9, 0, 1, 30)))
    begins = {0, 14, 19, 25, 60}
    places = [0, *sorted(cuts), len(stream)]
    counter = RecordCounter()
    for begin, end in itertools.pairwise(places):
        counter.count(stream[begin:end])
        assert counter.between == (end in begins)
