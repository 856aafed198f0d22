"""A registry starts empty, and the cached series are those of the metric."""

from __future__ import annotations

from prometheus_client import Counter

from bkpool.telemetry.registry import CachedSeries, new_registry


def test_a_new_registry_reports_nothing_of_the_process():
    assert list(new_registry().collect()) == []


def test_a_series_is_kept_after_the_first_lookup_and_is_that_of_the_metric():
    registry = new_registry()
    series = CachedSeries(Counter("things", "Things.", ["kind", "result"], registry=registry))
    series["a", "ok"].inc()
    assert list(series) == [("a", "ok")], "it is kept, and not looked up again"
    assert registry.get_sample_value("things_total", {"kind": "a", "result": "ok"}) == 1


def test_a_single_label_is_given_as_a_string():
    registry = new_registry()
    CachedSeries(Counter("things", "Things.", ["kind"], registry=registry))["kind of thing"].inc()
    assert registry.get_sample_value("things_total", {"kind": "kind of thing"}) == 1
