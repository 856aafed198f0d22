"""The definition of a leak in a soak: anything that has grown beyond its tolerance, with its name and growth."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from soak.growth import Row, compare, flat, table

from support.examples import examples

COUNTS = st.dictionaries(st.text(st.characters(categories=["L"]), min_size=1), st.integers(0, 1000), max_size=8)


def test_a_number_that_has_not_grown_is_no_leak():
    rows = compare({"descriptors": 15, "objects": {"Lease": 4}}, {"descriptors": 14, "objects": {"Lease": 4}}, {})
    assert all(row.well for row in rows)
    assert "GREW" not in table(rows)
    assert "and 1 kinds of objects, none of which has grown" in table(rows)


def test_a_number_that_has_grown_is_named_with_its_growth():
    rows = compare({"objects": {"Lease": 4}}, {"objects": {"Lease": 12, "Relay": 1}}, {})
    assert [(row.name, row.grown) for row in rows if not row.well] == [("objects Lease", 8), ("objects Relay", 1)]
    assert "GREW by 8" in table(rows)


def test_a_number_may_grow_within_its_tolerance():
    assert Row("rss", 100, 150, 50).well
    assert not Row("rss", 100, 151, 50).well
    assert not Row("descriptors", 100, 101, 0).well


def test_every_kind_of_objects_may_grow_within_a_tolerance_of_its_own():
    before, after = {"tasks": 1, "objects": {"Key": 4, "Lease": 4}}, {"tasks": 2, "objects": {"Key": 6, "Lease": 7}}
    rows = compare(before, after, {}, objects=2)
    assert [row.name for row in rows if not row.well] == ["objects Lease", "tasks"]
    assert [row.name for row in compare(before, after, {"objects Key": 1}, objects=3) if not row.well] == [
        "objects Key",
        "tasks",
    ]


@settings(max_examples=examples(30))
@given(COUNTS, COUNTS)
def test_every_growth_is_found(before, after):
    grown = {row.name for row in compare(before, after, {}) if not row.well}
    assert grown == {name for name, count in after.items() if count > before.get(name, 0)}


@settings(max_examples=examples(30))
@given(COUNTS)
def test_a_flat_count_is_unchanged(count):
    assert flat(count) == count
    assert flat({"of": count}) == {f"of {name}": number for name, number in count.items()}
