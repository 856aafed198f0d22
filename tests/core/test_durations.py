import contextlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkpool.core.durations import parse, render
from bkpool.core.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1h", 3600),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("500ms", 0.5),
        ("0", 0),
        ("0s", 0),
        ("+2s", 2),
        (".5s", 0.5),
    ],
)
def test_it_reads_what_go_reads(text, seconds):
    assert parse(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    ["", "banana", "1", "-1h", "1h 30m", "h", "1d", "1h-30m", "١h", "9" * 100 + "h", "1e9h", "293y", "3000000h"],
)
def test_it_refuses_everything_else_and_names_the_field(text):
    with pytest.raises(InvalidInput) as caught:
        parse(text, field="ttl")
    assert caught.value.field == "ttl"
    assert caught.value.message.startswith("ttl: ")
    assert caught.value.hint


@given(st.integers(min_value=0, max_value=10**9))
def test_a_rendered_duration_is_read_as_the_same(milliseconds):
    value = timedelta(milliseconds=milliseconds)
    assert parse(render(value)) == value


@given(st.text(max_size=80))
def test_any_text_is_a_duration_or_an_invalid_input(text):
    with contextlib.suppress(InvalidInput):
        assert parse(text) >= timedelta(0)
